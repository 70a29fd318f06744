"""Auxiliary prediction heads for any decoder: layers copied from the network, or Medusa blocks, and their file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.kernels import linear_cross_entropy
from lightning_peft.roles import transformer_blocks

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import TrunkState

IGNORED = -100
ARCHITECTURES = ("transformer", "linear")
HEAD_INPUTS = ("penultimate", "final")


class MedusaBlock(nn.Module):
    """x + SiLU(W x + b) with W and b zero at the start: an identity (Medusa; CAFT's `head_arch="linear"`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


class AuxiliaryHead(nn.Module):
    """One head: its layers and, if it has an output matrix of its own, that.

    Parameter names are those of the published `heads.pth` (`{k}.layers.{i}...`).
    """

    def __init__(self, layers: list[nn.Module], lm_head: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if lm_head is not None:
            self.lm_head = lm_head

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, *args, **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


class AuxiliaryHeads(nn.ModuleList):
    """n - 1 heads that predict tokens t+2 ... t+n beside the network's own (CAFT, arXiv 2506.07833).

    Args:
        network: A transformers decoder, without adapters.
        predicted_tokens: n; there are n - 1 heads.
        head_arch: "transformer" (decoder layers of the network's own class) or "linear" (Medusa blocks).
        head_layers: Layers per head.
        head_input: "penultimate" (the last block's input; the network's last block is then head 0) or "final".
        head_norm: Pass the heads' output through the network's own final norm.
        separate_unembedding: Give each head a copy of the output matrix instead of the shared one.
        copied_layer: The block that "transformer" heads start as; the published code takes the second to last.

    Raises:
        ValueError: An argument is out of range, or the network carries adapters.
    """

    def __init__(
        self,
        network: nn.Module,
        predicted_tokens: int = 5,
        head_arch: str = "transformer",
        head_layers: int = 1,
        head_input: str = "penultimate",
        head_norm: bool = True,
        separate_unembedding: bool = False,
        copied_layer: int = -2,
    ) -> None:
        if head_arch not in ARCHITECTURES:
            raise ValueError(f"head_arch={head_arch!r} is not known: use one of {ARCHITECTURES}.")
        if head_input not in HEAD_INPUTS:
            raise ValueError(f"head_input={head_input!r} is not known: use one of {HEAD_INPUTS}.")
        if head_layers < 1:
            raise ValueError(f"head_layers={head_layers} must be at least 1.")
        blocks = [block for _, block in transformer_blocks(network)]
        if not -len(blocks) <= copied_layer < len(blocks):
            raise ValueError(f"copied_layer={copied_layer}: the network has {len(blocks)} blocks.")
        source = blocks[copied_layer]
        if any("lora_" in name or "base_layer" in name for name, _ in source.named_parameters()):
            raise ValueError(
                "the network already carries adapters, which the heads would copy: give the bare network and add "
                "adapters with lightning_peft.callbacks.PEFT."
            )
        output = network.get_output_embeddings()
        width = network.get_input_embeddings().weight.shape[1]
        heads = []
        for _ in range(predicted_tokens - 1):
            if head_arch == "linear":
                layers: list[nn.Module] = [MedusaBlock(width).to(output.weight) for _ in range(head_layers)]
            else:
                # The copy keeps its source's layer index: heads never see a cache, and some attentions scale by it.
                layers = [copy.deepcopy(source) for _ in range(head_layers)]
            heads.append(AuxiliaryHead(layers, copy.deepcopy(output) if separate_unembedding else None))
        super().__init__(heads)
        self.separate_unembedding = separate_unembedding
        self.head_input, self.head_norm = head_input, head_norm
        self.description = {
            "heads": predicted_tokens - 1,
            "head_arch": head_arch,
            "head_layers": head_layers,
            "head_input": head_input,
            "head_norm": head_norm,
            "separate_unembedding": separate_unembedding,
            "base": described_base(network),
        }

    def forward(self, trunk: TrunkState, norm: nn.Module | None, labels: list[Tensor]) -> list[Tensor]:
        """Hidden states [batch, time, width] per head, or per-row nll where each head has its own output matrix.

        Args:
            trunk: What the network's last block was given; the heads' layers are called with the same masks.
            norm: The network's final norm, if the heads share it. Not a submodule: its weight is the network's.
            labels: For each head, the tokens its positions predict [batch, time], -100 where none.
        """
        start = trunk.penultimate if self.head_input == "penultimate" else trunk.final
        outputs = []
        for head, targets in zip(self, labels):
            hidden = head(start, *trunk.block_args, **trunk.block_kwargs)
            hidden = hidden if norm is None else norm(hidden)
            if self.separate_unembedding:
                chosen = targets.flatten()
                rows = hidden[:, -targets.shape[1] :].flatten(0, 1)
                own: Any = head.lm_head
                hidden = linear_cross_entropy(rows, own.weight, chosen, own.bias)
                hidden = hidden[chosen != IGNORED]
            outputs.append(hidden)
        return outputs


def head_labels(labels: Tensor, k: int, document_ids: Tensor | None = None) -> Tensor:
    """The token x_{t+1+k} that head k predicts at each t, [batch, time]; -100 past the row or in another document.

    Args:
        labels: Labels [batch, time], not shifted, -100 ignored.
        k: Head index, 0 being the network's own head.
        document_ids: Document of each position [batch, time] in packed rows.
    """
    shift = 1 + k
    shifted = labels.new_full(labels.shape, IGNORED)
    if shift >= labels.shape[1]:
        return shifted
    shifted[:, :-shift] = labels[:, shift:]
    if document_ids is not None:
        same = torch.zeros_like(shifted, dtype=torch.bool)
        same[:, :-shift] = document_ids[:, shift:] == document_ids[:, :-shift]
        shifted = shifted.masked_fill(~same, IGNORED)
    return shifted


def described_base(network: nn.Module) -> dict[str, Any]:
    """What a heads file says of its base, to refuse another: its kind, its sizes and a sample of its embedding."""
    import hashlib

    config = network.config.get_text_config()
    table = network.get_input_embeddings().weight.detach()
    sample = table[:: max(len(table) // 16, 1), :16].to("cpu", torch.bfloat16).float()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "embedding": hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16],
    }


def save_heads(heads: AuxiliaryHeads, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes the heads alone to one safetensors file, with what they are and whose; replaced in one move."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in (state_dict or heads.state_dict()).items()}
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"lightning_peft": json.dumps(heads.description)})
    unfinished.replace(path)


def load_heads(heads: AuxiliaryHeads, source: str, any_input: bool = False) -> None:
    """Fills `heads` from a file of `save_heads`, a folder that holds `heads.safetensors`, or a published `heads.pth`.

    Args:
        heads: Heads of the wanted shape.
        source: A file, a folder, or a hub name that holds `heads.pth`.
        any_input: Accept heads that were trained on another `head_input` or `head_norm` (`reproduce_repository`).

    Raises:
        ValueError: The file's heads are of another base, number, kind or size; the message names each difference.
    """
    path = _heads_file(source)
    described: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get("lightning_peft", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    free = ("head_input", "head_norm") if any_input else ()
    differing = [
        f"{key}: file has {value!r}, asked for {heads.description[key]!r}"
        for key, value in described.items()
        if key not in free and heads.description.get(key) != value
    ]
    own = heads.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    differing += [f"missing {missing[:3]}..."] if missing else []
    differing += [f"unknown {extra[:3]}..."] if extra else []
    differing += [f"{n}: file has {tuple(tensors[n].shape)}, network {tuple(own[n].shape)}" for n in shapes[:3]]
    if differing:
        raise ValueError(
            f"the heads in {source!r} do not fit this network and these arguments: " + "; ".join(differing)
        )
    heads.load_state_dict(tensors)


def _heads_file(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / "heads.safetensors"
    if path.is_file():
        return path
    if path.suffix in (".pth", ".safetensors") or source.count("/") != 1:
        raise ValueError(f"heads={source!r}: no such file. Give a file, a folder with heads.safetensors or a hub name.")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, "heads.pth"))
