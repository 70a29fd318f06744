"""Fastfood: the transform against SciPy's Hadamard matrix, the projection as a matrix, lengths, seeds, memory."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import hadamard

from lightning_peft.fastfood import Dense, Fastfood, walsh_hadamard_
from tests.processes import call_in_child


@pytest.mark.parametrize("n", [1, 2, 8, 256])
def test_the_transform_is_scipys_hadamard_matrix(n):
    x = torch.randn(3, 2, n, dtype=torch.float64)
    matrix = torch.from_numpy(hadamard(n)).double()
    torch.testing.assert_close(walsh_hadamard_(x.clone()), x @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(walsh_hadamard_(walsh_hadamard_(x.clone())), n * x, rtol=1e-12, atol=1e-12)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard_(torch.randn(3, 6))
    with pytest.raises(ValueError, match="contiguous"):
        walsh_hadamard_(torch.randn(4, 3).t())


def matrix_of(made: Fastfood) -> torch.Tensor:
    """[D, d] by the factors, each as a matrix."""
    h = torch.from_numpy(hadamard(made.n)).double()
    blocks = []
    for signs, gaussian, permutation, scale in zip(
        made.signs, made.gaussian, made.permutation, made.scale, strict=True
    ):
        pi = torch.eye(made.n, dtype=torch.float64)[permutation.long()]
        blocks.append(float(scale) * h @ torch.diag(gaussian.double()) @ pi @ h @ torch.diag(signs.double()))
    return torch.cat(blocks)[: made.size, : made.d]


@pytest.mark.parametrize(("d", "size"), [(5, 37), (8, 8), (16, 3), (1, 4), (7, 100)])
def test_projection_and_transpose_are_the_products_of_the_factors(d, size):
    made = Fastfood(d, size, seed=3, name="w")
    expected = matrix_of(made)
    z, g = torch.randn(d), torch.randn(size)
    torch.testing.assert_close(made(z).double(), expected @ z.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.transposed(g).double(), expected.T @ g.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Fastfood, Dense])
def test_lengths_and_right_angles_are_kept_in_expectation(kind):
    """Columns have length 1 within 5 % over draws, and are orthogonal on average."""
    products = torch.stack(
        [
            torch.stack([made(column) for column in torch.eye(6)]) @ torch.stack([made(c) for c in torch.eye(6)]).T
            for made in (kind(6, 1500, seed, "w") for seed in range(40))
        ]
    )
    lengths = products.diagonal(dim1=1, dim2=2)
    assert float((lengths.mean(0).sqrt() - 1).abs().max()) < 0.05
    between = products.mean(0) - torch.diag(products.mean(0).diagonal())
    assert float(between.abs().max()) < 0.03


def test_entries_are_gaussian():
    """As of a dense projection: by kurtosis, 3 (of random signs it would be 1)."""
    x = torch.cat(
        [Fastfood(64, 4096, seed, "w")(torch.nn.functional.one_hot(torch.tensor(5), 64)) for seed in range(8)]
    )
    x = x * math.sqrt(4096)
    assert float(x.var()) == pytest.approx(1, abs=0.05)
    assert float((x**4).mean()) == pytest.approx(3, abs=0.3)


def made_elsewhere() -> torch.Tensor:
    return Fastfood(10, 70, seed=4, name="layers.1.weight")(torch.arange(10.0))


def test_the_same_everywhere_and_other_for_other_weights_and_seeds():
    torch.manual_seed(77)
    own = made_elsewhere()
    _, other = call_in_child(made_elsewhere)
    assert torch.equal(own, other)
    assert not torch.equal(own, Fastfood(10, 70, seed=5, name="layers.1.weight")(torch.arange(10.0)))
    assert not torch.equal(own, Fastfood(10, 70, seed=4, name="layers.2.weight")(torch.arange(10.0)))


def test_memory_does_not_grow_with_d():
    def held(d: int) -> int:
        made = Fastfood(d, 2**16, seed=0, name="w")
        return sum(t.numel() * t.element_size() for t in vars(made).values() if isinstance(t, torch.Tensor))

    assert held(2**12) < 1.05 * held(2**6)
    with pytest.raises(ValueError, match=r"use projection='fastfood'"):
        Dense(20_000, 20_000, 0, "w")


def test_one_number_projects_to_finite_weights():
    """Blocks of one: a Gaussian number that rounds to 0 in half precision has no length to divide by."""
    made = [Fastfood(1, 500_000, seed, "w") for seed in range(3)]
    assert any(bool((p.gaussian == 0).any()) for p in made)
    assert all(bool(p(torch.ones(1)).isfinite().all()) for p in made)
