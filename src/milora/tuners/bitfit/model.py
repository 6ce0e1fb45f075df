"""The tuner of BitFit."""

from __future__ import annotations

from milora.tuners.attachment import AttachmentTuner
from milora.tuners.bitfit.layer import BitFitLayer


class BitFitModel(AttachmentTuner):
    """A backbone whose linear modules have learned biases; created by `get_peft_model(model, BitFitConfig())`."""

    method = "BitFit"
    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer
