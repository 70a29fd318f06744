"""Delta checkpoints: a Lightning checkpoint without the base's weights that never changed.

A delta carries names and shapes of what it holds and a digest of every weight that it leaves out. Before anything is
loaded the module is compared with these: a delta of one layer's adapter does not go into a network adapted elsewhere,
nor onto another base, whatever `strict_loading` says (FINDINGS, 9 and 10).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

FORMAT = 1
#: Parts of a checkpoint that hold weights by name; the second is Lightning's WeightAveraging's.
STATES = ("state_dict", "current_model_state")


def digest(tensor: Tensor) -> str:
    """128 bits over dtype, shape and every byte; of a sharded tensor as a whole (a collective call)."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    tensor = tensor.cpu().contiguous()
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return xxhash.xxh3_128(head + b"\0").hexdigest()[:8] + xxhash.xxh3_128(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' own (PEFT's adapters around one have the same class names)."""
    return type(layer).__module__.startswith("bitsandbytes.") and hasattr(layer, "weight")


def _quantised(module: nn.Module) -> dict[str, str]:
    """Name of each weight held in 4 or 8 bits -> digest of the weight it was made from, or of its packed form."""
    found = {}
    for name, part in module.named_modules():
        if is_packed(part):
            found[f"{name}.weight"] = part.__dict__.get("source_digest") or digest(part.weight)
    return found


def base_digests(module: nn.Module, quantised_only: bool = False) -> dict[str, str]:
    """Digest of each frozen weight, by its name in the state dict: what a delta may leave out while it is unchanged.

    Weights that an adapter's injection wrote into (PiSSA, KaSA) are not among them, nor the originals of modules that
    train whole.

    Raises:
        RuntimeError: The weights are not there yet (meta device).
    """
    digests = _quantised(module)
    if quantised_only:
        return digests
    changed = set()
    for path, part in module.named_modules():
        changed |= {f"{path}.{name}" for name in part.__dict__.get("_lightning_peft_changed", ())}
        if path.endswith("original_module"):  # of a task's head, often drawn anew by every process: never left out
            changed |= {f"{path}.{name}" for name, _ in part.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or name in digests or name in changed:
            continue
        if parameter.is_meta:
            raise RuntimeError(
                f"a delta needs the base's weights when training starts, and {name} has none (meta device): load them "
                "before, or use Lightning's ModelCheckpoint, which keeps everything."
            )
        digests[name] = digest(parameter)
    return digests


def make_delta(checkpoint: dict[str, Any], base: dict[str, str], module: nn.Module, source: str = "") -> None:
    """Takes out of a checkpoint, in place, every weight that still equals the base.

    Args:
        checkpoint: What Lightning is about to write. On ranks that write nothing its state dict is empty.
        base: What `base_digests` gave before training.
        module: The LightningModule.
        source: Name of the base (hub name or folder), for error messages and `export`.
    """
    state = checkpoint.get("state_dict")
    if not state:
        return
    quantised = _quantised(module)
    left_out = {
        name: value
        for name, value in base.items()
        if name in quantised or (name in state and digest(state[name]) == value)
    }
    extras = tuple(f"{name}." for name in quantised)  # absmax, quant_map, quant_state, ...
    for part in STATES:
        if part in checkpoint:
            checkpoint[part] = {
                name: value
                for name, value in checkpoint[part].items()
                if name not in left_out and not name.startswith(extras)
            }
    earlier = checkpoint.get("delta", {}).get("left_out", {})
    checkpoint["delta"] = {
        "format": FORMAT,
        "shapes": {
            name: list(value.shape) for name, value in checkpoint["state_dict"].items() if hasattr(value, "shape")
        },
        "left_out": {**earlier, **left_out},
        "source": source,
    }


def check_delta(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Compares a delta with the module it is about to be loaded into.

    Raises:
        ValueError: Names or shapes differ, or the module's base is not the one that the delta was trained on.
    """
    record = checkpoint["delta"]
    if record["format"] > FORMAT:
        raise ValueError(f"this delta has format {record['format']}; this version of lightning_peft reads {FORMAT}.")
    quantised = _quantised(module)
    extras = tuple(f"{name}." for name in quantised)
    own = {n: v for n, v in module.state_dict().items() if not n.startswith(extras) and isinstance(v, Tensor)}
    saved, left_out = record["shapes"], record["left_out"]
    lost = set(saved) - set(checkpoint["state_dict"])
    missing, unknown = set(own) - set(saved) - set(left_out), set(saved) - set(own)
    if lost or missing or unknown:
        raise ValueError(
            "the delta checkpoint is of another model: "
            + "; ".join(
                f"{text} {_few(names)}"
                for text, names in (
                    ("it lacks weights that it names itself:", lost),
                    ("this model has weights that are not in it:", missing),
                    ("it has weights that this model lacks:", unknown),
                )
                if names
            )
            + ". Use the same adapters and modules as in the run that wrote it."
        )
    for name, shape in saved.items():
        if list(own[name].shape) != shape:
            raise ValueError(f"the delta checkpoint holds {name} as {shape} and this model as {list(own[name].shape)}.")
    other = [n for n, v in left_out.items() if n not in own or (quantised.get(n) or digest(own[n])) != v]
    if other:
        source = f" ({record['source']})" if record["source"] else ""
        raise ValueError(
            f"the delta checkpoint was trained on another base{source}: {len(other)} of the {len(left_out)} weights it "
            f"leaves out differ here: {_few(other)}. Start from the same weights, held in the same dtype, that the run "
            "started from (weights that were trained since are not: build the module anew)."
        )


def _few(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f", ... ({len(ordered)} in all)" if len(ordered) > 3 else "")


def complete(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Checks a delta and fills in, in place, what it leaves out, so that any strict loading takes it.

    A checkpoint that is no delta stays as it is.

    Raises:
        ValueError: See `check_delta`.
    """
    if "delta" not in checkpoint:
        return
    check_delta(checkpoint, module)
    own = module.state_dict()
    for part in STATES:
        if part in checkpoint:
            filled = {name: own[name] for name in checkpoint["delta"]["left_out"]}
            checkpoint[part] = {**filled, **checkpoint[part]}


def read_record(path: Any) -> dict[str, Any] | None:
    """The delta record of a checkpoint file, its tensors not read; `None` for any other checkpoint."""
    if not Path(str(path)).is_file():
        return None
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True).get("delta")


def load_delta(module: nn.Module, path: str | Path) -> None:
    """Loads the weights of a Lightning checkpoint, delta or not, into a module whose adapters are in place.

    Args:
        module: The LightningModule, built on the same base, after `PEFT(...).attach(module)`.
        path: The checkpoint.

    Raises:
        ValueError: See `check_delta`.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    complete(checkpoint, module)
    module.load_state_dict(checkpoint["state_dict"])


def check_on_load(trainer: Any) -> None:
    """Lets the trainer's strategy compare and complete every delta that it loads. Calling it again changes nothing."""
    strategy = trainer.strategy
    if "load_checkpoint" in strategy.__dict__:
        return
    original = strategy.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        module = trainer.lightning_module
        if not strategy.restore_checkpoint_after_setup:
            checkpoint = original(checkpoint_path, *args, **kwargs)
            complete(checkpoint, module)
            return checkpoint
        # ModelParallelStrategy loads the weights inside this very call: compare first, from the file's own names.
        if read_record(checkpoint_path) is None:
            return original(checkpoint_path, *args, **kwargs)
        file = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)
        check_delta(file, module)
        strict, module.strict_loading = module.strict_loading, False
        try:
            return original(checkpoint_path, *args, **kwargs)
        finally:
            module.strict_loading = strict

    strategy.load_checkpoint = load_checkpoint
