"""Schemas refuse what they do not know, say what they mean, and need nothing but pydantic."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ValidationError
from rarefy_schemas import (
    Budgets,
    Evaluate,
    Finetune,
    Manifest,
    Measurement,
    ModelReference,
    ModelSpec,
    ModuleSpec,
    Recipe,
    Report,
    Schema,
    StageReport,
    Targets,
    TaskReference,
    TechniqueConfig,
    TensorEntry,
)
from rarefy_schemas.base import Noun


class Step(TechniqueConfig):
    """Does something.

    More about it.
    """

    technique: Literal["x/step"] = "x/step"


def every_schema() -> list[type[Schema]]:
    found, todo = [], [Schema]
    while todo:
        todo += (kinds := todo.pop().__subclasses__())
        found += [kind for kind in kinds if kind.__module__.startswith("rarefy_schemas")]
    return found


@pytest.mark.parametrize("schema", every_schema(), ids=lambda schema: schema.__name__)
def test_every_schema_is_frozen_strict_and_documented(schema: type[Schema]) -> None:
    assert schema.model_config["frozen"]
    assert schema.model_config["extra"] == "forbid"
    assert schema.__doc__


def test_importing_the_schemas_imports_no_torch() -> None:
    code = "import rarefy_schemas, sys; assert not {'torch', 'numpy', 'rarefy', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("targets", "name", "kind", "matches"),
    [
        ({}, "conv1", "Conv2d", True),
        ({"include": ["conv*"]}, "conv1", "Conv2d", True),
        ({"include": ["conv*"]}, "fc", "Linear", False),
        ({"include": ["fc", "conv*"], "exclude": ["conv1"]}, "conv1", "Conv2d", False),
        ({"types": ["Linear"]}, "conv1", "Conv2d", False),
        ({"include": ["features.*"]}, "features.0.conv", "Conv2d", True),
        ({"include": ["Conv*"]}, "conv1", "Conv2d", False),
    ],
)
def test_targets(targets: dict[str, Any], name: str, kind: str, matches: bool) -> None:
    assert Targets.model_validate(targets).matches(name, kind) is matches


def test_a_reference_can_be_a_plain_string() -> None:
    recipe = Recipe(model="zoo:lenet5", task="data:digits", steps=(Step(),))  # type: ignore[arg-type]
    assert recipe.model == ModelReference(source="zoo:lenet5")
    assert recipe.task == TaskReference(source="data:digits")


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (Finetune, {"epochs": -1}),
        (Finetune, {"lr": 0}),
        (Finetune, {"lr": float("nan")}),
        (Finetune, {"epoch": 1}),
        (Finetune, {"warmup": 1}),
        (Budgets, {"bytes": 0}),
        (Budgets, {"latency": 0}),
        (Budgets, {"accuracy_drop": -0.1}),
        (Evaluate, {"batch_sizes": [0]}),
        (Evaluate, {"rounds": 2}),
        (Targets, {"include": []}),
        (ModelReference, {"source": ""}),
        (Recipe, {"steps": []}),
        (Recipe, {"steps": [{}], "seed": -1}),
        (
            TensorEntry,
            {"name": "w", "dtype": "complex64", "shape": [], "coding": "raw", "length": 0, "sha256": "0" * 64},
        ),
        (TensorEntry, {"name": "w", "dtype": "int8", "shape": [-1], "coding": "raw", "length": 0, "sha256": "0" * 64}),
        (
            TensorEntry,
            {"name": "w", "dtype": "int8", "shape": [2**50], "coding": "raw", "length": 0, "sha256": "0" * 64},
        ),
        (TensorEntry, {"name": "w", "dtype": "int8", "shape": [1], "coding": "raw", "length": 1, "sha256": "xyz"}),
    ],
)
def test_values_out_of_bounds_are_refused(schema: type[Schema], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        schema.model_validate(values)


def test_the_name_of_a_noun_is_its_literal() -> None:
    assert Step.registered_name() == "x/step"
    assert Step.summary() == "Does something."

    class Nameless(TechniqueConfig):
        """Has no name."""

    class Two(TechniqueConfig):
        """Has two."""

        technique: Literal["a", "b"] = "a"

    class Text(TechniqueConfig):
        """Is not fixed."""

        technique: str = "a"

    for wrong in (Nameless, Two, Text, Noun):
        with pytest.raises(TypeError, match=r"needs a field|exactly one name"):
            wrong.registered_name()


def test_a_recipe_keeps_the_options_of_its_steps_when_dumped() -> None:
    class Amount(TechniqueConfig):
        """Takes an amount."""

        paper: ClassVar[str] = "none"
        technique: Literal["x/amount"] = "x/amount"
        amount: float = 0.5

    assert Recipe(steps=(Amount(amount=0.25),)).model_dump()["steps"][0]["amount"] == 0.25


def test_a_report_round_trips_with_infinite_figures() -> None:
    stage = StageReport(index=-1, name="original", measurements=(Measurement(name="loss", value=float("inf")),))
    report = Report(name="x", status="done", metric="accuracy", recipe={}, seed=0, baseline=stage)
    assert Report.model_validate_json(report.model_dump_json()).baseline.value("loss") == float("inf")
    assert stage.value("nothing") is None


def test_a_manifest_round_trips_with_nested_modules() -> None:
    leaf = ModuleSpec(kind="torch.nn.Linear", arguments={"in_features": 2, "out_features": 3})
    spec = ModelSpec(root=ModuleSpec(kind="torch.nn.Sequential", children={"0": leaf}), ties={"b": "a"})
    entry = TensorEntry(name="0.weight", dtype="float32", shape=(3, 2), coding="raw", length=24, sha256="0" * 64)
    manifest = Manifest(version=1, creator="rarefy", spec=spec, tensors=(entry,))
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
