"""Plain data (numbers, strings, booleans, None and sequences of these) to JSON and back, exactly."""

from __future__ import annotations

import json
import math
from enum import Enum
from typing import Any

from rarefy.errors import ArtifactError

_SPECIAL = ("inf", "-inf", "nan")


def is_plain(value: Any) -> bool:
    """Tell whether `value` is plain data."""
    if isinstance(value, tuple | list):
        return all(is_plain(item) for item in value)
    return value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum))


def to_json(value: Any) -> Any:
    """Return the JSON form of plain data; JSON has no infinities, so those become `{"float": "inf"}`."""
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    return value


def from_json(value: Any) -> Any:
    """Return plain data from its JSON form, sequences as tuples; raise `ArtifactError` for anything else."""
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if isinstance(value, dict):
        if list(value) != ["float"] or value["float"] not in _SPECIAL:
            raise ArtifactError(f"{value!r} is not plain data; the file was not written by rarefy")
        return float(value["float"])
    return value


def same(one: Any, other: Any) -> bool:
    """Tell whether two plain values are the same, types included (`1` is not `True`, a NaN equals itself)."""
    return json.dumps(to_json(one)) == json.dumps(to_json(other))
