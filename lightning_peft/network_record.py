"""What a checkpoint says about its network, and the network built from that without its weights."""

from __future__ import annotations

import hashlib
import importlib
import json
from typing import Any

import torch
from torch import Tensor, nn

#: Parts that PEFT puts between a layer's own name and its weights' names.
_WRAPPERS = (".base_layer", ".original_module", ".token_adapter")


def own_class(network: nn.Module) -> type:
    """The network's class; `fully_shard` puts one of its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(network).__mro__ if not issubclass(cls, FSDPModule))


def base_of(network: nn.Module) -> nn.Module:
    """The network inside a `PeftModel`, or itself."""
    from peft import PeftModel

    return network.get_base_model() if isinstance(network, PeftModel) else network


def network_record(module: nn.Module, path: str) -> dict[str, Any]:
    """Class, config and place of the network, JSON values only.

    Args:
        module: The LightningModule.
        path: Qualified name of the network in it.
    """
    network = base_of(module.get_submodule(path))
    cls = own_class(network)
    config = getattr(network, "config", None)
    settings = None
    if hasattr(config, "to_json_string"):
        settings = json.loads(config.to_json_string(use_diff=False))
        settings.pop("quantization_config", None)
    return {
        "path": path,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "config": settings,
        "name_or_path": getattr(network, "name_or_path", "") or "",
        "dtype": str(next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)),
    }


def empty_network(record: dict[str, Any]) -> nn.Module:
    """The network of a record on the meta device.

    Raises:
        ValueError: It is not a transformers network of a class that can be imported.
    """
    module, _, name = record["class"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's network is a {record['class']}, which cannot be imported here ({error}): export the "
            "live module instead, export(module, out)."
        ) from error
    if record["config"] is None or not hasattr(cls, "config_class"):
        raise ValueError(
            f"a {record['class']} cannot be built from its checkpoint alone (it is no transformers network): export "
            "the live module instead, export(module, out)."
        )
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(record["config"]))


def base_name(name: str) -> str:
    """Name of a weight in the plain network, from its name beside adapters."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.").removeprefix("base_model.")


def record_of_base(base: str, path: str, dtype: str = "torch.float32") -> dict[str, Any]:
    """A record read from a base's folder or hub name: for checkpoints that carry none.

    Raises:
        ValueError: The base's config names no class of transformers.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(local(base))
    names = getattr(config, "architectures", None) or []
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(f"base={base!r}: its config.json names no architecture of transformers.")
    cls = getattr(transformers, names[0])
    return {
        "path": path,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "config": json.loads(config.to_json_string(use_diff=False)),
        "name_or_path": base,
        "dtype": dtype,
    }


def local(name: str) -> str:
    """What `from_pretrained` takes for a name as modules take it (packages and GGUF files included)."""
    from lightning_peft.models.pretrained import local_name

    return local_name(name, "AutoModelForCausalLM")


def base_weights(record: dict[str, Any], base: str | None) -> dict[str, Tensor]:
    """State dict of the base that a delta leaves out.

    Args:
        record: The network's record.
        base: Folder or hub name; by default the one the run was started from.

    Raises:
        ValueError: There is no name, or nothing there.
    """
    name = base or record["name_or_path"]
    if not name:
        raise ValueError(
            "the checkpoint is a delta and does not know where its base came from (the network was built in the "
            "program): give base=FOLDER_OR_HUB_NAME, or export the live module."
        )
    module, _, cls = record["class"].rpartition(".")
    network_class = getattr(importlib.import_module(module), cls)
    try:
        dtype = getattr(torch, record["dtype"].removeprefix("torch."))
        return network_class.from_pretrained(local(name), dtype=dtype).state_dict()
    except OSError as error:
        where = "base" if base else "the run's base"
        raise ValueError(f"{where}={name!r} cannot be loaded ({error}): give base=FOLDER_OR_HUB_NAME.") from error


def prefix_in(state: dict[str, Tensor], names: set[str]) -> str | None:
    """What stands before the network's own names in a module's state dict; `None` if they are not all there."""
    some = min(names, key=len)
    for key in state:
        if key == some or key.endswith(f".{some}"):
            prefix = key.removesuffix(some)
            if all(f"{prefix}{name}" in state for name in names):
                return prefix
    return None


def network_fingerprint(network: nn.Module) -> str:
    """A hash of every parameter's and buffer's name, shape and (a sample of) values, and of the config.

    At most 1,024 evenly spaced values a tensor: a training step changes nearly all of them.
    """
    made = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        values = tensor.detach().flatten()
        values = values[:: max(1, values.numel() // 1024)].cpu()
        values = values.double() if values.is_floating_point() else values.long()
        made.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        made.update(values.numpy().tobytes())
    return made.hexdigest()[:32]
