"""The kit tells each broken rule, and passes what is sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from rarefy.errors import PluginError
from rarefy.exporter import Exporter
from rarefy.objective import Objective
from rarefy.technique import Analysis, LayerTechnique, Plan, Skip, TrainingRule
from rarefy.testing import check_exporter, check_objective, check_technique
from rarefy_schemas import ExporterConfig, Finetune, ObjectiveConfig, TaskLoss, TechniqueConfig, Traits
from torch import nn
from torch.nn.utils import parametrize

HALVES: dict[str, Any] = {"__doc__": "Halve the weights.", "paper": "unpublished", "traits": Traits()}


class Halve(LayerTechnique[Any]):
    """A sound technique to break in many ways."""

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        return Plan("halve")

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        layer.weight.mul_(0.5)
        return layer


def technique(work: type[LayerTechnique[Any]] = Halve, name: str = "tests/halve", **changes: Any) -> TechniqueConfig:
    """Return a config whose code is `work`, a class of this module."""
    globals()[work.__name__] = work
    members = {
        **HALVES,
        "__module__": __name__,
        "__annotations__": {"implementation": ClassVar[str], "paper": ClassVar[str], "traits": ClassVar[Traits],
                            "technique": Literal[name]},
        "implementation": f"{__name__}:{work.__name__}",
        "technique": name,
        **changes,
    }  # fmt: skip
    return type("HalveConfig", (TechniqueConfig,), members)()


class ChangesInAnalyze(Halve):
    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        layer.weight.mul_(0.5)
        return Plan("halve")


class LeavesEvaluationMode(Halve):
    def analyze(self, model: nn.Module, task: Any) -> Analysis:
        analysis = super().analyze(model, task)
        model.train()
        return analysis


class LeavesHooks(Halve):
    def analyze(self, model: nn.Module, task: Any) -> Analysis:
        model.stem.register_forward_hook(lambda module, inputs, outputs: None)
        return super().analyze(model, task)


class IsSilent(Halve):
    def analyze(self, model: nn.Module, task: Any) -> Analysis:
        analysis = super().analyze(model, task)
        return Analysis(analysis.layers[1:], analysis.skipped, analysis.plan)


class ReachesTheOriginal(Halve):
    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        return Plan("halve", detail=layer)

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        plan.detail.weight.mul_(0.5)
        return super().apply(layer, plan)


class DoesNothing(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        return layer


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class LeavesParametrizations(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", Half())
        return layer


class LosesTheStride(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
        if isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features, layer.out_features + 1)
            return nn.Sequential(new, nn.Linear(new.out_features, 2 * layer.out_features))
        return super().apply(layer, plan)

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        return Plan("break") if name == "classes" else Skip("it is not the last")


class Grows(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        layer.extra = nn.Parameter(torch.zeros(3))
        return super().apply(layer, plan)


class Unwritten(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 2


class UsesAnUnregisteredClass(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        return Unwritten(layer)


class DrawsGlobally(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        layer.weight.mul_(torch.rand(layer.weight.shape))
        return layer


class IgnoresTargets(Halve):
    def transform(self, model: nn.Module, analysis: Analysis, task: Any) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        return model


class AcceptsNoTargets(Halve):
    def analyze(self, model: nn.Module, task: Any) -> Analysis:
        try:
            return super().analyze(model, task)
        except Exception:
            return Analysis(plan={})


class TakesLabels(Halve):
    def analyze(self, model: nn.Module, task: Any) -> Analysis:
        task.labels(next(iter(task.loader("train"))))
        return super().analyze(model, task)


class Shrinks(Halve):
    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        return Plan("drop the bias") if name == "hidden" else Skip("it has none to drop")

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        layer.bias = None
        return layer


class MakesZeros(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        layer.weight[0] = 0
        return layer


class FillsZeros(Halve):
    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        layer.weight.add_(0.25)
        return layer


class PredictsValues(Halve):
    def predict(self, model: nn.Module) -> nn.Module:
        return model.to_empty(device="cpu")


BROKEN = [
    (ChangesInAnalyze, {}, "test_analyze_only_reads"),
    (LeavesEvaluationMode, {}, "test_analyze_only_reads"),
    (LeavesHooks, {}, "test_analyze_only_reads"),
    (IsSilent, {}, "test_analyze_accounts_for_every_target"),
    (ReachesTheOriginal, {}, "test_transform_leaves_the_original"),
    (DoesNothing, {}, "test_it_changes_the_model"),
    (LeavesParametrizations, {}, "test_consolidate_leaves_plain_modules"),
    (PredictsValues, {}, "test_predict_needs_no_values"),
    (LosesTheStride, {"traits": Traits(changes_shapes=True, may_grow=True)}, "test_output_shapes_are_kept"),
    (Grows, {}, "test_parameters_do_not_grow"),
    (UsesAnUnregisteredClass, {"traits": Traits(changes_shapes=True)}, "test_the_result_survives_the_file"),
    (DrawsGlobally, {}, "test_the_same_seed_gives_the_same_result"),
    (IgnoresTargets, {}, "test_it_keeps_to_its_targets"),
    (AcceptsNoTargets, {}, "test_targets_that_match_nothing_are_refused"),
    (TakesLabels, {"traits": Traits(data="unlabelled")}, "test_it_needs_no_more_data_than_declared"),
    (Shrinks, {}, "test_shapes_change_only_when_declared"),
    (MakesZeros, {}, "test_zeros_are_made_when_declared"),
    (Halve, {"traits": Traits(makes_zeros=True)}, "test_zeros_are_made_when_declared"),
    (FillsZeros, {}, "test_zeros_are_kept_when_declared"),
    (Halve, {"traits": Traits(leaves_codes=True)}, "test_codes_are_left_when_declared"),
    (Halve, {"__doc__": "halves"}, "test_it_is_documented"),
    (Halve, {"paper": ""}, "test_it_names_its_paper"),
    (Halve, {"name": "tests/Halve It"}, "test_it_has_a_name"),
    (Halve, {"model_config": {"extra": "ignore"}}, "test_unknown_options_are_refused"),
    (TrainingRule, {}, "test_its_code_is_found"),
]


@pytest.mark.parametrize(("work", "changes", "rule"), BROKEN, ids=[f"{w.__name__}-{r}" for w, _, r in BROKEN])
def test_a_broken_rule_is_named(work: Any, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_technique(technique(work, **changes))
    message = str(caught.value)
    assert f"{rule}: " in message
    assert "To mend it: " in message.partition(f"{rule}: ")[2]


def test_a_sound_technique_passes_with_and_without_fine_tuning() -> None:
    sound = technique()
    check_technique(sound)
    check_technique(type(sound), {"finetune": Finetune()})


def test_rules_hold_for_the_network_and_task_that_are_given() -> None:
    with pytest.raises(AssertionError, match="no layer to change"):
        check_technique(
            technique(Shrinks, traits=Traits(changes_shapes=True)), model=nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
        )


def test_an_unknown_name_is_told_with_those_that_are_known() -> None:
    with pytest.raises(PluginError, match="Did you mean 'pruning/magnitude'"):
        check_technique("pruning/magnitud")


class TeachableConfig(ObjectiveConfig):
    """Match the teacher."""

    implementation: ClassVar[str] = f"{__name__}:Teachable"
    needs_teacher: ClassVar[bool] = True
    objective: Literal["tests/teachable"] = "tests/teachable"


class Teachable(Objective[Any]):
    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Any) -> torch.Tensor:
        inputs = task.inputs(batch)
        with torch.no_grad():
            wanted = teacher(*inputs)
        return (model(*inputs) - wanted).square().mean()


class TeachesTheTeacher(Teachable):
    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Any) -> torch.Tensor:
        inputs = task.inputs(batch)
        return (model(*inputs) - teacher(*inputs)).square().mean()


class IsNoScalar(Teachable):
    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Any) -> torch.Tensor:
        return model(*task.inputs(batch))[0] + super().loss(model, teacher, batch, task)


class IsDetached(Teachable):
    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Any) -> torch.Tensor:
        return super().loss(model, teacher, batch, task).detach()


class LooksAtLabels(Teachable):
    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Any) -> torch.Tensor:
        return super().loss(model, teacher, batch, task) + task.labels(batch).float().mean()


def test_a_sound_objective_passes() -> None:
    check_objective(TeachableConfig())
    check_objective(TaskLoss)


@pytest.mark.parametrize(
    ("work", "needs_teacher", "rule"),
    [
        (TeachesTheTeacher, True, "test_the_loss_teaches_the_model_alone"),
        (IsNoScalar, True, "test_the_loss_teaches_the_model_alone"),
        (IsDetached, True, "test_the_loss_teaches_the_model_alone"),
        (LooksAtLabels, True, "test_labels_are_used_only_when_declared"),
        (Teachable, False, "test_the_teacher_is_asked_only_when_declared"),
    ],
)
def test_a_broken_objective_is_told(work: type[Any], needs_teacher: bool, rule: str) -> None:
    members = {
        "__module__": __name__,
        "__doc__": TeachableConfig.__doc__,
        "__annotations__": {"implementation": ClassVar[str], "needs_teacher": ClassVar[bool]},
        "implementation": f"{__name__}:{work.__name__}",
        "needs_teacher": needs_teacher,
    }
    with pytest.raises(AssertionError, match=f"breaks 1 rule\n\n{rule}: [^$]*To mend it: "):
        check_objective(type("BrokenConfig", (TeachableConfig,), members)())


class StateConfig(ExporterConfig):
    """Write the tensors alone."""

    implementation: ClassVar[str] = f"{__name__}:State"
    format: Literal["tests-state"] = "tests-state"


class State(Exporter[Any]):
    suffix = ".pt"

    def write(self, model: nn.Module, base: Any, task: Any, path: Path) -> None:
        torch.save(model.state_dict(), path)

    def reopen(self, path: Path, base: Any) -> Any:
        model = base.build()
        model.load_state_dict(torch.load(path))
        return model.eval()


class ChangesWhatItWrites(State):
    def write(self, model: nn.Module, base: Any, task: Any, path: Path) -> None:
        super().write(model.half().float(), base, task, path)


class WritesElsewhere(State):
    def write(self, model: nn.Module, base: Any, task: Any, path: Path) -> None:
        super().write(model, base, task, path.with_suffix(".elsewhere"))


class ReadsSomethingElse(State):
    def reopen(self, path: Path, base: Any) -> Any:
        model = super().reopen(path, base)
        model.classes.bias.data += 1
        return model


def test_a_sound_exporter_passes() -> None:
    check_exporter(StateConfig)


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (ChangesWhatItWrites, "`write` changes"),
        (WritesElsewhere, "`write` leaves no file"),
        (ReadsSomethingElse, "outputs differ by"),
    ],
)
def test_a_broken_exporter_is_told(work: type[Any], what: str) -> None:
    members = {
        "__module__": __name__,
        "__doc__": StateConfig.__doc__,
        "__annotations__": {"implementation": ClassVar[str]},
        "implementation": f"{__name__}:{work.__name__}",
    }
    with pytest.raises(AssertionError, match=f"breaks 1 rule\n\ntest_the_file_stands_for_the_model: .*{what}"):
        check_exporter(type("BrokenConfig", (StateConfig,), members)())


def test_the_kit_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import rarefy.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
