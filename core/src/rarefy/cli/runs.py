"""Commands that run a recipe, and what looks at runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rarefy.cli.output import json_option, print_json, print_rows

if TYPE_CHECKING:
    from rarefy_schemas import Recipe

MISSED_BUDGET = 3


@click.command()
@click.argument("recipe", required=False, type=click.Path())
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder of the run [default: runs/NAME].")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Print the plan with parameters and FLOPs per step, and stop.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe: steps.0.amount=0.9.")
@json_option
def run(
    recipe: str | None,
    output: Path | None,
    resume: Path | None,
    dry_run: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run a RECIPE, a file or a name that `rarefy recipes` lists: compress, fine-tune, measure, export, report."""
    from rarefy.recipe import load_recipe

    if (recipe is None) == (resume is None):
        raise click.UsageError("name a RECIPE, or --resume DIR to go on with a run")
    if resume is not None:
        if not (resume / "recipe.yaml").exists():
            raise click.UsageError(f"{resume} holds no run to resume: there is no recipe.yaml in it")
        recipe, output = str(resume / "recipe.yaml"), resume
    loaded = load_recipe(str(recipe), overrides)
    if dry_run:
        _print_plan(loaded, as_json)
    else:
        _run(loaded, output or free_folder(loaded.name), resume is not None, as_json)


@click.command()
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder of the run [default: runs/quickstart].")
@json_option
def quickstart(output: Path | None, as_json: bool) -> None:
    """Train LeNet-5 on MNIST digits, shrink it about forty-fold, and show the report. Needs the extra `demo`."""
    from rarefy.recipe import load_recipe

    _run(load_recipe("quickstart"), output or free_folder("quickstart"), False, as_json)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison as a page too.")
@json_option
def compare(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Put the results of finished RUNS side by side."""
    from rarefy.report import compare_html, compare_rows
    from rarefy.rundir import load_report

    reports = [load_report(path) for path in runs]
    header, rows = compare_rows(reports)
    if html is not None:
        from rarefy.files import atomic_write

        with atomic_write(html) as temporary:
            temporary.write_text(compare_html(reports), encoding="utf-8")
    if as_json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
    else:
        print_rows(header, rows)


COMMANDS = (run, quickstart, compare)


def free_folder(name: str) -> Path:
    """Return `runs/NAME`, or the first of `runs/NAME-2`, `-3`, ... that holds no run yet."""
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.lower()).strip("-.") or "run"
    folder, number = Path("runs") / slug, 2
    while (folder / "recipe.yaml").exists():
        folder, number = Path("runs") / f"{slug}-{number}", number + 1
    return folder


def _run(recipe: Recipe, output: Path, resume: bool, as_json: bool) -> None:
    from rarefy.distributed import is_main
    from rarefy.pipeline import run as run_pipeline
    from rarefy.report import console

    result = run_pipeline(recipe, output, resume=resume)
    if is_main():
        if as_json:
            print_json(result.report.model_dump(mode="json") | {"directory": str(output)})
        else:
            console(result.report)
            width = max(len(name) for name in ("report", *(export.format for export in result.report.exports)))
            click.echo(f"\n{'report':{width}}  {output / 'report.html'}")
            for export in result.report.exports:
                place = output / "exports" / Path(export.path).name
                click.echo(f"{export.format:{width}}  {place}  {export.bytes:,} bytes")
                for note in export.notes:
                    click.echo(f"{'':{width}}  {note}")
    if result.missed:
        for budget in result.missed:
            click.echo(f"budget missed: {budget.name} is {budget.value:g}, the limit is {budget.limit:g}", err=True)
        sys.exit(MISSED_BUDGET)


def _print_plan(recipe: Recipe, as_json: bool) -> None:
    from rarefy.plan import plan

    rows = plan(recipe)
    if as_json:
        print_json([row.__dict__ for row in rows])
    else:
        print_rows(
            ("step", "technique", "parameters", "FLOPs", "epochs", "note"),
            [(r.step, r.technique, r.parameters, r.flops, r.epochs, r.note) for r in rows],
        )
