"""Adds methods to PEFT's tables. PEFT has no public function for this, so no other file touches the tables."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

from milora_core.errors import MiLoraError


def add_peft_type(name: str) -> Any:
    """Adds a member to PEFT's enumeration of methods, or returns the existing one.

    `register_peft_method` refuses names that are not members, and an `Enum` with members cannot be subclassed. This
    function creates the member as `enum` does: a `str` of its value, in the class's three member tables.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_class: type, model_class: type, prefix: str) -> None:
    """Registers a method for `get_peft_model` and `PeftModel.from_pretrained`. Registering it again changes nothing.

    Args:
        name: The method's name in upper case, as in the `peft_type` of `adapter_config.json`.
        config_class: Its `PeftConfig`.
        model_class: Its `BaseTuner`.
        prefix: Prefix of its parameters' names.
    """
    member = add_peft_type(name)
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config_class, model_cls=model_class, prefix=prefix)


NOT_SETTINGS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
"""Fields of a configuration that do not change the adapter's output."""


def refuse_other_settings(tuner_class: type[Any]) -> None:
    """Makes `PeftModel.load_adapter` compare settings if an adapter of the name already exists.

    PEFT reads only the weights in this case, and would combine them with the existing settings. Models of other methods
    are not affected. Calling this function again changes nothing.

    Args:
        tuner_class: The class of the tuners to which the check applies.
    """
    original = PeftModel.load_adapter
    if getattr(original, "refuses_other_settings", False):
        return

    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if adapter_name in self.peft_config and isinstance(getattr(self, "base_model", None), tuner_class):
            names = ("subfolder", "revision", "cache_dir", "token")
            place = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            own, other = (
                _settings(config)
                for config in (self.peft_config[adapter_name], PeftConfig.from_pretrained(str(model_id), **place))
            )
            differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
            if differing:
                raise MiLoraError(
                    f"An adapter {adapter_name!r} is loaded with other settings ({', '.join(differing)}) than those of"
                    f" {model_id}. Delete it first (model.delete_adapter), or load this one under another name."
                )
        return original(self, model_id, adapter_name, *args, **kwargs)

    load_adapter.refuses_other_settings = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_adapter


def _settings(config: Any) -> dict[str, Any]:
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_SETTINGS}
    if values.get("modules_to_save") is not None:
        # PEFT adds a classifier's heads again when the adapter is loaded.
        values["modules_to_save"] = set(values["modules_to_save"])
    return {
        name: sorted(value) if isinstance(value, set | list) and all(isinstance(v, str) for v in value) else value
        for name, value in values.items()
    }
