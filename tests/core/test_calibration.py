"""What layers see is handed on whole, and nothing of the model is left changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rarefy.calibration import stream_inputs, stream_together
from rarefy.errors import StageError
from torch import nn


class Counted(nn.Module):
    """Counts how often it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x


def batches(count: int = 3, size: int = 4) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 5, generator=generator),) for _ in range(count)]


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3), Counted(), nn.Linear(3, 2))


def collect(model: nn.Module, names: list[str], data: Any) -> tuple[dict[str, list[torch.Tensor]], dict[str, int]]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    calls = stream_inputs(model, data, {name: found[name].append for name in names})
    return found, calls


def test_a_layer_sees_the_inputs_of_evaluation_mode() -> None:
    model = chain().train()
    found, calls = collect(model, ["3"], batches())
    expected = [model[0](x).relu() for (x,) in batches()]  # no dropout
    assert all(torch.equal(one, other) for one, other in zip(found["3"], expected, strict=True))
    assert not any(x.requires_grad for x in found["3"])
    assert calls == {"3": 1}


def test_the_model_is_left_as_it_was() -> None:
    model = chain().train()
    model[2].eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    collect(model, ["0", "3"], batches())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_forward_ends_where_the_last_layer_was_reached() -> None:
    model = chain()
    collect(model, ["0", "3"], batches(5))
    assert model[4].count == 1  # the first batch alone runs to the end
    collect(model, ["5"], batches(5))
    assert model[4].count == 6


def test_a_layer_used_twice_is_visited_twice_each_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.after = nn.Linear(5, 5), Counted()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.after(self.layer(x)))

    model = Twice()
    found, calls = collect(model, ["layer"], batches())
    assert calls == {"layer": 2}
    assert len(found["layer"]) == 6
    assert model.after.count == 3


def test_layers_are_listed_in_the_order_they_are_reached_and_those_never_reached_are_absent() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 2), nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(input=x))

    found, calls = collect(Reversed(), ["last", "unused", "first"], batches())
    assert list(calls) == ["first", "last"]
    assert [len(found[name]) for name in ("last", "unused", "first")] == [3, 0, 3]


def test_layers_inside_torchs_fused_transformer_are_reached() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    names = ["layers.0.linear1", "layers.1.linear2", "layers.0.self_attn.out_proj"]
    mask = torch.zeros(2, 3, dtype=torch.bool)
    data = [(torch.randn(2, 3, 8), None, mask)]
    _, calls = collect(model, names, data)
    assert list(calls) == ["layers.0.linear1", "layers.1.linear2"]  # attention multiplies with the weight itself
    assert torch.backends.mha.get_fastpath_enabled()


def test_no_batches_are_an_error() -> None:
    with pytest.raises(StageError, match="gives no batches"):
        collect(chain(), ["0"], [])


def test_something_else_than_a_tensor_is_an_error_and_leaves_no_hooks() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer([x])[0]

    model = Odd()
    with pytest.raises(StageError, match=r"'layer' is called with list"):
        collect(model, ["layer"], batches())
    assert not model.layer._forward_pre_hooks
    assert model.training


def test_the_models_own_error_passes() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        collect(chain(), ["0"], [(torch.randn(2, 9),)])


class Twice(nn.Module):
    """Calls a layer twice, and writes into its input and its output afterwards."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.layer(x)
        x += 1
        y.relu_()
        return self.layer(input=x) + y


class TestSeveralModels:
    def test_calls_come_in_pairs_as_they_were(self) -> None:
        one, other = Twice(nn.Linear(5, 5)), Twice(nn.Linear(5, 3))
        passed = list(stream_together((one, other), batches(), "layer"))
        assert len(passed) == 6
        for (x,), first, second in zip(batches(), passed[::2], passed[1::2], strict=True):
            for model, (given, gave), (given_then, gave_then) in zip((one, other), first, second, strict=True):
                assert torch.equal(given, x)
                assert torch.equal(given_then, x + 1)
                torch.testing.assert_close(gave, model.layer(x))
                torch.testing.assert_close(gave_then, model.layer(x + 1))

    def test_the_models_run_no_further_than_the_layer_after_the_first_batch(self) -> None:
        models = chain(), chain()
        assert len(list(stream_together(models, batches(4), "3"))) == 4
        assert [model[4].count for model in models] == [1, 1]
        assert all(model.training and not model[3]._forward_hooks for model in models)

    def test_a_layer_that_is_not_reached_gives_nothing(self) -> None:
        model = chain()
        model.other = nn.Identity()
        model.add_module("bypassed", nn.Linear(2, 2))
        model.forward = lambda x: x  # type: ignore[method-assign]
        assert list(stream_together((model, model), batches(), "bypassed")) == []
