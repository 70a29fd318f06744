"""Adapters that PEFT lacks, as PEFT tuners, and their registration: plain `peft` then loads what we save.

Importing this package imports nothing but the standard library. Tuners register at once if `peft` is loaded, else when
it is. One line here registers a technique's file:

    TUNERS += (Tuner("weight_offsets", "lightning_peft.adapters.weight_offsets", "WeightOffsetsConfig", ...),)

and `register_with_peft()` is the file's last line, for whoever imports that file before `peft`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Tuner:
    """A tuner of this suite.

    Args:
        name: Its PEFT type in lower case, as `peft.utils.register_peft_method` wants it.
        module: Where its classes are.
        config: Name of its config class.
        model: Name of its tuner class.
        prefix: Prefix of its parameters; by default the name and an underscore.
    """

    name: str
    module: str
    config: str
    model: str
    prefix: str | None = None


#: Every tuner of this suite, one line each.
TUNERS: tuple[Tuner, ...] = (
    Tuner("bottleneck", "lightning_peft.adapters.bottleneck", "BottleneckConfig", "BottleneckModel"),
    Tuner("connected", "lightning_peft.adapters.connected", "ConnectedAdapterConfig", "ConnectedAdapterModel"),
    Tuner("dsee", "lightning_peft.adapters.dsee", "DSEEConfig", "DSEEModel"),
    Tuner("sparse_gin", "lightning_peft.adapters.sparse_gin", "SparseGINConfig", "SparseGINModel"),
    Tuner("special_tokens", "lightning_peft.adapters.special_tokens", "SpecialTokensConfig", "SpecialTokensModel"),
    Tuner(
        "selective_lora",
        "lightning_peft.adapters.selective_lora",
        "SelectiveLoraConfig",
        "SelectiveLoraModel",
        prefix="lora_",
    ),
)


def add_peft_type(name: str) -> Any:
    """The member of PEFT's `PeftType` with this name, added if it is missing: PEFT's enum is closed.

    Args:
        name: The type in either case, such as "weight_offsets".
    """
    from peft.utils.peft_types import PeftType

    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        type.__setattr__(PeftType, value, member)  # EnumType's own refuses nothing new, but hides it from attributes
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
    return PeftType[value]


def being_imported() -> bool:
    """Whether a tuner's file, or what tuners share, is in the middle of its import (and so has asked for `peft`)."""
    waiting = {tuner.module: tuner.model for tuner in TUNERS} | {f"{__name__}.beside": "BesideModel"}
    loaded = {name: model for name, model in waiting.items() if name in sys.modules}
    return any(not hasattr(sys.modules[name], model) for name, model in loaded.items())


def register(tuners: Sequence[Tuner]) -> None:
    """Makes tuners known to PEFT; those it knows already are left alone.

    While a tuner's file is being imported nothing happens: its last line calls again.
    """
    if being_imported():
        return
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    for tuner in tuners:
        module = importlib.import_module(tuner.module)  # which registers all, if it is the first time
        if add_peft_type(tuner.name) in PEFT_TYPE_TO_CONFIG_MAPPING:
            continue
        register_peft_method(
            name=tuner.name,
            config_cls=getattr(module, tuner.config),
            model_cls=getattr(module, tuner.model),
            prefix=tuner.prefix,
        )


class _AfterPeft(MetaPathFinder):
    """Registers our tuners once `peft` has been imported by whoever wants it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                register(TUNERS)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Registers `TUNERS` now if `peft` is imported, else as soon as it is. Calling it again changes nothing."""
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(getattr(peft, "__spec__", None), "_initializing", False):
        register(TUNERS)
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


register_with_peft()
