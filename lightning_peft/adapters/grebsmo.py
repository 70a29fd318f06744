"""Where the trainable entries of a sparse update stand: GreBsmo's residual, the largest weights, or at random.

GreBsmo (greedy bilateral smoothing, Zhou and Tao 2013) writes a matrix as low-rank plus sparse plus a rest; DSEE (arXiv
2111.00160) lets a pretrained matrix's sparse part say which entries to train.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grebsmo(
    weight: Tensor,
    generator: torch.Generator,
    rounds: int = 100,
    steps: int = 2,
    growth: int = 5,
    threshold: float = 0.01,
) -> Tensor:
    """What a low-rank and a sparse part leave of W to each other: W - U V of the greedy bilateral decomposition.

    As in the authors' `run_glue_prune_with_WAB.py`: from rank 1, each round starts from S = 0, takes `steps` steps

        U = Q of QR((W - S) V^T),  V = U^T (W - S),  S = W - U V where that is at least the threshold, else 0,

    and appends the first `growth` rows of R of QR(W - U V - S) to V. They hold for matrices of 768 x 768, whose rank
    ends at 496; smaller ones would be fit exactly and leave nothing, so V stops at 0.65 of the shorter side (ours).
    Entries of S are those of W - U V, so the largest of either are the same.

    Args:
        weight: W [out, in].
        generator: Draws the start of V, on the CPU.
        rounds: Rounds at most.
        steps: Steps of a round.
        growth: Rows that a round adds to V.
        threshold: Entries of the residual below it are not S's.

    Returns:
        W - U V, [out, in].
    """
    w = weight if weight.dtype == torch.float64 else weight.float()
    v = torch.randn(1, w.shape[1], generator=generator).to(w)
    for _ in range(rounds):
        residual = torch.zeros_like(w)
        for _ in range(steps):
            rest = w - torch.where(residual.abs() < threshold, 0.0, residual)  # W - S
            u = torch.linalg.qr(rest @ v.T).Q
            v = u.T @ rest
            residual = w - u @ v
        if len(v) + growth > 0.65 * min(w.shape):
            break
        small = torch.where(residual.abs() < threshold, residual, 0.0)  # W - U V - S
        # The first rows of R need Q's first columns only, and these come from the first columns of what is factored.
        v = torch.cat([v, torch.linalg.qr(small[:, :growth]).Q.T @ small])
    return residual


def sparse_positions(weight: Tensor, n: int, method: str, seed: int = 0) -> Tensor:
    """Omega of one matrix, in ascending order.

    Args:
        weight: W [out, in].
        n: N, how many.
        method: "grebsmo", "random" or "magnitude".
        seed: Of what is random.

    Returns:
        Rows and columns, [2, n].

    Raises:
        ValueError: W has fewer entries.
    """
    if n > weight.numel():
        raise ValueError(f"num_sparse={n} and a matrix of shape {tuple(weight.shape)} has {weight.numel()} entries.")
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        flat = torch.randperm(weight.numel(), generator=generator)[:n]
    else:
        scores = grebsmo(weight, generator) if method == "grebsmo" else weight
        flat = scores.abs().flatten().topk(n).indices.cpu()
    flat = flat.sort().values
    return torch.stack([flat // weight.shape[1], flat % weight.shape[1]])
