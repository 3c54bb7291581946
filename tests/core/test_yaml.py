"""Recipes mean what people read in them, and every error has a place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rarefy import yaml
from rarefy.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("12", 12),
        ("012", 12),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("2020-01-01", "2020-01-01"),
        ("1:30", "1:30"),
        ("'5'", "5"),
        ("-", None),
    ],
)
def test_scalars(text: str, value: object) -> None:
    parsed = yaml.parse(f"a: {text}" if text != "-" else "a:", "x").data["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_given_twice_is_an_error_with_both_places() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:3:1: the key 'seed' is given twice, first in line 1"):
        yaml.parse("seed: 1\nname: x\nseed: 2\n", "r.yaml")
    with pytest.raises(RecipeError, match=r"r\.yaml:3:5: the key 'lr'"):
        yaml.parse("steps:\n  - lr: 1\n    lr: 2\n", "r.yaml")


@pytest.mark.parametrize("text", ["a: [1", "a: {", "\t- x", "a: b: c", "!!python/object:os.system {}", "a: !x 1"])
def test_what_is_not_plain_yaml_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+:\d+: not valid YAML"):
        yaml.parse(text, "r.yaml")


def test_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is empty"):
        yaml.parse("# nothing\n", "r.yaml")
    with pytest.raises(RecipeError, match="cannot read"):
        yaml.read(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read"):
        yaml.read(tmp_path / "binary.yaml")


def test_places_point_at_keys_and_items() -> None:
    document = yaml.parse("a:\n  - b: 1\n    c: 2\n", "r.yaml")
    assert document.place(("a", 0, "c")) == "r.yaml:3:5"
    assert document.place(("a", 0)) == "r.yaml:2:5"
    assert document.place(("a", 0, "missing")) == "r.yaml:2:5"


text = st.text() | st.from_regex(r"[-+]?[0-9._]{0,3}[eE]?[-+]?[0-9]{0,2}", fullmatch=True)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(min_size=1), plain, min_size=1))
def test_what_is_dumped_is_read_back(data: dict[str, object]) -> None:
    assert yaml.parse(yaml.dump(data), "x").data == data
