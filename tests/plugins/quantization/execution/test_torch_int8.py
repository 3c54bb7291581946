"""Models on torch's integer kernels: what is replaced, by what, and what is said; timings are given, not taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rarefy.artifact import write
from rarefy.errors import ArtifactError, StageError
from rarefy.modules import as_base
from rarefy.tasks import ClassificationTask
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.execution import operators
from rarefy_quantization.execution.layers import IntegerConv2d, IntegerLinear
from rarefy_quantization.execution.torch_int8 import WORTHWHILE, integer_kernels
from torch import nn

from .conftest import quantized


class Clock:
    """Gives the speed-ups it was told, one after the other, the last for ever."""

    def __init__(self, *speed_ups: float) -> None:
        self.speed_ups = list(speed_ups)
        self.timed: list[tuple[Sequence[nn.Module], tuple[Any, ...], int]] = []

    def __call__(
        self, models: Sequence[nn.Module], inputs: tuple[Any, ...], rounds: int, threads: int | None
    ) -> list[float]:
        self.timed.append((models, inputs, rounds))
        return [self.speed_ups.pop(0) if len(self.speed_ups) > 1 else self.speed_ups[0], 1.0]


class Net(nn.Module):
    """Convolutions, a `view` and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.two, self.head = nn.Linear(96, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return self.head(torch.relu(self.two(x.view(len(x), -1))))


X = (torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)),)
FASTER = Clock(2.0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    operators._trial.cache_clear()
    monkeypatch.setattr(torch.ops, "quantized", SimpleNamespace())
    yield
    operators._trial.cache_clear()


def test_where_all_is_faster_all_is_replaced_and_the_model_stays_as_it_was() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast, report = integer_kernels(model, X, measure=FASTER)
    assert report.replaced
    assert [layer.replaced for layer in report.layers] == [True] * 4
    assert isinstance(fast.one[0], IntegerConv2d)
    assert isinstance(fast.head, IntegerLinear)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not fast.training
    outputs = model.eval()(*X)
    error = ((fast(*X) - outputs).square().mean().sqrt() / outputs.std(correction=0)).item()
    assert 0 < error < 0.05
    assert report.error == pytest.approx(error, rel=1e-3)
    assert "2.00x faster on integers in 4 of 4 layers" in str(report).splitlines()[0]


def test_a_layer_is_replaced_only_where_it_is_faster() -> None:
    clock = Clock(3.0, 0.5, WORTHWHILE - 0.01, WORTHWHILE, 1.5)
    fast, report = integer_kernels(Net(), X, rounds=7, measure=clock)
    assert [layer.replaced for layer in report.layers] == [True, False, False, True]
    assert [layer.speed_up for layer in report.layers] == [3.0, 0.5, WORTHWHILE - 0.01, WORTHWHILE]
    assert isinstance(fast.one[3], nn.Conv2d)
    assert isinstance(fast.two, nn.Linear)
    lines = str(report).splitlines()
    assert lines[0].startswith("model: int8: 1.50x faster")
    assert "one.3: float32: 2.00x SLOWER on integers" in lines[2]
    assert "too little to round for" in lines[3]
    assert "one.0: int8: 3.00x faster" in lines[1]
    assert {rounds for *_, rounds in clock.timed} == {7}
    assert clock.timed[-1][0][1] is fast


def test_a_layer_is_timed_on_what_it_sees() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model, clock, x = Twice(), Clock(2.0), torch.randn(3, 4)
    integer_kernels(model, (x,), measure=clock)
    (original, new), inputs, _ = clock.timed[0]
    assert torch.equal(inputs[0], x)
    assert torch.equal(inputs[1], torch.relu(model.layer(x)))
    assert torch.equal(original(*inputs)[1], model(x))
    assert len(new(*inputs)) == 2


def test_a_model_that_is_slower_as_a_whole_comes_back_in_float32() -> None:
    model = mlp()
    x = torch.randn(6, 12)
    same, report = integer_kernels(model, (x,), measure=Clock(2.0, 2.0, 0.8))
    assert not report.replaced
    assert [layer.replaced for layer in report.layers] == [True, True]
    assert "model: float32: 1.25x SLOWER on integers in 2 of 2 layers" in str(report)
    assert same is not model
    assert torch.equal(same(x), model(x))


def test_a_model_whose_outputs_move_too_far_comes_back_in_float32() -> None:
    model, x = mlp(), torch.randn(6, 12)
    same, report = integer_kernels(model, (x,), max_error=1e-4, measure=FASTER)
    assert not report.replaced
    assert torch.equal(same(x), model(x))
    assert "`max_error` is 0.01%" in report.reason


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_that_a_step_left_are_used_as_they_are(bits: int) -> None:
    model = quantized(Net(), UniformConfig(bits=bits))
    fast, report = integer_kernels(model, X, measure=FASTER)
    assert all(layer.found for layer in report.layers)
    assert "its weight consists of them" in report.layers[0].reason
    for name in ("one.0", "one.3", "two", "head"):
        assert torch.equal(fast.get_submodule(name).weight, model.get_submodule(name).weight)
        assert int(fast.get_submodule(name).codes.abs().max()) <= 2 ** (bits - 1)


def test_other_weights_are_rounded_by_less_than_a_step() -> None:
    model = mlp()
    fast, report = integer_kernels(model, (torch.randn(6, 12),), measure=FASTER)
    assert not report.layers[0].found
    error = (fast[0].weight - model[0].weight).abs()
    assert (error <= 0.51 * fast[0].scales[:, None]).all()


def test_convolutions_take_their_grids_from_calibration() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with torch.no_grad():
        outputs = model(10 * X[0])
    fast, _ = integer_kernels(model, X, [(0.5 * X[0],), (10 * X[0],)], measure=FASTER)
    (step, zero), (out_step, _) = fast[0].grids.tolist()
    assert zero == 0
    assert step * (2 ** fast[0].bits - 1) == pytest.approx(10 * X[0].max().item(), rel=1e-3)
    reach = max(outputs.max().item(), 0) - min(outputs.min().item(), 0)
    assert 255 * out_step == pytest.approx(reach, rel=1e-3)
    assert fast(10 * X[0]) == pytest.approx(outputs, abs=0.02 * reach)


def test_a_trained_network_keeps_its_score(trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    inputs = digits_task.example_inputs(16)
    fast, report = integer_kernels(trained_digits, inputs, digits_task.calibration(None, 4), measure=FASTER)
    assert all(layer.replaced for layer in report.layers)
    scores = [digits_task.score(model, "validation") for model in (fast, trained_digits)]
    assert abs(scores[0] - scores[1]) <= 0.01


def test_a_single_layer_is_a_model_too() -> None:
    fast, report = integer_kernels(nn.Linear(7, 3), (torch.randn(2, 7),), measure=FASTER)
    assert isinstance(fast, IntegerLinear)
    assert "the layer: int8" in str(report)


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    layer = nn.Linear(6, 6)
    fast, report = integer_kernels(nn.Sequential(layer, nn.ReLU(), layer), (torch.randn(2, 6),), measure=FASTER)
    assert len(report.layers) == 1
    assert isinstance(fast[0], IntegerLinear)
    assert fast[0] is fast[2]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_torch_s_transformer_layers_run_on_integers(padded: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[0, 3:] = not padded
    inputs = (torch.randn(3, 5, 16), None, ~seen)
    fast, report = integer_kernels(model, inputs, measure=FASTER)
    assert report.replaced
    assert report.error is not None
    assert 0 < report.error < 0.05
    names = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert [layer.name for layer in report.layers if layer.replaced] == names
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs)[seen], model(*inputs)[seen], rtol=0, atol=0.1)


def test_a_file_refuses_what_was_made_for_one_machine(tmp_path: Path) -> None:
    model = mlp()
    fast, _ = integer_kernels(model, (torch.randn(2, 12),), measure=FASTER)
    with pytest.raises(ArtifactError, match="IntegerLinear is not registered"):
        write(fast, as_base(model), tmp_path / "model.rarefy")


def test_gradients_are_off() -> None:
    fast, _ = integer_kernels(Net(), X, exclude=["one.*"], measure=FASTER)
    assert not fast(*X).requires_grad


def test_what_cannot_be_replaced_stays_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.hooked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.same, self.circular = nn.Conv2d(1, 1, 3, padding="same"), nn.Conv2d(1, 1, 3, padding_mode="circular")
            self.hooked.register_forward_hook(lambda *_: None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            images = self.circular(self.same(x.expand(1, 1, 4, 4)))
            return self.hooked(self.used(x)) + images.sum()

    _, report = integer_kernels(Odd(), (torch.randn(4, 4),), measure=FASTER)
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.replaced}
    assert reasons.keys() == {"unused", "hooked", "same", "circular"}
    assert "never calls it" in reasons["unused"]
    assert "hooks" in reasons["hooked"]
    assert "padding is same" in reasons["same"]
    assert "'circular'" in reasons["circular"]


def test_half_precision_stays() -> None:
    _, report = integer_kernels(mlp().bfloat16(), (torch.randn(2, 12).bfloat16(),), measure=FASTER)
    assert not report.replaced
    assert "torch.bfloat16" in report.layers[0].reason


def test_excluded_layers_stay() -> None:
    fast, report = integer_kernels(Net(), X, exclude=["one.*", "head"], measure=FASTER)
    assert [layer.name for layer in report.layers if layer.replaced] == ["two"]
    assert isinstance(fast.head, nn.Linear)


def test_without_operators_the_model_stays_in_float32(without_operators: None) -> None:
    model, x = mlp(), torch.randn(2, 12)
    same, report = integer_kernels(model, (x,), measure=FASTER)
    assert not report.replaced
    assert "does not run quantized::linear" in report.reason
    assert torch.equal(same(x), model(x))


def test_a_model_without_such_layers_stays() -> None:
    _, report = integer_kernels(nn.Sequential(nn.ReLU()), (torch.randn(2),), measure=FASTER)
    assert str(report) == "model: float32: it has no Linear or Conv2d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["nothing*"]}, r"'nothing\*', which matches no layer; the layers are 0, 2"),
        ({"rounds": 2}, "`rounds` is 2; give at least 3"),
        ({"max_error": 0.0}, "`max_error` is 0.0; give a positive number"),
        ({"max_error": math.nan}, "`max_error` is nan"),
        ({"calibration": []}, "`calibration` gives no batches"),
        ({"calibration": [torch.zeros(1, 12)]}, "as a tuple, such as `\\(x,\\)`, not Tensor"),
        ({"inputs": torch.zeros(1, 12)}, "as a tuple, such as `\\(x,\\)`, not Tensor"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"inputs": (torch.zeros(1, 12),), "measure": FASTER, **options}
    with pytest.raises(StageError, match=message):
        integer_kernels(mlp(), **given)


def test_values_that_are_not_finite_are_refused() -> None:
    model = Net()
    with pytest.raises(StageError, match=r"layer 'one\.0' meets values that are NaN"):
        integer_kernels(model, (torch.full((2, 1, 6, 6), torch.inf),), measure=FASTER)
    with torch.no_grad():
        model.two.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="layer 'two' has weights that are NaN"):
        integer_kernels(model, X, measure=FASTER)


def test_a_model_elsewhere_is_refused() -> None:
    with pytest.raises(StageError, match=r"the model is on meta, .* `\.cpu\(\)`"):
        integer_kernels(mlp().to("meta"), (torch.zeros(1, 12),), measure=FASTER)
