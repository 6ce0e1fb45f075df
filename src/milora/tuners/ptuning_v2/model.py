"""The tuner of P-tuning v2."""

from __future__ import annotations

from milora.tuners.prefix import PrefixTuner
from milora.tuners.ptuning_v2.layer import PTuningV2Layer


class PTuningV2Model(PrefixTuner):
    """A backbone whose layers have learned keys and values; created by `get_peft_model(model, PTuningV2Config())`."""

    method = "P-tuning v2"
    prefix = "ptuning_v2_"
    tuner_layer_cls = PTuningV2Layer
