"""Bits per layer under a common budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rarefy.errors import StageError
from rarefy.sensitivity import Increase, layer_effects
from rarefy.task import Task
from torch import nn

from rarefy_quantization.budget import BitTarget
from rarefy_quantization.config import GridQuantization, UniformConfig

_MOST = 20_000
"""Partial allocations that are kept after each layer."""


def allocate(
    model: nn.Module,
    config: GridQuantization,
    target: BitTarget,
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
    task: Task,
) -> dict[str, int]:
    """Return the bits of each layer, `fixed` where given, so that all codes fit the target at the least effect.

    `sizes` are the numbers of weights of the layers. The effect of bits on a layer is that on it alone of the technique
    `config`, or of rounding. Raises `StageError` when even the fewest bits do not fit, or a layer cannot be tried.
    """
    whole = sum(sizes.values())
    most = int(target.most * (whole if target.measure == "bits" else 8))
    free, choices = [name for name in sizes if name not in fixed], sorted(set(target.choices))
    left = most - sum(sizes[name] * bits for name, bits in fixed.items())
    least = sum(sizes[name] * choices[0] for name in free)
    if least > left:
        count = (least + most - left) / (whole if target.measure == "bits" else 8)
        raise StageError(
            f"`target` allows {target.most:,g} {target.measure} of codes, and the fewest bits of its `choices`, "
            f"{choices[0]}, with those of `per_layer`, take {count:,.3g}; allow more, or give fewer bits"
        )
    effects = _effects(model, config, target, fixed, choices, task)
    costs = [[sizes[name] * bits for bits in choices] for name in free]
    picks = best_within(costs, [effects[name] for name in free], left)
    return {**fixed, **{name: choices[pick] for name, pick in zip(free, picks, strict=True)}}


def best_within(costs: Sequence[Sequence[int]], effects: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Return one choice per item with the least sum of `effects` whose `costs` add up to at most `budget`.

    Item by item all partial choices are kept that none beats in both sums. That is exact, up to the number that is
    kept; beyond it the best in each of as many slices of the budget stay. Something has to fit.
    """
    cost, effect = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    cheapest = [min(own) for own in costs]
    rest = [sum(cheapest[number:]) for number in range(1, len(costs) + 1)]
    for own_costs, own_effects, needed in zip(costs, effects, rest, strict=True):
        sums = np.add.outer(cost, np.asarray(own_costs, float)).ravel()
        totals = np.add.outer(effect, np.asarray(own_effects, float)).ravel()
        order = np.lexsort((totals, sums))
        order = order[sums[order] <= budget - needed]
        lowest = np.minimum.accumulate(totals[order])
        order = order[np.append(True, totals[order][1:] < lowest[:-1])]
        if len(order) > _MOST:
            slices = (sums[order] * (_MOST / budget)).astype(int)
            # in each slice the last has the least effect
            order = order[np.append(slices[1:] != slices[:-1], True)]
        steps.append(np.divmod(order, len(own_costs)))
        cost, effect = sums[order], totals[order]
    place, picks = len(cost) - 1, []
    for parents, choices in reversed(steps):
        picks.append(int(choices[place]))
        place = int(parents[place])
    return picks[::-1]


def _effects(
    model: nn.Module,
    config: GridQuantization,
    target: BitTarget,
    fixed: Mapping[str, int],
    choices: Sequence[int],
    task: Task,
) -> dict[str, list[float]]:
    """Return what each of `choices` does to the model in each layer that is not fixed."""
    increase = Increase(model, task, target.batches, labelled=target.by == "loss")
    targets = config.targets.model_copy(update={"exclude": (*config.targets.exclude, *fixed)})
    if target.tried_by == "rounding":
        shared = GridQuantization.model_fields.keys() - {"bits", "target"}
        config = UniformConfig(**{name: getattr(config, name) for name in shared})
    found: dict[str, list[float]] = {}
    for bits in choices:
        alone = config.model_copy(update={"target": None, "per_layer": {}, "bits": bits, "targets": targets})
        for effect in layer_effects(model, alone, task, increase):
            if effect.increase is None:
                raise StageError(f"{effect.name!r} cannot be tried alone: {effect.remark}; name it in `per_layer`")
            found.setdefault(effect.name, []).append(effect.increase)
    return found
