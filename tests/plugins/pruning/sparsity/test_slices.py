"""Norms over coupled slices and the proximal operator, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rarefy_pruning.sparsity.slices import Slices, Structures, norms, scale_, shrunk


def index(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def coupled() -> tuple[Structures, dict[str, torch.Tensor]]:
    """Two channels: a row of `a`, a scale, and two columns each of `b`, as behind a flatten."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(2, 3, 2, 2), "scale": torch.randn(2), "b": torch.randn(5, 4)}
    parts = (
        Slices("a", (0,), index([0], [1])),
        Slices("scale", (0,), index([0], [1])),
        Slices("b", (1,), index([0, 1], [2, 3])),
    )
    return Structures("channels", parts), tensors


def test_a_norm_runs_over_all_members() -> None:
    structures, tensors = coupled()
    a, scale, b = (tensors[name].numpy().astype(np.float64) for name in ("a", "scale", "b"))
    expected = [np.sqrt((a[c] ** 2).sum() + scale[c] ** 2 + (b[:, 2 * c : 2 * c + 2] ** 2).sum()) for c in range(2)]
    assert norms(structures, tensors).numpy() == pytest.approx(expected)
    assert structures.sizes(tensors).tolist() == [12 + 1 + 10] * 2


def test_columns_of_a_kernel_are_columns_of_the_unrolled_weight() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 2, 2)
    columns = Structures("conv", (Slices("w", (1, 2, 3), torch.arange(12)[:, None]),))
    assert torch.allclose(norms(columns, {"w": kernel}), kernel.reshape(4, 12).norm(dim=0))
    assert columns.sizes({"w": kernel}).tolist() == [4] * 12


def test_a_whole_weight_is_one_structure() -> None:
    kernel = torch.randn(4, 3, 2, 2)
    whole = Structures("conv", (Slices("w", (0,), torch.arange(4)[None]),))
    assert norms(whole, {"w": kernel}) == pytest.approx([float(kernel.norm())])
    assert whole.sizes({"w": kernel}).tolist() == [48]


def test_scaling_reaches_each_slice_and_nothing_else() -> None:
    structures, tensors = coupled()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    scale_(structures, tensors, torch.tensor([0.0, 0.5]))
    assert not tensors["a"][0].any()
    assert tensors["scale"][0] == 0
    assert not tensors["b"][:, :2].any()
    assert torch.equal(tensors["a"][1], 0.5 * before["a"][1])
    assert torch.equal(tensors["b"][:, 2:], 0.5 * before["b"][:, 2:])


def test_scaling_works_in_place_on_weights_in_another_memory_layout() -> None:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    before = kernel.clone()
    scale_(
        Structures("conv", (Slices("w", (1, 2, 3), torch.arange(12)[:, None]),)),
        {"w": kernel},
        torch.tensor([0.0] + [1.0] * 11),
    )
    assert not kernel[:, 0, 0, 0].any()
    assert torch.equal(kernel.reshape(4, 12)[:, 1:], before.reshape(4, 12)[:, 1:])


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.4, 2.6])
def test_the_operator_is_the_minimum_that_a_search_finds(threshold: float) -> None:
    """Search all of the plane for argmin 1/2 ||x - v||^2 + t ||x||."""
    v = np.array([1.5, -2.0])  # norm 2.5
    axis = np.linspace(-3, 3, 1201)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    values = 0.5 * ((x - v[0]) ** 2 + (y - v[1]) ** 2) + threshold * np.sqrt(x**2 + y**2)
    best = np.unravel_index(values.argmin(), values.shape)
    tensors = {"v": torch.tensor(v[None])}
    one = Structures("v", (Slices("v", (0,), index([0])),))
    scale_(one, tensors, shrunk(norms(one, tensors), torch.tensor([threshold])))
    assert tensors["v"][0].tolist() == pytest.approx([x[best], y[best]], abs=0.006)
    assert bool((tensors["v"] == 0).all()) == (threshold > 2.5)


def test_for_single_weights_it_is_the_soft_threshold() -> None:
    values = torch.tensor([-2.0, -0.5, -0.3, 0.0, 0.2, 0.5, 3.0])
    tensors = {"v": values.clone()}
    each = Structures("v", (Slices("v", (0,), torch.arange(7)[:, None]),))
    scale_(each, tensors, shrunk(norms(each, tensors), torch.full((7,), 0.4)))
    assert torch.allclose(tensors["v"], torch.tensor([-1.6, -0.1, 0.0, 0.0, 0.0, 0.1, 2.6]))
    assert (tensors["v"] == 0).sum() == 3


def test_a_norm_at_zero_has_the_gradient_zero() -> None:
    structures, tensors = coupled()
    for tensor in tensors.values():
        tensor[:1] = 0
        tensor.requires_grad_()
    with torch.no_grad():
        tensors["b"][:, :2] = 0  # now the first channel is zero throughout
    norms(structures, tensors).sum().backward()
    assert all(bool(torch.isfinite(tensor.grad).all()) for tensor in tensors.values())
    assert not tensors["a"].grad[0].any()
    # elsewhere it is the direction: the norm is not squared
    norm = norms(structures, tensors)[1].detach()
    assert torch.allclose(tensors["a"].grad[1], tensors["a"][1].detach() / norm)


def test_small_half_precision_weights_have_a_norm() -> None:
    half = {"v": torch.full((1, 4), 1e-5, dtype=torch.float16)}
    one = Structures("v", (Slices("v", (0,), index([0])),))
    assert norms(one, half).item() == pytest.approx(2e-5, rel=0.01)
