"""Which units go: from scores and a goal to a removal."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property

import torch
from rarefy.dependencies import Dependencies, Group, Removal
from rarefy.sensitivity import Increase
from rarefy.task import Task
from rarefy.weights import per_layer
from torch import nn

from rarefy_pruning.channels.allocation import Pool, lowest, merged, normalized, pools, reach
from rarefy_pruning.channels.budget import CountedLeft, Left, saving
from rarefy_pruning.channels.config import ChannelPruning, Target
from rarefy_pruning.channels.latency import LatencyLeft
from rarefy_pruning.channels.sensitivity import Sensitivity

Figures = Mapping[str, Mapping[str, float]]
"""Numbers behind the decision by group, for the report."""


class Choice:
    """The units to remove by the goal that the options set."""

    def __init__(
        self,
        config: ChannelPruning,
        model: nn.Module,
        found: Dependencies,
        scores: Mapping[str, torch.Tensor],
        task: Task,
    ) -> None:
        self.config, self.model, self.found, self.task = config, model, found, task
        self.notes: list[str] = []
        self.figures: dict[str, dict[str, float]] = {}
        own = per_layer(list(scores), config.per_layer, None)
        self.fixed = merged(
            [
                self._lowest(pool, amount)
                for name, amount in own.items()
                if amount is not None
                for pool in pools({name: scores[name]}, None)
            ]
        )
        self.rest = {name: score for name, score in scores.items() if own[name] is None}

    @cached_property
    def removal(self) -> Removal:
        """The units that go, by group."""
        config = self.config
        if not self.rest or (config.amount is None and config.target is None):
            return self.fixed
        if config.target is None:
            together = self._pools(None)
            return self._at(together, config.amount or 0.0)
        left = self._left(config.target)
        together = self._pools(left)

        def choose(share: float) -> Removal:
            return self._at(together, reach(share, lambda amount: left(self._at(together, amount))))

        if isinstance(left, LatencyLeft):
            chosen, notes = left.settle(choose)
            self.notes += notes
            return chosen
        chosen = choose(config.target.share)
        if (share := left(chosen)) > config.target.share:
            self.notes.append(
                f"{share:.1%} of the {config.target.measure} is left, {config.target.share:.1%} was asked for: more "
                "cannot be cut; lower `least`, or target more layers"
            )
        return chosen

    def _at(self, together: list[Pool], amount: float) -> Removal:
        return merged([self.fixed, *(self._lowest(pool, amount) for pool in together)])

    def _lowest(self, pool: Pool, amount: float) -> dict[str, torch.Tensor]:
        return lowest(pool, amount, self.config.least, self.config.round_to)

    def _left(self, target: Target) -> Left:
        inputs = self.task.example_inputs(target.batch_size)
        if target.measure == "latency":
            return LatencyLeft(self.model, self.found, target, inputs, self.config.round_to)
        return CountedLeft(self.model, self.found, target.measure, inputs)

    def _pools(self, left: Left | None) -> list[Pool]:
        """Return the groups that compete, by scope."""
        config = self.config
        if config.scope == "sensitivity":
            increase = Increase(self.model, self.task, config.sensitivity_batches)
            sensitivity = Sensitivity(self.model, self.found, self.rest, increase)
            self.figures = {
                name: {f"increase_at_{units}_units": value for units, value in increases.items() if units}
                for name, increases in sensitivity.increases.items()
            }
            return pools(sensitivity.costs(left), dict.fromkeys(self.rest, 0), sensitivity.orders)
        return pools(self._comparable(left), self._kinds())

    def _comparable(self, left: Left | None) -> Mapping[str, torch.Tensor]:
        """Return scores that may be compared between groups."""
        if self.config.normalize == "mean":
            return normalized(self.rest)
        if self.config.normalize == "saving" and left is not None:
            return {name: score / saving(left, name, score.argsort()) for name, score in self.rest.items()}
        return self.rest

    def _kinds(self) -> dict[str, Hashable] | None:
        """Return which groups compete: all, or those of like structure (Fang et al. 2024, isomorphic pruning)."""
        if self.config.scope == "layer":
            return None
        if self.config.scope == "global":
            return dict.fromkeys(self.rest, 0)
        return {name: tuple(sorted(_roles(self.model, self.found[name]))) for name in self.rest}


def _roles(model: nn.Module, group: Group) -> Iterator[tuple[str, str, int]]:
    """Yield what each member of a group is: class of its module, name of the tensor there, dimension."""
    for member in group.members:
        owner, _, leaf = member.tensor.rpartition(".")
        yield type(model.get_submodule(owner)).__name__, leaf, member.dim
