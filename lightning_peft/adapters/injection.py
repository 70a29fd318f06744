"""Adapters into the network inside a LightningModule, in place: the module keeps its attributes and methods.

Tuners (LoRA and its relatives, IA3, ...) replace layers of the network; what PEFT runs in the network's forward (prompt
learning) replaces the network by its `PeftModel`, under the same attribute. One of each kind go together, in any order:
the tuner's layers are then in the network inside the `PeftModel` (MAM is prefix tuning and bottleneck adapters).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from lightning_peft.adapters.configuration import closest, for_network, to_json
from lightning_peft.delta import digest
from lightning_peft.network_record import base_of


def network_name(module: nn.Module, network: str | None = None) -> str:
    """Qualified name of the network inside `module` that adapters go into; "" is the module itself.

    Args:
        module: A LightningModule or any other.
        network: The name, where a module holds more than one network; by default the one it calls `model`.

    Raises:
        ValueError: There is no such submodule, or several candidates and no name.
    """
    from transformers import PreTrainedModel

    if network is not None:
        names = [name for name, _ in module.named_modules()]
        if network not in names:
            raise ValueError(
                f"network={network!r}: {type(module).__name__} has no such part; {closest(network, names)}."
            )
        return network
    if isinstance(module, (PreTrainedModel, PeftModel)):
        return ""
    found: list[str] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(child, (PreTrainedModel, PeftModel)) and not inside:
            found.append(name)
    if not found:  # no transformers network: the only part that has parameters
        found = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    if "model" in found:
        return "model"
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} networks ({', '.join(found) or 'none with parameters'}): say "
            "which one to adapt by its name, as in PEFT(config, network='model')."
        )
    return found[0]


def has_network(module: nn.Module) -> bool:
    """Whether a transformers network is there already."""
    from transformers import PreTrainedModel

    return any(isinstance(child, (PreTrainedModel, PeftModel)) for child in module.modules())


def adapters_of(network: nn.Module) -> dict[str, str]:
    """Adapters put in by us: name -> the config as it was asked for, JSON."""
    return base_of(network).__dict__.setdefault("_lightning_peft", {})


def adapter_holders(network: nn.Module) -> dict[str, Any]:
    """Name of each adapter -> what PEFT keeps it on: the `PeftModel`, or the network (inside it, for a tuner there)."""
    levels = [base_of(network), network]
    return {name: level for level in levels for name in getattr(level, "peft_config", {})}


def configs_of(network: nn.Module) -> dict[str, PeftConfig]:
    """Name of each adapter on the network -> its config."""
    return {name: holder.peft_config[name] for name, holder in adapter_holders(network).items()}


def tuner_of(network: Any) -> nn.Module | None:
    """PEFT's tuner object, which carries what is not in the layers, such as `_get_kasa_loss`."""
    inner = base_of(network).__dict__.get("peft_tuner")
    return network.base_model if inner is None and isinstance(network, PeftModel) else inner


def runs_in_forward(config: PeftConfig) -> bool:
    """Whether the method acts in the network's forward, or keeps state beside its layers: it needs a PeftModel."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    return bool(
        config.is_prompt_learning
        or config.is_adaption_prompt
        or type(config).__name__ in ("ShadowConfig", "XLoraConfig")
        or getattr(tuner, "uses_shared_state", False)
    )


def inject(
    module: nn.Module,
    config: PeftConfig,
    adapter_name: str = "default",
    network: str | None = None,
    modules_to_save: list[str] | None = None,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Puts an adapter into the network inside `module`, once: a second call with the same config changes nothing.

    Args:
        module: A LightningModule.
        config: What to put in; left as it is.
        adapter_name: Name of the adapter.
        network: Name of the network, where `module` holds more than one.
        modules_to_save: Modules that train whole, besides the config's and the task's own.
        autocast_adapter_dtype: Hold adapters in fp32 where the network is in half precision, as PEFT does.

    Returns:
        The network with its adapter: the same object for tuners, its `PeftModel` for prompt learning.

    Raises:
        ValueError: The adapter does not fit the network, or another one has its name.
    """
    path = network_name(module, network)
    found = module.get_submodule(path)
    asked = to_json(config)
    if adapters_of(found).get(adapter_name) == asked:
        return found
    existing = configs_of(found)
    if adapter_name in existing:
        if to_json(existing[adapter_name]) == asked:  # what became of the config, as a checkpoint has it
            return found
        raise ValueError(
            f"the network has an adapter named {adapter_name!r} already, from another config: give this one another "
            "adapter_name."
        )
    _check_together(config, existing)
    config = for_network(copy.deepcopy(config), base_of(found), modules_to_save)
    before = {id(p): digest(p) for p in found.parameters() if not p.is_meta}
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on one network, which is asked for here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        adapted = _inject(module, path, found, config, adapter_name, autocast_adapter_dtype)
    # Some methods (PiSSA, KaSA) write into the base: a delta has to hold those weights as well.
    changed = {id(p) for p in adapted.parameters() if id(p) in before and before[id(p)] != digest(p)}
    changed_base(adapted).update(n for n, p in adapted.named_parameters(remove_duplicate=False) if id(p) in changed)
    adapters_of(adapted)[adapter_name] = asked
    return adapted


def _check_together(config: PeftConfig, existing: dict[str, PeftConfig]) -> None:
    """Refuses what PEFT cannot keep on one network: two types, but for prompt learning around a tuner's layers."""
    for other in existing.values():
        around = [c for c in (config, other) if runs_in_forward(c)]
        together = len(around) == 1 and around[0].is_prompt_learning
        if other.peft_type != config.peft_type and not together:
            raise ValueError(
                f"a network takes adapters of one PEFT type, and prompt learning besides: it has {other.peft_type} and "
                f"cannot have {config.peft_type} as well."
            )


def changed_base(network: nn.Module) -> set[str]:
    """Names of frozen weights that putting an adapter in has changed."""
    return network.__dict__.setdefault("_lightning_peft_changed", set())


def _inject(
    module: nn.Module, path: str, found: Any, config: PeftConfig, name: str, autocast_adapter_dtype: bool
) -> nn.Module:
    if isinstance(found, PeftModel) and runs_in_forward(found.active_peft_config) and not runs_in_forward(config):
        _inject(module, path, base_of(found), config, name, autocast_adapter_dtype)
        return found
    together = [*getattr(found, "peft_config", {}), name]
    if isinstance(found, PeftModel):
        found.add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        if len(together) > 1 and config.is_prompt_learning:
            found.set_adapter(name)
        return found
    if runs_in_forward(config):
        if path == "":
            raise ValueError(f"{config.peft_type} replaces the network by a PeftModel, so it must be a module's part.")
        trained = [p for p in found.parameters() if p.requires_grad] if together[:-1] else []
        adapted = get_peft_model(found, config, adapter_name=name, autocast_adapter_dtype=autocast_adapter_dtype)
        for parameter in trained:  # a tuner's, which prompt learning has frozen with everything else
            parameter.requires_grad = True
        _replace(module, found, adapted)
        return adapted
    # What inject_adapter_in_model does, but the tuner is kept: it carries KaSA's loss and merging.
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](found, config, adapter_name=name)
    tuner._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast_adapter_dtype)
    if len(together) > 1:
        tuner.set_adapter(together)  # all of them act and train
    found.__dict__["peft_tuner"] = tuner  # not a submodule: the network is inside it
    if hasattr(found, "_hf_peft_config_loaded"):
        found._hf_peft_config_loaded = True  # transformers' disable_adapters, set_adapter and save_pretrained work
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in found.modules())
    if recomputes and hasattr(found, "enable_input_require_grads"):
        found.enable_input_require_grads()  # recomputation needs an input that requires a gradient
    return found


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    inside = {id(part) for part in new.modules()}
    for part in module.modules():
        if id(part) in inside:
            continue
        for name, child in list(part._modules.items()):
            if child is old:
                part._modules[name] = new


def load_adapter(network: Any, folder: str, adapter_name: str = "default") -> None:
    """Fills an adapter that is in the network with the weights of a PEFT folder.

    Raises:
        ValueError: The folder's weights are not those of the adapter.
    """
    network = adapter_holders(network)[adapter_name]
    saved = load_peft_weights(folder, device="cpu")
    if not isinstance(network, PeftModel):
        saved = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
    elif network.peft_config[adapter_name].is_prompt_learning:
        _check_prompt(network, saved, folder, adapter_name)
    result: Any = set_peft_model_state_dict(network, saved, adapter_name=adapter_name)
    own = (name for name, p in network.named_parameters() if p.requires_grad and adapter_name in name.split("."))
    trained = {name for name in own if "prompt_encoder" not in name}
    missing = sorted(trained.intersection(result.missing_keys))
    unexpected = [key for key in result.unexpected_keys if key != "prompt_embeddings"]
    if missing or unexpected:
        raise ValueError(
            f"the adapter in {folder} does not fit this network: it lacks {missing[:3] or 'nothing'} and brings "
            f"{unexpected[:3] or 'nothing'} that the network does not have."
        )


def _check_prompt(network: Any, saved: dict[str, Tensor], folder: str, adapter_name: str) -> None:
    own = network.prompt_encoder[adapter_name].embedding.weight.shape
    given = saved["prompt_embeddings"].shape if "prompt_embeddings" in saved else None
    if given != own:
        raise ValueError(f"the prompt in {folder} has shape {tuple(given or ())} and this network takes {tuple(own)}.")


def trainable_state(network: nn.Module) -> dict[str, Tensor]:
    """What trains, by name, on the CPU."""
    return {name: p.detach().cpu() for name, p in network.named_parameters() if p.requires_grad}


def same_on_all_ranks(network: nn.Module, broadcast: Callable[[Any], Any]) -> None:
    """Gives every rank rank 0's fresh adapter: FSDP2, unlike DDP, does not, and ranks may draw different numbers."""
    own = trainable_state(network)
    if any(value.is_meta for value in own.values()):
        return
    first = broadcast(own)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in first:
                parameter.copy_(first[name])
