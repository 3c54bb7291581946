"""Passes that stop at layers: what they hand over, what they go on with, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.errors import StageError
from rarefy.hessian import InputHessian, as_rows
from rarefy.layerwise import LayerCalibration, solve_layers_
from rarefy.passes import Passes, walk
from rarefy.testing.subjects import Inputs
from torch import nn

TASKS = Path("/proc/self/task")


def batches(count: int = 3) -> list[tuple[torch.Tensor]]:
    return [(x,) for x in torch.randn(count, 4, 5, generator=torch.Generator().manual_seed(0))]


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def assert_left_alone(*models: nn.Module) -> None:
    assert not any(module._forward_pre_hooks for model in models for module in model.modules())
    assert not [thread for thread in threading.enumerate() if thread.name == "rarefy: a forward pass"]


class TestWalk:
    def test_the_layers_come_one_by_one_with_what_they_are_given(self) -> None:
        model, (batch,) = chain().eval(), batches(1)
        passed = [(name, x.clone()) for name, x in walk(model, batch, ["5", "0", "3"])]
        assert [name for name, _ in passed] == ["0", "3", "5"]
        expected = (batch[0], model[:3](batch[0]), model[:5](batch[0]))
        assert all(torch.equal(x, want) for (_, x), want in zip(passed, expected, strict=True))
        assert not any(x.requires_grad for _, x in passed)
        assert_left_alone(model)

    def test_a_layer_computes_with_the_weight_it_has_when_the_pass_goes_on(self) -> None:
        model, (batch,) = chain().eval(), batches(1)
        calls = walk(model, batch, ["0", "3"])
        next(calls)
        model[0].weight.data.mul_(2)
        assert torch.equal(next(calls)[1], model[:3](batch[0]))
        calls.close()

    def test_several_are_under_way_and_others_pass_by(self) -> None:
        model, data = chain().eval(), batches(3)
        walks = [walk(model, batch, ["0", "3"]) for batch in data]
        for name, before in (("0", 0), ("3", 3)):
            calls = [next(one) for one in walks]
            model(data[0][0])  # a pass of this thread waits for nobody
            assert [call[0] for call in calls] == [name] * 3
            assert all(torch.equal(x, model[:before](batch[0])) for (_, x), batch in zip(calls, data, strict=True))
        assert [next(one, None) for one in walks] == [None] * 3
        assert_left_alone(model)

    def test_closing_ends_the_pass_where_it_is(self) -> None:
        model, (batch,), computed = chain().eval(), batches(1), []
        model[3].register_forward_hook(lambda *_: computed.append("3"))
        calls = walk(model, batch, ["0", "3", "5"])
        next(calls)
        next(calls)
        calls.close()
        assert not computed
        assert_left_alone(model)

    @pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in /proc")
    def test_it_computes_with_as_many_threads_as_the_caller(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
        x = torch.randn(8, 3, 32, 32)
        model(x)
        before = {task.name for task in TASKS.iterdir()}  # conftest.py: one to compute with
        with contextlib.closing(walk(model, (x,), ["1"])) as calls:
            next(calls)
            began = {task.name for task in TASKS.iterdir()} - before  # threads of earlier tests may end meanwhile
        assert len(began) == 1

    def test_an_error_of_the_model_reaches_the_caller(self) -> None:
        model = chain().eval()
        calls = walk(model, (torch.randn(2, 5),), ["0", "3"])
        next(calls)
        model[3].weight.data = torch.randn(3, 9)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            list(calls)
        assert_left_alone(model)

    def test_a_call_with_something_else_than_a_tensor_is_told(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Identity()

            def forward(self, x: torch.Tensor) -> Any:
                return self.layer([x])

        with pytest.raises(StageError, match=r"'layer' is called with list"):
            list(walk(Odd(), (torch.zeros(1),), ["layer"]))


class Plain(nn.Module):
    """Two layers, in another order than their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first = nn.Linear(6, 3), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x))
        return out


class Twice(nn.Module):
    """A layer called twice around one that is called once, and one that only some batches reach."""

    def __init__(self, choosy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.around, self.between, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.choosy, self.passes = choosy, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        y: torch.Tensor = self.around(self.between(self.around(x).relu()))
        if self.choosy and x.sum() > 0:
            return y
        return self.last(y.relu()) + y


def data() -> Any:
    return Inputs(*(torch.randn(10, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)))


def halve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
    return 0.5 * as_rows(layer)


class TestPasses:
    """Passes that go from layer to layer together give what passes from the start give, to the last bit."""

    @pytest.mark.parametrize("sequential", [True, False])
    @pytest.mark.parametrize("referred", [True, False])
    @pytest.mark.parametrize("build", [Plain, Twice, lambda: Twice(choosy=True)])
    def test_they_change_nothing(
        self, build: Callable[[], nn.Module], referred: bool, sequential: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        together, apart = self.solved(build, referred, sequential), None
        with monkeypatch.context() as patched:
            patched.setattr(Passes, "_called_once", lambda *_: [])
            apart = self.solved(build, referred, sequential)
        assert together[1] == apart[1]
        for name, weight in together[0].state_dict().items():
            assert torch.equal(weight, apart[0].state_dict()[name]), name

    def solved(
        self, build: Callable[[], nn.Module], referred: bool, sequential: bool
    ) -> tuple[nn.Module, dict[str, float]]:
        model, names = build(), ["around", "between", "last"] if build is not Plain else ["first", "last"]

        def solve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            return as_rows(layer) * hessian.cross.diagonal(dim1=-2, dim2=-1).unsqueeze(1)

        twin = copy.deepcopy(model) if referred else None
        return model, solve_layers_(model, names, LayerCalibration(data()), solve, sequential, reference=twin)

    def test_each_batch_passes_once(self) -> None:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), Twice())
        names = [str(i) for i in range(6)] + ["6.between", "6.last"]
        solve_layers_(model, names, LayerCalibration(data()), halve)
        assert model[6].passes == 1 + 3  # one to count the calls

    def test_without_room_for_all_each_layer_has_its_own(self) -> None:
        class Full(Plain):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.first(x)
                if threading.current_thread() is not threading.main_thread():
                    raise torch.OutOfMemoryError("no room")
                out: torch.Tensor = self.last(x)
                return out

        model, twin = Full(), Plain()
        for one in (model, twin):
            solve_layers_(one, ["first", "last"], LayerCalibration(data()), halve)
        assert torch.equal(model.last.weight, twin.last.weight)

    def test_an_error_in_between_ends_them(self) -> None:
        def fail(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            raise ValueError(name)

        model = Plain().train()
        with pytest.raises(ValueError, match="first"):
            solve_layers_(model, ["first", "last"], LayerCalibration(data()), fail)
        assert model.training
        assert_left_alone(model)

    def test_without_data_nothing_is_begun(self) -> None:
        model, fast = chain().train(), torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(StageError, match="gives no batches"):
            Passes([model], ["0"], Inputs())
        assert model.training
        assert torch.backends.mha.get_fastpath_enabled() == fast

    def test_layers_that_are_not_asked_for_are_gone_past_and_come_later(self) -> None:
        models = chain().train(), chain().train()
        data = Inputs(*(batch for (batch,) in batches()))
        with contextlib.closing(Passes(models, ["0", "3", "5"], data)) as passes:
            for name, before in (("0", 0), ("5", 5), ("3", 3)):  # the last two by passes of their own
                calls = list(passes.calls(name))
                assert len(calls) == 3
                for given, (batch,) in zip(calls, batches(), strict=True):
                    for x, model in zip(given, models, strict=True):
                        assert not model.training
                        assert torch.equal(x, model[:before](batch))
        assert models[0].training
        assert_left_alone(*models)
