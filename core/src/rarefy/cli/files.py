"""Commands about one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rarefy.cli.output import json_option, print_json, print_rows
from rarefy.cli.tasks import find_task, inputs_option, task_option
from rarefy.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from rarefy.modules import Base

base_option = click.option("--base", metavar="REF", help="Code that builds the original network, when it is your own.")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@task_option
@base_option
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@json_option
def evaluate(file: Path, task_reference: str | None, base: str | None, split: Any, as_json: bool) -> None:
    """Measure the metric of a .rarefy FILE on a split of its task."""
    model, _ = _open(file, base)
    task = find_task(task_reference, file, needed=True)
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
@inputs_option
@base_option
@json_option
def export(
    file: Path,
    target: str,
    output: Path | None,
    task_reference: str | None,
    shapes: tuple[str, ...],
    base: str | None,
    as_json: bool,
) -> None:
    """Write a .rarefy FILE in another format, re-open it, and compare."""
    from rarefy.exporting import float32_bytes
    from rarefy.registry import get

    registry = get()
    if target not in registry.exporters:
        raise RecipeError(f"there is no format {target!r}. {did_you_mean(target, registry.exporters)}")
    model, skeleton = _open(file, base)
    task = find_task(task_reference, file, needed=True, shapes=shapes)
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
        for note in report.notes:
            click.echo(note)


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


COMMANDS = (evaluate, export, inspect)


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
