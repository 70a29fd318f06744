"""Files of scores: named tensors, with what they were made of and the network that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.network_record import network_fingerprint


def save_scores(
    path: str | Path, scores: Mapping[str, Tensor], network: nn.Module, method: str, **settings: Any
) -> Path:
    """Writes scores as safetensors; an unfinished file never has the name.

    Args:
        path: The file.
        scores: By name, such as that of the weight they are about.
        network: The network they were made with; its fingerprint goes with them.
        method: What made them.
        **settings: With what: JSON values.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    provenance = {"method": method, "network": network_fingerprint(network), **settings}
    tensors = {name: value.detach().cpu().contiguous() for name, value in scores.items()}
    save_file(tensors, unfinished, {"provenance": json.dumps(provenance, sort_keys=True)})
    unfinished.replace(path)
    return path


def load_scores(path: str | Path, network: nn.Module | None, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scores by name and what they were made of.

    Args:
        path: The file.
        network: The network that they must have been made with, to the value; `None` to take them on trust.
        method: What must have made them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds other scores, or another network's.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"scores={str(path)!r}: there is no such file; `lightning-peft select` makes one.")
    with safe_open(path, "pt") as file:
        provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
        scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, no dictionary)
    if provenance.get("method") != method:
        raise ValueError(f"{path} holds scores of {provenance.get('method', 'something else')!r}, not of {method!r}.")
    if network is not None and provenance["network"] != network_fingerprint(network):
        raise ValueError(
            f"{path} was made with another network, or with this one before it was trained: make scores of this one "
            f"by `lightning-peft select --method {method}`."
        )
    return scores, provenance
