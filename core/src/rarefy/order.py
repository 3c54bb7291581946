"""Whether the steps of a recipe can follow each other, judged by their traits alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from rarefy_schemas import TechniqueConfig

from rarefy.errors import RecipeError


def conflict(earlier: TechniqueConfig, later: TechniqueConfig) -> str | None:
    """Return why `later` cannot come after `earlier`, or None."""
    before, after = earlier.traits, later.traits
    first, second = earlier.registered_name(), later.registered_name()
    if after.new_architecture:
        return f"{second!r} starts a new network, so everything that {first!r} did would be thrown away"
    if before.leaves_codes and after.needs_dense_floats:
        return f"{first!r} leaves weights that share few values, and {second!r} needs weights that can take any value"
    if before.leaves_codes and after.changes_shapes:
        return f"{first!r} leaves weights that share few values, and {second!r} replaces those weights"
    if before.leaves_codes and later.finetune is not None and not after.leaves_codes:
        return f"{first!r} leaves weights that share few values, and fine-tuning {second!r} would move them apart"
    if before.makes_zeros and not after.keeps_zeros:
        return f"{first!r} leaves zeros, and {second!r} would fill them again"
    if before.ends_training and later.finetune is not None:
        return f"nothing can be fine-tuned after {first!r}"
    return None


def _conflicts(steps: Sequence[TechniqueConfig]) -> list[tuple[int, str]]:
    return [
        (later, reason)
        for later in range(len(steps))
        for earlier in range(later)
        if (reason := conflict(steps[earlier], steps[later])) is not None
    ]


def check_order(steps: Sequence[TechniqueConfig]) -> None:
    """Raise `RecipeError` with the reason and an order that works, when this one cannot."""
    conflicts = _conflicts(steps)
    if not conflicts:
        return
    index, reason = conflicts[0]
    names = [step.registered_name() for step in steps]
    legal = _legal_order(steps)
    advice = (
        f"An order that works: {', '.join(names[i] for i in legal)}."
        if legal
        else "No order of these steps works; leave one out."
    )
    raise RecipeError(f"steps.{index}: {reason}. {advice}")


def _legal_order(steps: Sequence[TechniqueConfig]) -> tuple[int, ...] | None:
    if len(steps) > 7:
        return None
    candidates = permutations(range(len(steps)))
    return next((order for order in candidates if not _conflicts([steps[i] for i in order])), None)
