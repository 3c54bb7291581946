"""Commands about what can be written in a recipe. None of them imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rarefy.cli.output import json_option, print_json, print_rows
from rarefy.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy_schemas.base import Schema


@click.command()
@click.argument("name", required=False)
@json_option
def techniques(name: str | None, as_json: bool) -> None:
    """List the installed techniques, or explain technique NAME with its options."""
    from rarefy.registry import get

    registry = get()
    if name is None:
        rows = [(key, config.summary(), registry.owner(key)) for key, config in registry.techniques.items()]
        if as_json:
            print_json([{"technique": n, "summary": s, "distribution": d} for n, s, d in rows])
        elif rows:
            print_rows(("technique", "what it does", "from"), rows)
        else:
            click.echo("no technique is installed; start with `pip install rarefy-pruning`")
        return
    if name not in registry.techniques:
        raise RecipeError(f"there is no technique {name!r}. {did_you_mean(name, registry.techniques)}")
    config = registry.techniques[name]
    description: dict[str, Any] = {
        "technique": name,
        "summary": config.summary(),
        "paper": config.paper,
        "distribution": registry.owner(name),
        "traits": config.traits.model_dump(),
        "options": options_of(config),
    }
    if as_json:
        print_json(description)
        return
    click.echo(f"{name} ({description['distribution']})\n\n{(config.__doc__ or '').strip()}\n")
    click.echo(f"paper: {config.paper or 'none named'}\n")
    print_rows(("option", "type", "default", "what it means"), [tuple(row.values()) for row in description["options"]])
    needs = ", ".join(key for key, value in config.traits.model_dump().items() if value is True)
    click.echo(f"\nlayers: {', '.join(config.traits.layers)}\ndata: {config.traits.data}\ntraits: {needs or 'none'}")


def options_of(config: type[Schema]) -> list[dict[str, Any]]:
    """Return name, type, default and description of each option of a schema, those of parts as `part.option`."""
    schema, noun = config.model_json_schema(), getattr(config, "noun", None)
    return [row for row in _options(schema, schema.get("$defs", {})) if row["option"] != noun]


def _options(schema: dict[str, Any], definitions: dict[str, Any], before: str = "") -> Iterator[dict[str, Any]]:
    required = schema.get("required", [])
    for name, part in schema["properties"].items():
        yield {
            "option": f"{before}{name}",
            "type": type_text(part, definitions),
            "default": "required" if name in required else _default(part),
            "description": " ".join(part.get("description", "").split()),
        }
        for inner in part.get("anyOf", [part]):
            within = definitions.get(str(inner.get("$ref", "")).rsplit("/", 1)[-1], {})
            if "properties" in within:
                yield from _options(within, definitions, f"{before}{name}.")


def type_text(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a JSON Schema type in words, with choices and bounds."""
    if "$ref" in part:
        name = str(part["$ref"]).rsplit("/", 1)[-1]
        found = definitions.get(name, {})
        if "enum" in found:
            return type_text(found, definitions)
        return "mapping" if found.get("properties") else name.removesuffix("Config").lower()
    if "anyOf" in part:
        texts = [type_text(each, definitions) for each in part["anyOf"]]
        return "any" if "object" in texts else " or ".join(dict.fromkeys(texts))
    if "const" in part or "enum" in part:
        return " | ".join(str(value) for value in part.get("enum", [part.get("const")]))
    if part.get("type") == "array":
        return f"list of {type_text(part.get('items', {}), definitions)}"
    if part.get("type") == "object" and isinstance(part.get("additionalProperties"), dict):
        return f"mapping to {type_text(part['additionalProperties'], definitions)}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = " and ".join(f"{sign} {part[key]:.10g}" for key, sign in signs.items() if key in part)
    return " ".join(filter(None, (str(part.get("type", "any")), bounds)))


def _default(part: dict[str, Any]) -> str:
    value = part.get("default")
    if isinstance(value, dict) and value:
        return "as below" if len(value) > 1 else str(next(iter(value.values())))
    return "none" if value is None else str(value)


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe: steps.0.amount=0.9.")
@json_option
def validate(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a RECIPE against the installed techniques and their order."""
    from rarefy.recipe import dump_recipe, load_recipe

    loaded = load_recipe(recipe, overrides)
    if as_json:
        print_json(dump_recipe(loaded))
    else:
        steps = ", ".join(step.registered_name() for step in loaded.steps)
        click.echo(f"{recipe} is valid: {steps}")


@click.command()
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to a file instead of the screen.")
def schema(output: Path | None) -> None:
    """Print the JSON Schema of recipes, for completion in editors."""
    import json

    from rarefy.recipe import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    from rarefy.files import atomic_write

    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


@click.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes that ship with rarefy, or print recipe NAME as a start for your own."""
    from rarefy.recipes import find, names, title

    if name is not None:
        click.echo(find(name).read_text(encoding="utf-8"), nl=False)
        return
    rows = [(each, title(each)) for each in names()]
    if as_json:
        print_json([{"recipe": each, "summary": summary} for each, summary in rows])
    else:
        print_rows(("recipe", "what it does"), rows)


COMMANDS = (techniques, recipes, validate, schema)
