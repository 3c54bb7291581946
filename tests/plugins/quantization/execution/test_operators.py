"""torch's integer operators: what they compute, how they are tried, and what happens without them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from rarefy_quantization.execution import operators
from rarefy_quantization.execution.layers import IntegerConv2d, IntegerLayer, IntegerLinear
from rarefy_quantization.execution.operators import Affine, Geometry, trial
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def tried_anew() -> Iterator[None]:
    operators._trial.cache_clear()
    yield
    operators._trial.cache_clear()


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "quantized", SimpleNamespace())


def weight(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales and a bias."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    return codes, torch.rand(shape[0]) * 0.01 + 0.01, torch.randn(shape[0])


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return activations on the grid of all of them, in double precision."""
    least, most = x.min().clamp(max=0).double(), x.max().clamp(min=0).double()
    step = (most - least) / (2**bits - 1)
    zero = (-least / step).round()
    return ((x.double() / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step


def exact(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.double() * scales.double().reshape(-1, *[1] * (codes.dim() - 1))


@pytest.mark.parametrize("shape", [(16, 40), (2, 5, 40), (1, 40), (40,), (0, 40)])
def test_linear_is_the_product_with_the_rounded_activations(shape: tuple[int, ...]) -> None:
    codes, scales, bias = weight(24, 40)
    x = torch.randn(shape)
    found = IntegerLinear(codes, scales, bias)(x)
    assert found.shape == (*shape[:-1], 24)
    if len(x):
        wanted = F.linear(rounded(x, trial("linear").bits), exact(codes, scales), bias.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_where_sums_saturate_activations_have_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_linear_is_exact", lambda bits: bits == 7)
    codes, scales, _ = weight(24, 40)
    x = torch.randn(8, 40)
    layer = IntegerLinear(codes, scales, None)
    assert layer.bits == 7
    if torch.backends.quantized.engine != "qnnpack":  # which rounds to 8 bits, as it never saturates
        wanted = F.linear(rounded(x, 7), exact(codes, scales))
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("geometry", [Geometry(), Geometry((2, 1), (1, 2), (1, 2)), Geometry(padding=(1, 1), groups=4)])
def test_conv2d_is_the_convolution_between_its_grids(geometry: Geometry, bits: int) -> None:
    if bits > trial("conv2d").bits:
        pytest.skip("sums saturate on this machine")
    codes, scales, bias = weight(8, 8 // geometry.groups, 3, 3)
    given, out = Affine(4 / (2**bits - 1), 2 ** (bits - 1), bits), Affine(0.125, 100)
    x = torch.randn(2, 8, 9, 7)  # some are beyond the grid
    layer = IntegerConv2d(codes, scales, bias, geometry, given, out)
    on_grid = ((x.double() / given.step).round() + given.zero).clamp(0, 2**bits - 1).sub(given.zero) * given.step
    g = geometry
    wanted = F.conv2d(on_grid, exact(codes, scales), bias.double(), g.stride, g.padding, g.dilation, g.groups)
    wanted = wanted.clamp(-100 * out.step, 155 * out.step)
    assert ((layer(x) - wanted).abs() <= 0.501 * out.step).all()
    assert torch.equal(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, *wanted.shape[1:])


def test_conv2d_keeps_the_layout_of_what_it_is_given() -> None:
    layer = IntegerConv2d(*weight(4, 2, 3, 3), Geometry(), Affine(0.03, 60, trial("conv2d").bits), Affine(0.1, 128))
    x = torch.randn(3, 2, 6, 6)
    last = x.to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), layer(last))


def test_all_activations_at_zero_give_the_bias() -> None:
    codes, scales, bias = weight(3, 5)
    assert torch.equal(IntegerLinear(codes, scales, bias)(torch.zeros(2, 5)), bias.expand(2, 3))


def layers() -> list[IntegerLayer]:
    grids = Affine(0.03, 120, trial("conv2d").bits), Affine(0.1, 128)
    return [IntegerLinear(*weight(6, 5)), IntegerConv2d(*weight(6, 5, 1, 1), Geometry(), *grids)]


@pytest.mark.parametrize("which", [0, 1])
def test_copies_and_pickles_compute_the_same_and_hold_plain_tensors(which: int) -> None:
    layer, x = layers()[which], torch.randn(2, *((5,), (5, 3, 3))[which])
    wanted = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    written = pickle.dumps(layer)
    assert b"ScriptObject" not in written
    assert torch.equal(pickle.loads(written)(x), wanted)
    assert torch.equal(layer.weight, exact(layer.codes, layer.scales).float())


@pytest.mark.parametrize("which", [0, 1])
def test_a_state_dict_is_loaded_without_pickles_and_packed_anew(which: int) -> None:
    one, other, x = layers()[which], layers()[which], torch.randn(2, *((5,), (5, 3, 3))[which])
    assert not torch.equal(one(x), other(x))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_missing_operators_are_named(without_operators: None, kind: operators.Kind) -> None:
    obstacle = trial(kind).obstacle
    assert obstacle is not None
    assert f"does not run quantized::{kind}" in obstacle
    assert f"torch {torch.__version__} with the engine {torch.backends.quantized.engine!r}" in obstacle


def test_operators_that_give_wrong_sums_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_conv2d_is_exact", lambda bits: False)
    assert "gives wrong sums" in str(trial("conv2d").obstacle)


@pytest.mark.parametrize("which", [0, 1])
def test_a_pickle_read_without_operators_computes_in_float32_and_says_so(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layers()[which], torch.randn(2, *((5,), (5, 3, 3))[which])
    written = pickle.dumps(layer)
    operators._trial.cache_clear()
    monkeypatch.setattr(torch.ops, "quantized", SimpleNamespace())
    with pytest.warns(UserWarning, match=r"does not run quantized::\w+: .*computes in float32"):
        read = pickle.loads(written)
    compute = F.linear if which == 0 else F.conv2d
    assert torch.equal(read(x), compute(x, layer.weight, layer.bias))


def test_a_pickle_with_more_bits_than_sums_allow_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_linear_is_exact", lambda bits: bits == 8)
    written = pickle.dumps(layers()[0])
    operators._trial.cache_clear()
    monkeypatch.setattr(operators, "_linear_is_exact", lambda bits: bits == 7)
    with pytest.warns(UserWarning, match="saturate with activations of 8 bits"):
        pickle.loads(written)
