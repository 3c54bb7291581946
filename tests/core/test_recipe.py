"""A wrong recipe is refused with file, line, column and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from rarefy.errors import RecipeError
from rarefy.recipe import dump_recipe, json_schema, load_recipe
from rarefy.recipes import find, names
from rarefy_schemas import Recipe

GOOD = """\
model: zoo:lenet5
task: data:digits
steps:
  - technique: pruning/magnitude
    amount: 0.5
    finetune:
      epochs: 1
      objective:
        objective: distillation/logits
  - technique: quantization/kmeans
    bits: 4
export:
  - format: rarefy
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return file


def test_a_good_recipe_round_trips(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.steps[0].registered_name() == "pruning/magnitude"
    assert recipe.steps[0].finetune is not None
    assert recipe.steps[0].finetune.objective.registered_name() == "distillation/logits"
    assert load_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_valid(name: str) -> None:
    assert load_recipe(find(name)).steps


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("pruning/magnitude", "pruning/magnitud", "4:5", "Did you mean 'pruning/magnitude'?"),
        ("distillation/logits", "distilation/logits", "9:9", "Did you mean 'distillation/logits'?"),
        ("format: rarefy", "format: rarfy", "13:5", "Did you mean 'rarefy'?"),
        ("    amount: 0.5", "    amuont: 0.5", "5:5", "Did you mean 'amount'?"),
        ("epochs: 1", "epoch: 1", "7:7", "Did you mean 'epochs'?"),
        ("model:", "modle:", "1:1", "Did you mean 'model'?"),
        ("amount: 0.5", "amount: 1.5", "5:5", "less than 1, not 1.5"),
        ("amount: 0.5", "amount: 0", "5:5", "greater than 0, not 0"),
        ("bits: 4", "bits: four", "11:5", "valid integer"),
        ("technique: quantization/kmeans", "name: x", "10:5", "the key `technique` is missing"),
        ("epochs: 1", "epochs: .inf", "7:7", "finite"),
    ],
)
def test_a_mistake_is_shown_at_its_place(tmp_path: Path, old: str, new: str, place: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, GOOD.replace(old, new, 1)))
    assert f"r.yaml:{place}: " in str(error.value)
    assert message in str(error.value)


def test_all_mistakes_are_shown_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, GOOD.replace("0.5", "7").replace("bits: 4", "bits: 99")))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "42"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, text))


def test_no_steps_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least 1 item"):
        load_recipe({"steps": []})
    with pytest.raises(RecipeError, match="steps: field required"):
        load_recipe({})
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_change_and_add_values(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    recipe = load_recipe(file, ["steps.0.amount=0.75", "seed=3", "budgets.bytes=1000", "steps.1.name=codes"])
    assert recipe.steps[0].amount == 0.75  # type: ignore[attr-defined]
    assert (recipe.seed, recipe.budgets.bytes, recipe.steps[1].name) == (3, 1000, "codes")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.0.amount", "write PATH=VALUE"),
        ("=1", "write PATH=VALUE"),
        ("steps.9.amount=1", "write an index from 0 to 1"),
        ("steps.x.amount=1", "write an index from 0 to 1"),
        ("model.source.deep=1", "has no parts to set"),
        ("steps.0.amount=2", "less than 1"),
        ("steps.0.amount=[", "not valid YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])


def test_the_order_is_checked_when_a_recipe_is_loaded(tmp_path: Path) -> None:
    text = "steps:\n  - technique: quantization/kmeans\n  - {technique: pruning/magnitude, amount: 0.5}\n"
    with pytest.raises(RecipeError, match="An order that works: pruning/magnitude, quantization/kmeans"):
        load_recipe(write(tmp_path, text))


def test_what_has_one_name_may_be_written_as_it() -> None:
    steps = [{"technique": "quantization/kmeans"}]
    short = load_recipe({"model": "zoo:mlp", "task": "data:digits", "steps": steps, "export": ["onnx", "rarefy"]})
    assert (short.model and short.model.source, short.task and short.task.source) == ("zoo:mlp", "data:digits")
    assert [export.registered_name() for export in short.export] == ["onnx", "rarefy"]
    assert load_recipe(dump_recipe(short)) == short
    with pytest.raises(RecipeError, match=r"export\.0\.format: 'onx' is not installed. Did you mean 'onnx'"):
        load_recipe({"steps": steps, "export": ["onx"]})
    schema = json_schema()["properties"]
    assert {"type": "string"} in schema["export"]["items"]["anyOf"]
    assert all({"type": "string"} in schema[name]["anyOf"] for name in ("model", "task"))


def test_files_of_one_format_have_names_of_their_own() -> None:
    both = [{"format": "rarefy", "coder": "huffman", "name": "huffman"}, "rarefy"]
    steps = [{"technique": "pruning/magnitude", "amount": 0.5}]
    assert [export.name for export in load_recipe({"steps": steps, "export": both}).export] == ["huffman", "model"]
    with pytest.raises(RecipeError, match=r"export: two entries would write the same file, 'model' as rarefy"):
        load_recipe({"steps": steps, "export": ["onnx", "rarefy", {"format": "rarefy", "coder": "huffman"}]})
    for name in ("", "../model", "a/b", ".hidden", "-x"):
        with pytest.raises(RecipeError, match=r"export\.0\.name: "):
            load_recipe({"steps": steps, "export": [{"format": "onnx", "name": name}]})


def test_the_json_schema_knows_every_technique_and_describes_every_option() -> None:
    schema = json_schema()
    step = schema["properties"]["steps"]["items"]
    assert "pruning/magnitude" in step["discriminator"]["mapping"]
    for name, definition in schema["$defs"].items():
        for option, part in definition.get("properties", {}).items():
            plain = option in {"technique", "objective", "format", "epochs", "weight_decay", "optimizer"}
            assert plain or "description" in part or "$ref" in part, f"{name}.{option} has no description"


def test_a_recipe_can_be_written_in_python() -> None:
    from rarefy_pruning.weights.config import MagnitudeConfig

    recipe = load_recipe(Recipe(steps=(MagnitudeConfig(amount=0.5),)))
    assert dump_recipe(recipe)["steps"][0]["amount"] == 0.5
