"""From a Lightning checkpoint, or a live module, to a folder that plain `peft` or transformers loads."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.merged import merged_state
from lightning_peft.network_record import (
    base_name,
    base_of,
    base_weights,
    empty_network,
    network_record,
    prefix_in,
    record_of_base,
)

__all__ = ["export", "network_record"]


def export(
    checkpoint: str | nn.Module,
    out: str,
    merge: bool = False,
    base: str | None = None,
    adapter_name: str | None = None,
    network: str | None = None,
) -> str:
    """Writes an adapter as a PEFT folder, or a network as a plain transformers folder.

    Without adapters the folder is the network's, with the base architecture's own keys. With adapters it is PEFT's
    (`peft.PeftModel.from_pretrained` loads it), or, with `merge`, the network's with the adapters folded in. Parts of
    the LightningModule outside of its network (auxiliary heads, metrics) are not written. Under FSDP2 or DDP call it on
    every rank: shards are gathered and rank 0 writes.

    Args:
        checkpoint: A Lightning checkpoint (a file, or a distributed one's folder), or a LightningModule.
        out: The folder; made if it is not there.
        merge: Fold the adapters into the weights; refused where that would change the network's answers.
        base: Folder or hub name of the base, where the checkpoint is a delta or holds no record of its network.
        adapter_name: Which adapter, where there are several; by default the only one.
        network: Name of the network in the module, where it holds more than one.

    Returns:
        The folder.

    Raises:
        ValueError: It cannot be written exactly; the message says why and what can be done.
        FileNotFoundError: There is no such checkpoint.
    """
    if isinstance(checkpoint, nn.Module):
        source, tokenizer = _of_module(checkpoint, network)
    else:
        source, tokenizer = _of_checkpoint(Path(checkpoint), base, network, merge, adapter_name)
    if source is None:
        return out  # another rank writes
    from lightning_peft.adapters.injection import configs_of

    adapters = list(configs_of(source))
    if adapter_name is not None and adapter_name not in adapters:
        raise ValueError(f"adapter_name={adapter_name!r}: the network has the adapters {adapters}.")
    if not adapters or merge:
        state = merged_state(source) if adapters else source.state_dict()
        plain = base_of(source)

        def write(folder: Path) -> None:
            write_network(plain, state, folder)
    else:
        if adapter_name is None and len(adapters) > 1:
            raise ValueError(f"the network has the adapters {adapters}: say which one to write with adapter_name.")

        def write(folder: Path) -> None:
            write_adapter(source, adapter_name or adapters[0], folder)

    def write_all(folder: Path) -> None:
        write(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    _whole_or_nothing(Path(out), write_all)
    return out


def _whole_or_nothing(out: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder beside `out`, whose files then take their places."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        write(unfinished)
        out.mkdir(exist_ok=True)
        for path in unfinished.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_adapter(network: nn.Module, adapter_name: str, folder: Path) -> None:
    """An adapter in PEFT's format.

    Args:
        network: The network with its adapters in place, or its `PeftModel`.
        adapter_name: Which one.
        folder: An existing folder.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    from lightning_peft.adapters.injection import adapter_holders

    network = adapter_holders(network)[adapter_name]
    config = copy.deepcopy(network.peft_config[adapter_name])
    state = get_peft_model_state_dict(network, adapter_name=adapter_name)
    if hasattr(config, "as_saved"):  # an adapter of ours that others know as an ordinary one
        config, state = config.as_saved(network, adapter_name, state)
    prefix = "" if isinstance(network, PeftModel) else "base_model.model."
    tensors = {f"{prefix}{name}": value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base = base_of(network)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    auto_mapping = None
    if config.task_type is None:
        from lightning_peft.network_record import own_class

        cls = own_class(base)
        auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping)


def write_network(network: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """A plain transformers folder.

    Args:
        network: A network of the class to write, from which config and generation config are taken; unchanged.
        state: Its state dict without adapters.
        folder: An existing folder.

    Raises:
        ValueError: It is no transformers network.
    """
    if not hasattr(network, "save_pretrained"):
        raise ValueError(f"{type(network).__name__} is no transformers network, so there is no folder format for it.")
    record = network_record(network, "")
    plain = empty_network(record)
    untied = _untied(network, state)
    if untied:
        # An adapter on one of two tied matrices: merged they differ, and a config that ties them would undo it.
        for config in (plain.config, plain.config.get_text_config()):
            config.tie_word_embeddings = False
        with torch.device("meta"):
            plain = type(plain)(plain.config)
    plain.load_state_dict(state, strict=True, assign=True)
    if not untied:
        plain.tie_weights()
    if getattr(network, "generation_config", None) is not None:
        plain.generation_config = network.generation_config
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    plain.config.dtype = dtype
    plain.save_pretrained(folder)


def _untied(network: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether weights that the network ties have come apart."""
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    return any(a in state and b in state and not torch.equal(state[a], state[b]) for a, b in tied.items())


# -- reading ----------------------------------------------------------------------------------------------------------


def _of_module(module: nn.Module, network: str | None) -> tuple[nn.Module | None, Any]:
    """The network inside a live module (rebuilt from gathered tensors where it is sharded), and its tokenizer."""
    from lightning_peft.adapters.injection import configs_of, network_name
    from lightning_peft.when_built import is_sharded

    path = network_name(module, network)
    found = module.get_submodule(path)
    tokenizer = getattr(module, "tokenizer", None)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if not is_sharded(found):
        return (found if rank == 0 else None), tokenizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(found, options=options)
    if rank != 0:
        return None, None
    configs = {name: (config, None) for name, config in configs_of(found).items()}
    return _rebuild(network_record(module, path), configs, state, {}), tokenizer


def _of_checkpoint(
    path: Path, base: str | None, network: str | None, merge: bool, adapter_name: str | None
) -> tuple[nn.Module, Any]:
    """The network that a checkpoint holds, and the tokenizer of the run."""
    checkpoint = _read(path)
    hyper = checkpoint.get("hyper_parameters", {})
    records, configs = _recorded(checkpoint)
    name = base or (hyper.get("model") if isinstance(hyper.get("model"), str) else None)
    state = {key.replace("._orig_mod", ""): value for key, value in checkpoint["state_dict"].items()}
    if not records:
        if name is None:
            raise ValueError(
                f"{path} does not say which network it holds: give base=FOLDER_OR_HUB_NAME of what it was trained from."
            )
        record = record_of_base(name, "")
        prefix = prefix_in(state, set(empty_network(record).state_dict()))
        if prefix is None:
            raise ValueError(f"{path} holds no {record['class']} whole, as base={name!r} has it.")
    else:
        record = next((r for r in records if network is None or r["path"] == network), records[0])
        prefix = f"{record['path']}." if record["path"] else ""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    left_out = checkpoint.get("delta", {}).get("left_out", {})
    left_out = {key.removeprefix(prefix): value for key, value in left_out.items() if key.startswith(prefix)}
    if left_out and (merge or not configs):
        own.update(_filled(record, base or name, left_out))
        left_out = {}
    built = _rebuild(record, configs, own, left_out)
    return built, _tokenizer(hyper.get("tokenizer") or name or record["name_or_path"])


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        loaded = _load_distributed_checkpoint(path)
        return loaded
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}.")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _recorded(checkpoint: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of networks in a checkpoint, and its adapters: name -> (config, JSON)."""
    from lightning_peft.adapters.configuration import from_json

    records, configs = [], {}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and "network" in state and "config" in state:
            records.append(json.loads(state["network"]))
            configs[state["adapter_name"]] = (from_json(state["config"]), state["config"])
    for record in (checkpoint.get("delta", {}).get("network"), checkpoint.get("network")):
        if record:
            records.append(json.loads(record))
    return records, configs


def _filled(record: dict[str, Any], base: str | None, left_out: dict[str, str]) -> dict[str, Tensor]:
    """What a delta leaves out, from the base, compared with what the run started from."""
    from lightning_peft.delta import digest

    weights = base_weights(record, base)
    filled = {}
    for name, expected in left_out.items():
        weight = weights.get(base_name(name))
        if weight is None or digest(weight) != expected:
            raise ValueError(
                f"the delta was trained on another base than {base or record['name_or_path']!r}: {base_name(name)} "
                f"{'is not in it' if weight is None else 'differs'}. Give base=FOLDER_OR_HUB_NAME of the right one."
            )
        filled[name] = weight
    return filled


def _rebuild(
    record: dict[str, Any], configs: dict[str, Any], state: dict[str, Tensor], left_out: dict[str, str]
) -> nn.Module:
    """The network of a record with its adapters and weights; weights in `left_out` stay on the meta device."""
    from lightning_peft.adapters.injection import adapter_holders, inject

    holder = nn.Module()
    holder.network = empty_network(record)
    for name, (config, _) in configs.items():
        blank = copy.deepcopy(config)
        # Starting values would be computed from the base's weights, which are not there, and are overwritten anyway.
        for argument, value in (("init_lora_weights", False), ("prompt_tuning_init", "RANDOM")):
            if hasattr(blank, argument):
                setattr(blank, argument, value)
        with torch.device("meta"):
            inject(holder, blank, name, "network")
        adapter_holders(holder.network)[name].peft_config[name] = copy.deepcopy(config)
    result = holder.network.load_state_dict(state, strict=False, assign=True)
    lost = set(result.missing_keys) - set(left_out)
    if lost or result.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit a {record['class']} with these adapters: it lacks {sorted(lost)[:3]} and "
            f"brings {sorted(result.unexpected_keys)[:3]}."
        )
    base_of(holder.network).__dict__.setdefault("name_or_path", record["name_or_path"])
    return holder.network


def _tokenizer(name: Any) -> Any:
    """The tokenizer of a name, `None` if there is none to be had."""
    if not isinstance(name, str) or not name:
        return None
    from lightning_peft.models.pretrained import load_tokenizer

    try:
        return load_tokenizer(name)
    except (OSError, ValueError):
        return None
