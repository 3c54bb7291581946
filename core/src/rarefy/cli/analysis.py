"""`rarefy analyze`: the layers of a model, its dependency groups, or what a technique would do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rarefy.cli.output import json_option, print_json, print_rows
from rarefy.cli.tasks import find_task, inputs_option, task_option

if TYPE_CHECKING:
    from rarefy_schemas import TechniqueConfig
    from torch import nn

    from rarefy.task import Task


@click.command()
@click.argument("model")
@task_option
@inputs_option
@click.option("--weights", type=click.Path(), help="Trained weights of a MODEL that is a reference.")
@click.option("--technique", help="Say what this technique would do to each layer.")
@click.option("--set", "options", multiple=True, metavar="OPTION=VALUE", help="An option of the technique: amount=0.9.")
@click.option("--groups", is_flag=True, help="Show the units that must be cut together, and what is pinned and why.")
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Measure the loss: with --groups, units of each masked; with --technique, one layer treated at a time.",
)
@click.option(
    "--vary",
    metavar="OPTION=V1,V2,...",
    help="With --technique --sensitivity: an option of the technique at several values, as bits=8,4,3.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="With --groups: draw them to a .svg, .png or .html file.")
@json_option
def analyze(
    model: str,
    task_reference: str | None,
    shapes: tuple[str, ...],
    weights: str | None,
    technique: str | None,
    options: tuple[str, ...],
    groups: bool,
    sensitivity: bool,
    vary: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show the layers of MODEL (a reference or a .rarefy file), its groups, or what a technique would do to them."""
    if technique is not None and groups:
        raise click.UsageError("--groups shows the groups themselves; leave out --technique")
    if not groups and plot is not None:
        raise click.UsageError("--plot belongs to --groups; add it")
    if sensitivity and not groups and technique is None:
        raise click.UsageError("--sensitivity belongs to --groups or to --technique; add one of them")
    if vary is not None and not (sensitivity and technique is not None):
        raise click.UsageError("--vary belongs to --technique with --sensitivity; add both")
    network = _network(model, weights)
    task = find_task(task_reference, Path(model), needed=groups or technique is not None, shapes=shapes)
    if task is not None and groups:
        _show_groups(network, task, sensitivity, plot, as_json, model)
    elif task is not None and technique is not None and sensitivity:
        _show_effects(network, task, technique, options, vary, as_json)
    elif task is not None and technique is not None:
        _show_technique(network, task, technique, options, as_json)
    else:
        _show_layers(network, task, as_json)


COMMANDS = (analyze,)


def _network(model: str, weights: str | None) -> nn.Module:
    from rarefy_schemas import ModelReference

    from rarefy.artifact import load
    from rarefy.references import build_model

    if model.endswith(".rarefy"):
        return load(model)
    return build_model(ModelReference(source=model, weights=weights), load_weights=True)


def _show_layers(network: nn.Module, task: Task | None, as_json: bool) -> None:
    from rarefy.overview import layers

    rows = layers(network, task.example_inputs(1) if task is not None else None)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    print_rows(
        ("layer", "type", "parameters", "share %", "zeros %", "FLOPs"),
        [(r.name, r.kind, r.parameters, r.share * 100, r.sparsity * 100, r.flops) for r in rows],
    )


def _show_groups(
    network: nn.Module, task: Task, sensitivity: bool, plot: Path | None, as_json: bool, title: str
) -> None:
    from rarefy.dependencies.overview import LEVELS, group_rows

    if plot is not None:
        from rarefy.report.group_plot import check_ending, draw_groups

        check_ending(plot)
    rows = group_rows(network, task, sensitivity=sensitivity)
    if plot is not None:
        draw_groups(rows, plot, f"Groups of {title}")
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    measured = [f"loss, {level:.0%} masked" for level in LEVELS] if sensitivity else []
    header = ("group", "kind", "units", "tensors", "parameters", "FLOPs saved by half %", *measured, "remark")
    print_rows(
        header,
        [
            (
                r.name,
                r.kind,
                r.units,
                len(r.members),
                r.parameters,
                None if r.flops_saved is None else r.flops_saved * 100,
                *(r.increases or (None,) * len(measured)),
                f"pinned: {r.pinned}" if r.pinned else "changes statistics" if r.changes_statistics else "",
            )
            for r in rows
        ],
    )


def _show_effects(
    network: nn.Module, task: Task, technique: str, options: tuple[str, ...], vary: str | None, as_json: bool
) -> None:
    from rarefy.sensitivity import Increase, layer_effects

    option, _, values = (vary or "").partition("=")
    if vary is not None and not (option and values):
        raise click.UsageError(f"--vary {vary}: write OPTION=V1,V2,..., such as bits=8,4,3")
    settings = [f"{option}={value}" for value in values.split(",")] if vary is not None else [""]
    increase = Increase(network, task)
    found = {
        setting: layer_effects(network, _config(technique, (*options, *filter(None, [setting]))), task, increase)
        for setting in settings
    }
    if as_json:
        print_json([{"setting": setting, **asdict(row)} for setting, rows in found.items() for row in rows])
        return
    by_layer = {setting: {row.name: row for row in rows} for setting, rows in found.items()}
    layers = {row.name: row.kind for rows in found.values() for row in rows}
    measure = "loss" if increase.labelled else "outputs"
    header = ["layer", "type"]
    for setting in settings:
        header += [f"{measure} {setting}".strip(), f"dB {setting}".strip()]
    table, remarks = [], {}
    for name, kind in layers.items():
        cells: list[float | str | None] = [name, kind]
        for setting in settings:
            row = by_layer[setting].get(name)
            cells += [row.increase, row.signal_to_noise] if row is not None else [None, None]
            if row is not None and row.remark:
                remarks[name] = row.remark
        table.append(tuple(cells))
    print_rows(tuple(header), table)
    for name, remark in remarks.items():
        click.echo(f"{name}: {remark}")


def _show_technique(network: nn.Module, task: Task, technique: str, options: tuple[str, ...], as_json: bool) -> None:
    from rarefy import analyze as analyze_model

    analysis = analyze_model(network, _config(technique, options), task)
    if as_json:
        print_json(
            {
                "layers": [layer.model_dump() for layer in analysis.layers],
                "skipped": [layer.model_dump() for layer in analysis.skipped],
            }
        )
        return
    click.echo(str(analysis))


def _config(technique: str, options: tuple[str, ...]) -> TechniqueConfig:
    from rarefy.recipe import load_recipe

    overrides = [f"steps.0.{option}" for option in options]
    return load_recipe({"steps": [{"technique": technique}]}, overrides).steps[0]
