"""Commands about one model or one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rarefy.cli.output import json_option, print_json, print_rows
from rarefy.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from rarefy.modules import Base
    from rarefy.task import Task

task_option = click.option(
    "--task", "task_reference", metavar="REF", help="Task, such as data:mnist-5k [default: the run's]."
)
base_option = click.option("--base", metavar="REF", help="Code that builds the original network, when it is your own.")


@click.command()
@click.argument("model")
@task_option
@click.option("--weights", type=click.Path(), help="Trained weights of a MODEL that is a reference.")
@click.option("--technique", help="Say what this technique would do to each layer.")
@click.option("--set", "options", multiple=True, metavar="OPTION=VALUE", help="An option of the technique: amount=0.9.")
@json_option
def analyze(
    model: str,
    task_reference: str | None,
    weights: str | None,
    technique: str | None,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show the layers of MODEL (a reference or a .rarefy file), and what a technique would do to them."""
    from rarefy_schemas import ModelReference

    from rarefy import analyze as analyze_model
    from rarefy.artifact import load
    from rarefy.overview import layers
    from rarefy.recipe import load_recipe
    from rarefy.references import build_model

    if model.endswith(".rarefy"):
        network = load(model)
    else:
        network = build_model(ModelReference(source=model, weights=weights), load_weights=True)
    task = _task(task_reference, Path(model), needed=technique is not None)
    if technique is None:
        rows = layers(network, task.example_inputs(1) if task is not None else None)
        if as_json:
            print_json([asdict(row) for row in rows])
        else:
            print_rows(
                ("layer", "type", "parameters", "share %", "zeros %", "FLOPs"),
                [(r.name, r.kind, r.parameters, r.share * 100, r.sparsity * 100, r.flops) for r in rows],
            )
        return
    assert task is not None
    overrides = [f"steps.0.{option}" for option in options]
    config = load_recipe({"steps": [{"technique": technique}]}, overrides).steps[0]
    analysis = analyze_model(network, config, task)
    if as_json:
        print_json(
            {
                "layers": [layer.model_dump() for layer in analysis.layers],
                "skipped": [layer.model_dump() for layer in analysis.skipped],
            }
        )
        return
    planned = [
        (x.name, x.kind, x.action, ", ".join(f"{k} {v:.4g}" for k, v in x.scores.items())) for x in analysis.layers
    ]
    planned += [(x.name, x.kind, "left alone", x.reason) for x in analysis.skipped]
    print_rows(("layer", "type", "what would happen", "figures or reason"), planned)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@task_option
@base_option
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@json_option
def evaluate(file: Path, task_reference: str | None, base: str | None, split: Any, as_json: bool) -> None:
    """Measure the metric of a .rarefy FILE on a split of its task."""
    model, _ = _open(file, base)
    task = _task(task_reference, file, needed=True)
    assert task is not None
    value = task.score(model, split)
    if as_json:
        print_json({"file": str(file), "split": split, "metric": task.metric, "value": value})
    else:
        click.echo(f"{task.metric} on {split}: {value:.6g}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, help="Format, such as onnx, torch-export or safetensors.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder [default: the file's].")
@task_option
@base_option
@json_option
def export(
    file: Path, target: str, output: Path | None, task_reference: str | None, base: str | None, as_json: bool
) -> None:
    """Write a .rarefy FILE in another format, re-open it, and compare."""
    from rarefy.exporting import float32_bytes
    from rarefy.registry import get

    registry = get()
    if target not in registry.exporters:
        raise RecipeError(f"there is no format {target!r}. {did_you_mean(target, registry.exporters)}")
    model, skeleton = _open(file, base)
    task = _task(task_reference, file, needed=True)
    report = registry.hook.export(
        model=model,
        base=skeleton,
        task=task,
        config=registry.exporters[target](),
        directory=output or file.parent,
        original_bytes=float32_bytes(skeleton),
    )
    if as_json:
        print_json(report.model_dump())
    else:
        click.echo(f"{report.path}: {report.bytes:,} bytes, outputs differ by at most {report.max_difference:.2g}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Show what a .rarefy FILE holds, tensor by tensor."""
    from rarefy import artifact

    manifest, rows = artifact.read_manifest(file), artifact.inspect(file)
    if as_json:
        print_json({"manifest": manifest.model_dump(mode="json"), "tensors": [asdict(row) for row in rows]})
        return
    click.echo(f"{file}: {file.stat().st_size:,} bytes, format {manifest.version}, written by {manifest.creator}")
    base = manifest.spec.base
    click.echo(f"base: {base.source if base else 'none' if manifest.spec.root else 'your own code'}")
    for name, module in manifest.spec.modules.items():
        click.echo(f"replaced: {name or 'the whole network'} by {module.kind}")
    click.echo("")
    print_rows(tuple(asdict(rows[0])) if rows else ("tensor",), [tuple(asdict(row).values()) for row in rows])


COMMANDS = (analyze, evaluate, export, inspect)


def _open(file: Path, base: str | None) -> tuple[nn.Module, Base]:
    from rarefy_schemas import ModelReference

    from rarefy.artifact import load, read_manifest
    from rarefy.modules import Base
    from rarefy.references import build_model

    stored = read_manifest(file).spec.base
    reference = ModelReference(source=base) if base is not None else stored
    if base is not None:
        own = ModelReference(source=base, options=stored.options if stored else {})
        return load(file, base=lambda: build_model(own)), Base(lambda: build_model(own), own)
    model = load(file)
    if reference is None:
        return model, Base(lambda: load(file), None)
    return model, Base(lambda: build_model(reference), reference)


def _task(reference: str | None, file: Path, *, needed: bool) -> Task | None:
    from rarefy_schemas import TaskReference

    from rarefy import yaml
    from rarefy.references import build_task

    if reference is not None:
        return build_task(TaskReference(source=reference))
    recipe = file.parent.parent / "recipe.yaml"
    if recipe.exists():
        task = yaml.read(recipe).data.get("task")
        if task:
            return build_task(TaskReference.model_validate(task))
    if needed:
        raise RecipeError(
            f"which task? name one with --task, such as data:mnist-5k (no run's recipe lies beside {file})"
        )
    return None
