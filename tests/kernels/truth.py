"""The oracle of the kernels' tests: everything from whole logits by plain torch, in any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

INPUTS = ("hidden", "weight", "bias")
PER_ROW = ("nll", "lse", "entropy")
IGNORED = -100


@dataclass
class Problem:
    """Rows, a head and upstream gradients of nll, lse and entropy; `up` is used for the names in `upstream`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    upstream: tuple[str, ...] = ("nll",)

    def __post_init__(self):
        n = len(self.labels)
        self.up = dict(zip(PER_ROW, torch.randn(3, n, dtype=torch.float64)))  # of both signs
        if n > 2:
            self.up["nll"][1] = 0.0

    @property
    def settings(self) -> dict:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale}

    def leaves(self, trained: tuple[str, ...] = INPUTS, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        given = {name: getattr(self, name) for name in INPUTS}
        return {
            name: None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_(name in trained)
            for name, x in given.items()
        }

    def gradients(self, made: dict[str, Tensor], leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
        total = sum((made[name] * self.up[name].to(made[name].dtype)).sum() for name in self.upstream)
        wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()))))

    def plain(self, dtype: torch.dtype, trained: tuple[str, ...] = INPUTS) -> dict[str, Tensor]:
        """nll, lse, entropy, is_argmax and d_hidden, d_weight, d_bias with products in `dtype`."""
        leaves = self.leaves(trained, dtype)
        z = F.linear(leaves["hidden"], leaves["weight"], leaves["bias"]) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        z = z if dtype == torch.float64 else z.float()
        kept, log_p = self.labels != IGNORED, z.log_softmax(1)
        made = {
            "nll": F.cross_entropy(z, self.labels, reduction="none", ignore_index=IGNORED),
            "lse": torch.where(kept, z.logsumexp(1), 0.0),
            "entropy": torch.where(kept, -(log_p.exp() * log_p).sum(1), 0.0),
        }
        found = {f"d_{name}": grad for name, grad in self.gradients(made, leaves).items()}
        return {**{k: v.detach() for k, v in made.items()}, **found, "is_argmax": kept & (z.argmax(1) == self.labels)}


def make_problem(n=7, width=24, vocabulary=53, bias=False, dtype=torch.float32, spread=1.0, **settings) -> Problem:
    """Random rows of which the middle one is ignored; logits of about `spread` times +-5."""
    return Problem(
        torch.randn(n, width).mul_(spread).to(dtype),
        torch.randn(vocabulary, width).to(dtype),
        torch.randint(vocabulary, (n,)).index_fill(
            0, torch.tensor([n // 2] if n > 2 else [], dtype=torch.int64), IGNORED
        ),
        torch.randn(vocabulary).to(dtype) if bias else None,
        **settings,
    )


def no_worse(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype, size: float = 1.0
) -> None:
    """Every quantity is as near to the truth as plain torch's in this dtype, but for the luck of a few roundings.

    `size` is that of the numbers that were added up, if they are larger than the result.
    """
    epsilon = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]
    for name, exact in truth.items():
        if name not in ours or name == "is_argmax":
            continue
        assert ours[name].shape == exact.shape, name
        if exact.numel() == 0:
            continue
        error, allowed = ((x[name].double() - exact.double()).abs().max().item() for x in (ours, plain))
        bound = 1.5 * allowed + epsilon * max(size, exact.abs().max().item())
        assert error <= bound, f"{name}: {error:.3g} from the truth, plain torch {allowed:.3g}"
