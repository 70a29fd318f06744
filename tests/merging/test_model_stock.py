"""Model Stock per tensor: closed forms, invariances, precision."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from lightning_peft.merging import interpolation_ratio, model_stock, model_stock_tensor
from lightning_peft.merging import model_stock as function
from lightning_peft.merging.model_stock import inner_products


def at_angle(degrees: float, lengths=(1.0, 3.0), shape=(4, 8)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """theta0 and two models whose deltas are at an angle, in fp64."""
    a, b = torch.linalg.qr(torch.randn(math.prod(shape), 2, dtype=torch.float64)).Q.T
    radians = math.radians(degrees)
    deltas = [lengths[0] * a, lengths[1] * (math.cos(radians) * a + math.sin(radians) * b)]
    theta0 = torch.randn(shape, dtype=torch.float64)
    return theta0, [theta0 + delta.reshape(shape) for delta in deltas]


@pytest.mark.parametrize(
    ("degrees", "t"), [(0, 1.0), (60, 2 / 3), (90, 0.0), (45, 2 * math.sqrt(0.5) / (1 + math.sqrt(0.5))), (120, -2.0)]
)
def test_two_models_at_an_angle(degrees, t):
    theta0, (one, two) = at_angle(degrees)
    expected = theta0 + t * ((one + two) / 2 - theta0)
    torch.testing.assert_close(model_stock_tensor(theta0, [one, two]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("cos", [0.0, 0.3, 0.9, 1.0])
def test_n_models_with_the_same_angle_between_any_two(n, cos):
    gram = torch.full((n, n), cos, dtype=torch.float64).fill_diagonal_(1.0)
    deltas = torch.zeros(n, 16, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    deltas[:, :n] = vectors * values.clamp(min=0).sqrt()  # deltas @ deltas.T = gram
    theta0 = torch.randn(16, dtype=torch.float64)
    expected = theta0 + n * cos / (1 + (n - 1) * cos) * deltas.mean(0)
    for pairwise in ("cos", "angle"):
        merged = model_stock_tensor(theta0, list(theta0 + deltas), pairwise=pairwise)
        torch.testing.assert_close(merged, expected, atol=1e-7, rtol=0)


def test_pairwise_means_differ_for_unequal_angles():
    dots = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # angles 0, 90, 90
    for pairwise, cos in (("cos", 1 / 3), ("angle", math.cos(math.radians(60)))):
        assert interpolation_ratio(dots, pairwise).item() == pytest.approx(3 * cos / (1 + 2 * cos), abs=1e-7)


def test_identical_models_are_themselves():
    theta0, theta = torch.randn(5, 7), torch.randn(5, 7)
    for n in (2, 3, 4):
        for filter_wise in (False, True):
            assert torch.equal(model_stock_tensor(theta0, [theta] * n, filter_wise), theta)


def test_orthogonal_zero_and_cancelling_deltas_give_the_base():
    theta0 = torch.randn(2, 4)
    one, two = torch.zeros(2, 4), torch.zeros(2, 4)
    one[0, 0], two[1, 2] = 0.5, -2.0
    zero = torch.zeros(2, 4)
    cases = [[one, two], [zero, zero], [zero, one], [one, -one]]
    for deltas in cases:
        for filter_wise in (False, True):
            merged = model_stock_tensor(theta0, [theta0 + delta for delta in deltas], filter_wise)
            torch.testing.assert_close(merged, theta0, atol=1e-6, rtol=0)
    assert torch.equal(model_stock_tensor(theta0, [theta0, theta0]), theta0)  # to the bit, not NaN


def test_a_model_that_left_the_tensor_alone_counts_as_orthogonal():
    theta0, one = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    merged = model_stock_tensor(theta0, [one, one, theta0])
    torch.testing.assert_close(merged, 3 * (1 / 3) / (1 + 2 / 3) * (2 * one / 3))  # cos = (1 + 0 + 0) / 3


@pytest.mark.parametrize("filter_wise", [False, True])
def test_order_of_models_changes_nothing(filter_wise):
    theta0, models = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(4)]
    one = model_stock_tensor(theta0, models, filter_wise)
    torch.testing.assert_close(model_stock_tensor(theta0, models[::-1], filter_wise), one, atol=1e-6, rtol=0)
    two = model_stock_tensor(theta0, models[:2], filter_wise)
    assert torch.equal(model_stock_tensor(theta0, models[1::-1], filter_wise), two)


def test_filter_wise_is_each_row_on_its_own():
    theta0, models = torch.randn(2, 3, 5), [torch.randn(2, 3, 5) for _ in range(3)]
    merged = model_stock_tensor(theta0, models, filter_wise=True)
    for i in range(2):
        for j in range(3):
            row = model_stock_tensor(theta0[i, j], [model[i, j] for model in models])
            torch.testing.assert_close(merged[i, j], row)
    flat = model_stock_tensor(theta0[0, 0], [m[0, 0] for m in models], filter_wise=True)
    torch.testing.assert_close(flat, merged[0, 0])  # a 1-D tensor is one row
    assert not torch.allclose(merged, model_stock_tensor(theta0, models))


def test_clamp_keeps_t_between_the_base_and_the_average():
    theta0, models = at_angle(120)
    assert interpolation_ratio(inner_products(theta0, models)).item() == pytest.approx(-2)
    torch.testing.assert_close(model_stock_tensor(theta0, models, clamp=True), theta0)


def test_small_deltas_keep_their_angle_unless_mergekit_s_bound_is_asked_for():
    theta0 = torch.zeros(8, dtype=torch.float32)
    delta = torch.randn(8) * 1e-25  # the square of it is no fp32 number
    torch.testing.assert_close(model_stock_tensor(theta0, [delta, delta]), delta, atol=0, rtol=1e-5)
    shrunk = model_stock_tensor(theta0, [delta, delta], compat="mergekit")
    assert shrunk.abs().max() < delta.abs().max() * 1e-6


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_storage_is_the_fp64_result_rounded(dtype, filter_wise):
    theta0 = torch.randn(64, 96).to(dtype)
    models = [(theta0.double() + 0.02 * torch.randn(64, 96)).to(dtype) for _ in range(3)]
    shared = 0.02 * torch.randn(64, 96, dtype=torch.float64)
    models = [(model.double() + shared).to(dtype) for model in models]
    exact = model_stock_tensor(theta0.double(), [m.double() for m in models], filter_wise)
    merged = model_stock_tensor(theta0, models, filter_wise)
    assert merged.dtype == dtype
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    assert ((merged.double() - exact).abs() <= 0.51 * ulp).all()  # correctly rounded, but for ties
    wide = model_stock_tensor(theta0, models, filter_wise, dtype=torch.float32)
    torch.testing.assert_close(wide.double(), exact, atol=1e-6, rtol=1e-6)  # asked for: no rounding in between


@pytest.mark.parametrize("filter_wise", [False, True])
def test_chunks_change_nothing(monkeypatch, filter_wise):
    theta0, models = torch.randn(7, 11), [torch.randn(7, 11).T.contiguous().T for _ in range(2)]
    whole = model_stock_tensor(theta0, models, filter_wise)
    monkeypatch.setattr(sys.modules["lightning_peft.merging.model_stock"], "CHUNK", 10)
    torch.testing.assert_close(model_stock_tensor(theta0, models, filter_wise), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0)])
def test_odd_shapes(shape, filter_wise):
    theta0, theta = torch.randn(shape), torch.randn(shape)
    merged = model_stock_tensor(theta0, [theta, theta], filter_wise)
    assert merged.shape == theta0.shape
    torch.testing.assert_close(merged, theta, atol=1e-6, rtol=0)


def test_state_dicts_share_what_the_base_shares():
    matrix, models = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(2)]
    counter = torch.tensor(7)
    base = {"embed": matrix, "head": matrix, "norm": torch.ones(3), "steps": counter}
    tuned = [{"embed": m, "head": m, "norm": torch.ones(3), "steps": torch.tensor(9)} for m in models]
    merged = model_stock(base, tuned)
    assert list(merged) == list(base)
    assert merged["head"].data_ptr() == merged["embed"].data_ptr()
    assert merged["steps"] == 7
    torch.testing.assert_close(merged["embed"], model_stock_tensor(matrix, models))
    untied = [{**tuned[0]}, {**tuned[1], "head": models[1] + 1}]
    assert not torch.equal((again := model_stock(base, untied))["head"], again["embed"])


def test_refuses():
    one = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"at least two.*got 1: fine-tune"):
        model_stock(one, [one])
    with pytest.raises(ValueError, match=r"pairwise='median'.*cos"):
        model_stock(one, [one, one], pairwise="median")
    with pytest.raises(ValueError, match=r"compat='fusion'.*mergekit"):
        model_stock_tensor(one["w"], [one["w"]] * 2, compat="fusion")
    with pytest.raises(ValueError, match=r"shapes differ: base \(2,\), models \[\(2,\), \(3,\)\]"):
        model_stock_tensor(torch.ones(2), [torch.ones(2), torch.ones(3)])


def test_the_module_does_not_hide_the_function():
    import importlib

    importlib.import_module("lightning_peft.merging.model_stock")
    importlib.import_module("lightning_peft.merging.half_reset")
    import lightning_peft.merging as merging

    assert merging.model_stock is function
    assert all(callable(getattr(merging, name)) or name == "METHODS" for name in merging.__all__)
