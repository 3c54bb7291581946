"""From a YAML file to a `Recipe` of installed techniques, with errors that name the place and the allowed values."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args

from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from rarefy_schemas import ExporterConfig, Finetune, Noun, Recipe, Schema, TaskLoss, TechniqueConfig

from rarefy import recipes, yaml
from rarefy.errors import RecipeError, did_you_mean
from rarefy.order import check_order
from rarefy.registry import Registry, get


def recipe_type(registry: Registry | None = None) -> type[Recipe]:
    """Return the recipe class whose steps, objectives and formats are exactly the installed ones."""
    return _recipe_type(registry or get())


@lru_cache(maxsize=8)
def _recipe_type(registry: Registry) -> type[Recipe]:
    objective = _one_of(registry.objectives.values())
    finetune = create_model("Finetune", __base__=Finetune, objective=(objective, Field(default=TaskLoss())))
    techniques = [_with_finetune(config, finetune) for config in registry.techniques.values()]
    step = _one_of(techniques) if techniques else TechniqueConfig
    formats = _one_of(registry.exporters.values()) if registry.exporters else ExporterConfig
    export: Any = Annotated[formats, BeforeValidator(_from_name, json_schema_input_type=str | formats)]
    return create_model(
        "Recipe",
        __base__=Recipe,
        train_first=(finetune | None, _field(Recipe, "train_first")),
        steps=(tuple[step, ...], _field(Recipe, "steps")),  # type: ignore[valid-type]
        export=(tuple[export, ...], _field(Recipe, "export")),
    )


def json_schema(registry: Registry | None = None) -> dict[str, Any]:
    """Return the JSON Schema of recipes, with everything installed."""
    schema = recipe_type(registry).model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "rarefy recipe"}


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = (), registry: Registry | None = None
) -> Recipe:
    """Return the validated recipe of a file, a mapping or a `Recipe`; without such a file, the shipped one of the name.

    `overrides` are `path=value` texts such as `steps.0.amount=0.9`; the value is YAML.
    Raises `RecipeError` with file, line and column.
    """
    registry = registry or get()
    if isinstance(source, Recipe):
        if list(overrides):
            raise RecipeError("overrides need a recipe from a file or a mapping; use model_copy on a Recipe")
        recipe = source
    else:
        document = (
            yaml.Document(copy.deepcopy(dict(source)), "recipe")
            if isinstance(source, Mapping)
            else yaml.read(recipes.find(source))
        )
        recipe = _validate(_overridden(document, overrides), registry)
    check_order(recipe.steps)
    return recipe


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values that `load_recipe` reads back."""
    return recipe.model_dump(mode="json")


def _validate(document: yaml.Document, registry: Registry) -> Recipe:
    if not isinstance(document.data, dict):
        raise RecipeError(f"{document.place(())}: a recipe is a mapping with the keys `model`, `task` and `steps`")
    if not registry.techniques:
        failed = "; ".join(f"{plugin.name}: {plugin.error}" for plugin in registry.failed)
        raise RecipeError(
            "no technique is installed, so a recipe has nothing to apply; install a plugin such as "
            f"`pip install rarefy-pruning`{f' (failed to load: {failed})' if failed else ''}"
        )
    try:
        return recipe_type(registry).model_validate(document.data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        inner = {detail["loc"][0] for detail in found if len(detail["loc"]) > 1}
        # a list whose items are wrong is reported as too short as well
        found = [detail for detail in found if detail["type"] != "too_short" or detail["loc"][0] not in inner]
        lines = [_explain(detail, document) for detail in found]
        raise RecipeError("\n".join(lines)) from None


def _explain(detail: ErrorDetails, document: yaml.Document) -> str:
    tags = _tags(document.data, detail["loc"])
    location = tuple(part for i, part in enumerate(detail["loc"]) if i not in tags)
    path = ".".join(str(part) for part in location)
    place, context = document.place(location), detail.get("ctx", {})
    if detail["type"] == "union_tag_invalid":
        key = str(context["discriminator"]).strip("'")
        allowed = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        place = document.place((*location, key))
        return f"{place}: {path}.{key}: {context['tag']!r} is not installed. {did_you_mean(context['tag'], allowed)}"
    if detail["type"] == "union_tag_not_found":
        key = str(context["discriminator"]).strip("'")
        return f"{place}: {path}: the key `{key}` is missing; it names what to use"
    if detail["type"] == "extra_forbidden":
        allowed = _allowed_keys(document.data, location[:-1])
        hint = f" {did_you_mean(str(location[-1]), allowed)}" if allowed else ""
        return f"{place}: {path}: there is no option of this name.{hint}"
    given = "" if isinstance(detail["input"], (dict, list)) else f", not {detail['input']!r}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {path}: {message[:1].lower()}{message[1:]}{given}"


def _tags(data: Any, location: Sequence[int | str]) -> set[int]:
    """Return the positions in `location` that pydantic added for the member of a union, not found in the data."""
    tags: set[int] = set()
    for i, part in enumerate(location):
        found = _child(data, part)
        if found is not None:
            data = found
            continue
        names = [data.get(key) for key in ("technique", "objective", "format")] if isinstance(data, dict) else []
        if part not in names and not str(part).startswith(("function-", "nullable")):
            break
        tags.add(i)
    return tags


def _child(data: Any, part: int | str) -> Any:
    if isinstance(data, dict):
        return data.get(part)
    if isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def _allowed_keys(data: Any, location: Sequence[int | str]) -> list[str]:
    """Return the option names of the object at `location` in the recipe."""
    registry = get()
    tables: dict[str, Mapping[str, type[Any]]] = {
        "technique": registry.techniques,
        "format": registry.exporters,
        "objective": registry.objectives,
    }
    model: type[Any] | None = Recipe
    for part in location:
        data = _child(data, part)
        names = data if isinstance(data, dict) else {}
        named = [table[names[key]] for key, table in tables.items() if str(names.get(key)) in table]
        if named:
            model = named[0]
        elif model is not None and part in model.model_fields:
            model = _model_of(model.model_fields[str(part)].annotation)
    return list(model.model_fields) if model is not None else []


def _model_of(annotation: Any) -> type[Any] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Schema):
            return candidate
    return None


def _overridden(document: yaml.Document, overrides: Iterable[str]) -> yaml.Document:
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {text}: write PATH=VALUE, such as steps.0.amount=0.9")
        *parents, last = path.split(".")
        node = document.data
        for i, part in enumerate(parents):
            node = _enter(node, part, ".".join(parents[: i + 1]), text)
        parsed = yaml.parse(value, f"--set {text}").data if value.strip() else value
        if isinstance(node, list):
            _enter(node, last, path, text)
            node[int(last)] = parsed
        elif isinstance(node, dict):
            node[last] = parsed
        else:
            raise RecipeError(f"--set {text}: {'.'.join(parents)} has no parts to set")
    return document


def _enter(node: Any, part: str, path: str, text: str) -> Any:
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    if isinstance(node, list):
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        raise RecipeError(f"--set {text}: {path}: write an index from 0 to {len(node) - 1}")
    raise RecipeError(f"--set {text}: {path} has no parts to set")


def _from_name(value: Any) -> Any:
    return {"format": value} if isinstance(value, str) else value


def _one_of(configs: Iterable[type[Noun]]) -> Any:
    classes = tuple(configs)
    if len(classes) == 1:
        return classes[0]
    return Annotated[Union[classes], Field(discriminator=classes[0].noun)]  # noqa: UP007


def _with_finetune(config: type[TechniqueConfig], finetune: type[Finetune]) -> type[TechniqueConfig]:
    field: Any = (finetune | None, _field(config, "finetune"))
    return create_model(
        config.__name__, __base__=config, __module__=config.__module__, __doc__=config.__doc__, finetune=field
    )


def _field(model: type[Schema], name: str) -> FieldInfo:
    return copy.copy(model.model_fields[name])
