"""Half-reset: a random half of a fine-tuned model's weights set back to the pretrained ones (HFT, arXiv 2404.18466)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.half import choose_half
from lightning_peft.merging.streaming import SafetensorsFolder
from lightning_peft.roles import weights_by_role

State = str | nn.Module | Mapping[str, Tensor]


def half_reset(
    base: State,
    tuned: State,
    fraction: float = 0.5,
    seed: int = 0,
    granularity: str = "category",
) -> dict[str, Tensor]:
    """The fine-tuned weights with a balanced random share of the blocks' weights set back to the base's.

    The paper's pilot experiment: what was forgotten comes back with the half that is reset, while most of what was
    learnt stays in the other. The share is drawn as in `HalfFineTuning`; embeddings, head and what else is outside of
    the blocks stay as tuned.

    Args:
        base: The pretrained model: a network, a state dict, or a folder of safetensors.
        tuned: The model fine-tuned from it; all of its tensors are in the result, in its dtypes.
        fraction: Share that is reset, in (0, 1).
        seed: Seed of the draw.
        granularity: "category", "layer" (whole blocks) or "model" (matrices anywhere).

    Returns:
        A state dict; tensors that were not reset are those of `tuned`, not copies.

    Raises:
        ValueError: Arguments out of range, no blocks, or a weight that the base lacks or has in another shape.
    """
    pretrained, found = _tensors(base), _tensors(tuned)
    network = tuned if isinstance(tuned, nn.Module) else skeleton({name: t.shape for name, t in found.items()})
    chosen = choose_half(weights_by_role(network), fraction, seed, 0, granularity)
    differs = [name for name in sorted(chosen) if name not in pretrained or pretrained[name].shape != found[name].shape]
    if differs:
        raise ValueError(
            f"the base lacks {differs[:5]} or has them in another shape ({len(differs)} in all): give the model that "
            "this one was fine-tuned from."
        )
    return {
        name: pretrained[name].to(tensor, copy=True) if name in chosen else tensor for name, tensor in found.items()
    }


def _tensors(state: State) -> Mapping[str, Tensor]:
    if isinstance(state, str):
        return SafetensorsFolder(state)
    return state.state_dict() if isinstance(state, nn.Module) else state


def skeleton(shapes: Mapping[str, torch.Size]) -> nn.Module:
    """Modules without storage whose parameters have these names and shapes: enough to tell each one's role."""
    tree: dict[str, dict] = {}
    for name in shapes:
        level = tree
        for part in name.split(".")[:-1]:
            level = level.setdefault(part, {})

    def module(level: dict[str, dict]) -> nn.Module:
        made = nn.ModuleList() if level and all(key.isdigit() for key in level) else nn.Module()
        for key in sorted(level, key=lambda key: (len(key), key)) if isinstance(made, nn.ModuleList) else level:
            made.add_module(key, module(level[key]))
        return made

    root = module(tree)
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        empty = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        root.get_submodule(owner).register_parameter(leaf, empty)
    return root
