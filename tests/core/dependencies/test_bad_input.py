"""What cannot be analyzed or cut says so; what is unusual works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.dependencies import Dependencies, cut, find_dependencies, mask, operators
from rarefy.errors import StageError
from torch import nn

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def found() -> tuple[nn.Sequential, Dependencies]:
    model = plain()
    return model, find_dependencies(model, (X,))


@pytest.mark.parametrize(
    ("build", "inputs", "message"),
    [
        (plain, (X[:, :5],), r"does not run on the example inputs: RuntimeError: mat1 and mat2 .*3x5 and 6x8"),
        (plain, (), "does not run on the example inputs: TypeError"),
        (plain, X, r"pass a tuple, `\(x,\)`"),
        (
            lambda: nn.DataParallel(plain()),
            (X,),
            r"DataParallel is a wrapper: pass its `\.module`",
        ),
        (lambda: torch.compile(plain(), backend="eager"), (X,), r"`\._orig_mod`"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), (X,), r"'0\.weight' has no shape yet"),
        (lambda: plain().to("meta"), (X.to("meta"),), r"'0\.weight' is on the meta device"),
    ],
)
def test_models_that_cannot_be_analyzed(build: Callable[[], nn.Module], inputs: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        find_dependencies(build(), inputs)


def test_a_model_wrapped_for_several_processes_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(plain())
        with pytest.raises(StageError, match=r"DistributedDataParallel is a wrapper: pass its `\.module`"):
            find_dependencies(wrapped, (X,))
        assert find_dependencies(wrapped.module, (X,)).groups
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("within", [False, True])
def test_script_modules(within: bool) -> None:
    script = torch.jit.trace(nn.Linear(6, 8), X)
    with pytest.raises(StageError, match=r"ScriptModule|TracedModule"):
        find_dependencies(nn.Sequential(script, nn.Linear(8, 4)) if within else script, (X,))


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ({"2": [0]}, "'2' cannot be cut: it is part of the model's output"),
        ({"head": [0]}, "there is no group 'head'; the groups are 0"),
        ({"0": [8]}, "'0' has the units 0 to 7"),
        ({"0": [-1]}, "'0' has the units 0 to 7"),
        ({"0": [0.5]}, "given by their numbers, int64"),
        ({"0": [True] * 8}, "given by their numbers, int64"),
    ],
)
@pytest.mark.parametrize("act", [cut, mask])
def test_removals_that_cannot_be(act: Any, removal: dict[str, Any], message: str, found: Any) -> None:
    before = [parameter.detach().clone() for parameter in found[0].parameters()]
    with pytest.raises(StageError, match=message):
        act(*found, {name: torch.tensor(list(units)) for name, units in removal.items()})
    assert all(map(torch.equal, before, found[0].parameters()))


def test_one_unit_has_to_stay(found: Any) -> None:
    with pytest.raises(StageError, match=r"nothing would be left of '0\.weight'"):
        cut(*found, {"0": torch.arange(8)})


@pytest.mark.parametrize("wide", [5, 9])
def test_groups_of_another_model_are_refused(wide: int, found: Any) -> None:
    other = nn.Sequential(nn.Linear(6, wide), nn.ReLU(), nn.Linear(wide, 4))
    with pytest.raises(StageError, match="belong to another model"):
        cut(other, found[1], {"0": torch.tensor([1])})


def test_groups_are_no_longer_those_of_the_model_that_was_cut(found: Any) -> None:
    once = cut(*found, {"0": torch.tensor([1])})
    with pytest.raises(StageError, match="find its dependencies again"):
        cut(once, found[1], {"0": torch.tensor([1])})


def test_units_given_twice_or_not_at_all(found: Any) -> None:
    compact = cut(*found, {"0": torch.tensor([1, 1, 3])})
    assert compact[0].out_features == 6
    for nothing in ({}, {"0": torch.tensor([], dtype=torch.long)}):
        assert cut(*found, nothing)[0].out_features == 8


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.ReLU(), nn.Linear(6, 4)], ids=["empty", "no parameters", "pinned"]
)
def test_models_without_anything_to_cut(model: nn.Module) -> None:
    deps = find_dependencies(model, (X,))
    assert deps.groups == ()
    assert all(group.pinned for group in deps.pinned)
    assert cut(model, deps, {}) is not model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = plain().to(dtype)
    deps = find_dependencies(model, (X.to(dtype),))
    assert [group.units for group in deps.groups] == [8]
    removal = {"0": torch.tensor([0, 5])}
    compact = cut(model, deps, removal)
    assert compact[0].weight.dtype == dtype
    torch.testing.assert_close(compact(X.to(dtype)), mask(model, deps, removal)(X.to(dtype)), rtol=0.02, atol=0.02)


def test_weights_that_are_not_contiguous(oracle: Any) -> None:
    model = plain()
    model[0].weight = nn.Parameter(torch.randn(6, 8).t())
    model[2].weight = nn.Parameter(torch.randn(8, 8)[::2])
    assert [group.units for group in oracle(model, X, stir=False).groups] == [8]


def test_training_flags_and_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).train()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    deps = find_dependencies(model, (X,))
    assert model.training
    assert int(model[1].num_batches_tracked) == 0
    compact = cut(model, deps, {"0": torch.tensor([0])})
    assert [module.training for module in compact.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in compact.parameters()] == [p.requires_grad for p in model.parameters()]


def test_gradients_stay_with_the_model_and_the_copy_trains() -> None:
    model = plain()
    model(X).sum().backward()
    gradient = model[0].weight.grad.clone()
    compact = cut(model, find_dependencies(model, (X,)), {"0": torch.tensor([0])})
    assert torch.equal(model[0].weight.grad, gradient)
    compact(X).sum().backward()
    assert compact[0].weight.grad.shape == (7, 6)


def test_groups_that_overlap_are_cut_one_by_one() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 8, 1, groups=4), nn.Conv1d(8, 2, 1))
    deps = find_dependencies(model, (torch.randn(1, 3, 5),))
    blocks, places = (next(g for g in deps.groups if g.kind == kind) for kind in ("block", "position"))
    with pytest.raises(StageError, match=r"in two ways at once; cut one of them, then find the dependencies again"):
        cut(model, deps, {blocks.name: torch.tensor([0]), places.name: torch.tensor([0])})
    once = cut(model, deps, {blocks.name: torch.tensor([0])})
    deps = find_dependencies(once, (torch.randn(1, 3, 5),))
    places = next(g for g in deps.groups if g.kind == "position")
    assert cut(once, deps, {places.name: torch.tensor([0])})[1].weight.shape == (3, 1, 1)


def test_what_the_inputs_do_not_reach_is_pinned() -> None:
    model = plain()
    model.add_module("spare", nn.Linear(3, 3))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    deps = find_dependencies(model, (X,))
    assert "do not reach" in str(deps["spare"].pinned)


def test_a_rule_that_fails_pins(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(trace: Any, call: Any) -> None:
        raise KeyError("src")

    monkeypatch.setitem(operators.RULES, "_softmax", broken)
    model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2))
    found = find_dependencies(model, (torch.randn(2, 4),))
    assert found.groups == ()
    assert "the rule for the operator '_softmax' failed" in [group.pinned for group in found.pinned]
    assert "KeyError" in caplog.text
