"""Random projections from d numbers to a weight's D, made from a seed: Fastfood (Le et al. 2013), and a dense one.

    P = S H G Pi H B / sqrt(D),   blocks of n outputs each, n the next power of two of d

with H the Walsh-Hadamard matrix of size n, B random signs, Pi a random permutation, G Gaussian numbers, and for each
block S = 1 / ||G||, so that P keeps lengths: ||P z|| is ||z|| in expectation. It takes O(D log d) operations and
7 bytes for each of the D outputs whatever d is (signs, Gaussian numbers of half precision, the permutation).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

DENSE_LIMIT = 10**8  # numbers in a dense projection


def walsh_hadamard_(x: Tensor) -> Tensor:
    """x H along the last dimension, in place; H is symmetric, in Sylvester's order and not normalised (H H = n I).

    Args:
        x: [..., n], contiguous, n a power of two.

    Raises:
        ValueError: n is not a power of two, or x cannot be changed in place.
    """
    n = x.shape[-1]
    if n & (n - 1) or not x.is_contiguous():
        raise ValueError(f"a Walsh-Hadamard transform needs contiguous rows of a power of two, not {tuple(x.shape)}.")
    half = 1
    while half < n:
        first, second = x.view(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)
        first.add_(second)  # a + b
        second.mul_(-2).add_(first)  # a - b
        half *= 2
    return x


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for one weight, on the CPU: the same on every rank, device and in every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Fastfood:
    """A projection from d numbers to D.

    Args:
        d: Numbers that are projected.
        size: D.
        seed: Seed, the same for all weights of a network.
        name: The weight's name.
    """

    def __init__(self, d: int, size: int, seed: int, name: str) -> None:
        self.d, self.size = d, size
        self.n = 1 << max(0, (d - 1).bit_length())
        blocks = math.ceil(size / self.n)
        drawn = generator(seed, name)
        self.signs = torch.randint(0, 2, (blocks, self.n), generator=drawn, dtype=torch.int8).mul_(2).sub_(1)
        self.gaussian = torch.randn(blocks, self.n, generator=drawn).half()
        self.permutation = torch.rand(blocks, self.n, generator=drawn).argsort(dim=1).int()
        # S, and lengths over all D outputs
        length = self.gaussian.float().norm(dim=1, keepdim=True).clamp_min(1e-8)  # a block of one may be 0
        self.scale = 1 / (length * math.sqrt(size))

    def to(self, device: torch.device) -> Fastfood:
        """On a device, in place."""
        for name in ("signs", "gaussian", "permutation", "scale"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def __call__(self, z: Tensor) -> Tensor:
        """P z, [D] in fp32."""
        padded = torch.nn.functional.pad(z.detach().float(), (0, self.n - self.d))
        x = walsh_hadamard_(padded * self.signs)
        x = x.gather(1, self.permutation.long()).mul_(self.gaussian)
        return walsh_hadamard_(x).mul_(self.scale).flatten()[: self.size]

    def transposed(self, g: Tensor) -> Tensor:
        """P^T g, [d] in fp32, for g [D]."""
        padded = torch.nn.functional.pad(g.detach().float(), (0, self.signs.numel() - self.size))
        x = walsh_hadamard_(padded.view_as(self.signs) * self.scale).mul_(self.gaussian)
        x = torch.empty_like(x).scatter_(1, self.permutation.long(), x)
        return walsh_hadamard_(x).mul_(self.signs).sum(0)[: self.d]


class Dense:
    """The same with a matrix of Gaussian numbers [D, d], for small sizes.

    Args:
        d: Numbers that are projected.
        size: D.
        seed: Seed.
        name: The weight's name.

    Raises:
        ValueError: The matrix would be too large.
    """

    def __init__(self, d: int, size: int, seed: int, name: str) -> None:
        if d * size > DENSE_LIMIT:
            raise ValueError(
                f"a dense projection of {name} from {d} to {size} numbers is {d * size:,} numbers large: use "
                "projection='fastfood'."
            )
        self.d, self.size = d, size
        self.matrix = torch.randn(size, d, generator=generator(seed, name)) / math.sqrt(size)

    def to(self, device: torch.device) -> Dense:
        """On a device, in place."""
        self.matrix = self.matrix.to(device)
        return self

    def __call__(self, z: Tensor) -> Tensor:
        """P z, [D] in fp32."""
        return self.matrix @ z.detach().float()

    def transposed(self, g: Tensor) -> Tensor:
        """P^T g, [d] in fp32, for g [D]."""
        return g.detach().float() @ self.matrix


PROJECTIONS: dict[str, Any] = {"fastfood": Fastfood, "dense": Dense}
