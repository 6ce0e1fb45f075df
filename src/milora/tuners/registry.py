"""The one place that adds methods to PEFT's own tables, for which PEFT has no public way in."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method


def add_peft_type(name: str) -> Any:
    """Adds a member to PEFT's enumeration of methods, or returns the one that is there.

    `register_peft_method` refuses names that are no members, and an `Enum` with members cannot be subclassed. So the
    member is made as `enum` itself makes it: a `str` of its value, entered into the class's three member tables.
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
    """Makes `get_peft_model` and `PeftModel.from_pretrained` know a method; registering it again changes nothing.

    Args:
        name: Upper case, as in `adapter_config.json`'s `peft_type`.
        config_class: Its `PeftConfig`.
        model_class: Its `BaseTuner`.
        prefix: What the names of its parameters start with.
    """
    member = add_peft_type(name)
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config_class, model_cls=model_class, prefix=prefix)
