"""Folders of safetensors: read tensor by tensor by memory map, written tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
#: As safetensors names them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a model's folder by name, in the order in which they lie in its files.

    A tensor is mapped from disk when it is asked for and gone with its last reference; no more than one file is open.

    Args:
        folder: A folder with `model.safetensors`, or with shards and their index.

    Raises:
        ValueError: There are no safetensors in it, a shard is missing, or the model is quantised.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.aliases: dict[str, str] = {}  # name -> the tensor of this folder that stands for it
        self._open: tuple[Path, Any] | None = None
        if (self.folder / INDEX).is_file():
            index = json.loads((self.folder / INDEX).read_text())["weight_map"]
        elif (self.folder / SINGLE).is_file():
            index = dict.fromkeys(self._file(self.folder / SINGLE).keys(), SINGLE)
        else:
            raise ValueError(
                f"{str(folder)!r} has neither {SINGLE} nor {INDEX}: give the folder of a model as save_pretrained "
                "writes it. An adapter has to be merged into its base first (lightning-peft export --merge true)."
            )
        if "quantization_config" in self.config:
            raise ValueError(f"{str(folder)!r} is quantised, and codes cannot be averaged: give the model unquantised.")
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(index.values())):
            if not (self.folder / file).is_file():
                raise ValueError(f"{str(folder)!r} lacks {file}, which its {INDEX} names: fetch the model again.")
            opened = self._file(self.folder / file)
            for name in opened.offset_keys():
                if index.get(name) == file:
                    self._places[name] = self.folder / file
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        if absent := sorted(index.keys() - self._places.keys()):
            raise ValueError(
                f"{str(folder)!r} lacks the tensors {absent} that its {INDEX} names: fetch the model again."
            )

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`, empty where there is none."""
        path = self.folder / "config.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        code = self._file(self._places[name]).get_slice(name).get_dtype()
        return next((dtype for dtype, other in DTYPES.items() if other == code), None) or self[name].dtype

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, "pt"))
        return self._open[1]

    def __getitem__(self, name: str) -> Tensor:
        name = self.aliases.get(name, name)
        return self._file(self._places[name]).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._places, *self.aliases])

    def __len__(self) -> int:
        return len(self._places) + len(self.aliases)


def write_folder(
    tensors: Iterable[Tensor],
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    out: str | Path,
    copied_from: str | Path,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes tensors as they come, and the small files of `copied_from` (config, tokenizer) beside them.

    All goes to a temporary sibling, the index last, is flushed to disk, and is moved in place: a kill leaves what was
    there before, or for the instant between two renames nothing, but never half a model or a mixed one.

    Args:
        tensors: The tensors in the layout's order; no more than one is held.
        layout: Name -> (shape, dtype) of all of them.
        out: The folder; a model that is there is replaced when the new one is whole.
        copied_from: A model's folder.
        shard_bytes: Size of a shard at most, but for a single larger tensor.

    Raises:
        ValueError: `out` holds something else than a model, or a tensor is not as laid out.
    """
    out = Path(out).absolute()
    refuse_other_content(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.unfinished-"
    for left in out.parent.glob(f"{prefix}*"):
        warnings.warn(f"{left} is what a merge that was stopped has left: it can be removed.", stacklevel=2)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        unfinished.chmod(0o755)
        for path in sorted(Path(copied_from).iterdir()):
            if path.is_file() and path.suffix not in WEIGHTS and path.name != INDEX:
                shutil.copy2(path, unfinished / path.name)
        _set_dtype(unfinished / "config.json", layout)
        _write_shards(iter(tensors), layout, unfinished, shard_bytes)
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        _replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_other_content(out: Path) -> None:
    """Raises `ValueError` where writing a model to `out` would remove anything but a model."""
    if not out.exists():
        return
    inside = list(out.iterdir()) if out.is_dir() else []
    is_model = {SINGLE, INDEX} & {path.name for path in inside} and not any(path.is_dir() for path in inside)
    if out.is_symlink() or not out.is_dir() or (inside and not is_model):
        raise ValueError(f"{str(out)!r} is there and is no folder of a model alone: give a new or an empty folder.")


def _shards(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, (shape, dtype) in layout.items():
        size = _bytes(shape, dtype)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write_shards(
    tensors: Iterator[Tensor],
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    folder: Path,
    shard_bytes: int,
) -> None:
    # safetensors' own writer wants a whole file's tensors at once; the format is a header and the bytes in its order.
    shards = _shards(layout, shard_bytes)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Wider dtypes lie first, so that every tensor starts at a multiple of its own size and can be mapped.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name in sorted(names, key=lambda name: -layout[name][1].itemsize):
            shape, dtype = layout[name]
            places[name], end = end, end + _bytes(shape, dtype)
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(folder / file, "wb") as opened:
            opened.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                tensor = next(tensors)
                if (tuple(tensor.shape), tensor.dtype) != layout[name]:
                    raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, and laid out as {layout[name]}.")
                opened.seek(8 + len(encoded) + places[name])
                opened.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        weight_map.update(dict.fromkeys(names, file))
        total += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(config: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Lets the config name the dtype in which the weights are stored: it is what `dtype="auto"` loads them in."""
    stored = {dtype for _, dtype in layout.values() if dtype.is_floating_point}
    if not config.is_file() or len(stored) != 1:
        return
    values, name = json.loads(config.read_text()), str(stored.pop()).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if values.get(key, name) != name:
            values[key] = name
            config.write_text(json.dumps(values, indent=2) + "\n")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(new: Path, old: Path) -> None:
    if not old.exists():
        new.rename(old)
        _flush(old.parent)
        return
    aside = old.with_name(f"{new.name}-replaced")
    old.rename(aside)  # a folder that is not empty cannot be renamed over
    new.rename(old)
    _flush(old.parent)
    shutil.rmtree(aside)
