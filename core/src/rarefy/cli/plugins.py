"""Commands about plugins and the installation."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from rarefy.cli.output import json_option, print_json, print_rows

BROKEN_PLUGIN = 4


@click.group()
def plugins() -> None:
    """List, check or start plugins."""


@plugins.command("list")
@json_option
def list_plugins(as_json: bool) -> None:
    """List the installed plugins without loading them."""
    from rarefy.registry import discover

    found = discover()
    if as_json:
        print_json([asdict(plugin) for plugin in found])
    elif found:
        print_rows(
            ("plugin", "distribution", "version", "module", "state"),
            [(p.name, p.distribution, p.version, p.module, p.state) for p in found],
        )
    else:
        click.echo("no plugin is installed; start with `pip install rarefy-pruning`")


@plugins.command()
@json_option
def check(as_json: bool) -> None:
    """Load every plugin and say how it fared; exits 4 when one is broken."""
    from rarefy.nouns import implementation
    from rarefy.registry import get

    registry = get()
    broken = {plugin.name: plugin.error for plugin in registry.failed}
    nouns = {**registry.techniques, **registry.objectives, **registry.exporters, **registry.sources}
    for name, noun in nouns.items():
        try:
            implementation(noun)
        except Exception as error:  # whatever a plugin's module raises is this command's finding
            broken[name] = str(error)
    if as_json:
        print_json({"plugins": [asdict(plugin) for plugin in registry.plugins], "broken": broken})
    else:
        print_rows(
            ("plugin", "distribution", "version", "state"),
            [(p.name, p.distribution, p.version, p.state) for p in registry.plugins],
        )
        for name, reason in broken.items():
            click.echo(f"broken: {name}: {reason}", err=True)
    if broken:
        sys.exit(BROKEN_PLUGIN)


@plugins.command()
@click.argument("family")
@click.argument("name")
@click.option("--directory", "-d", type=click.Path(path_type=Path), default=Path(), help="Where to put the package.")
def new(family: str, name: str, directory: Path) -> None:
    """Write an installable package for the technique FAMILY/NAME, with a test that passes."""
    from rarefy.scaffold import new_plugin

    folder = new_plugin(family, name, directory)
    click.echo(
        f"wrote {folder}\n\nnext:\n  pip install --no-deps -e {folder}\n  pytest {folder}\n"
        f"then name {family}/{name} in a recipe, such as {folder / 'recipe.yaml'}"
    )


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation: versions, extras, plugins, and what is missing for what."""
    from rarefy.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_rows(("", "what", "found", "advice"), [(f.mark, f.what, f.found, f.advice) for f in findings])
    if any(finding.level == "error" for finding in findings):
        sys.exit(BROKEN_PLUGIN)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL, such as `eval "$(rarefy completion bash)"`."""
    from click.shell_completion import get_completion_class

    from rarefy.cli.app import cli

    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"click has no completion for {shell}")
    click.echo(script(cli, {}, "rarefy", "_RAREFY_COMPLETE").source())


COMMANDS = (plugins, doctor, completion)
