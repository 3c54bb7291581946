"""Rules for what a technique says of itself."""

from __future__ import annotations

import copy
from typing import cast

import torch

from rarefy.task import Task
from rarefy.testing.compressing import Compressing
from rarefy.testing.require import require
from rarefy.testing.subjects import GuardedTask, shapes, weights, zero_count


class TraitRules(Compressing):
    """The traits are true."""

    def test_it_needs_no_more_data_than_declared(self) -> None:
        """Check the trait `data`."""
        guarded = cast(Task, GuardedTask(self.task(), self.config.needed_data()))
        technique, model = self._technique(), self.model()
        technique.transform(copy.deepcopy(model), technique.analyze(model, guarded), guarded)

    def test_shapes_change_only_when_declared(self) -> None:
        """Check the trait `changes_shapes`."""
        before, after = shapes(self.model()), shapes(self._outcome().model)
        changed = sorted({name for name, _ in before.items() ^ after.items()})
        require(
            not changed or self.config.traits.changes_shapes or self.config.traits.new_architecture,
            f"The names or shapes of {', '.join(changed)} change",
            "declare Traits(changes_shapes=True), or `new_architecture` for a student",
        )

    def test_zeros_are_made_when_declared(self) -> None:
        """Check the trait `makes_zeros`."""
        traits = self.config.traits
        before, after = zero_count(self.model()), zero_count(self._outcome().model)
        require(
            after > before or not traits.makes_zeros,
            f"{after} weights are zero, {before} before, and the technique says that it makes zeros",
            "write exact zeros into the weights by the end of `consolidate`, or drop Traits(makes_zeros=True)",
        )
        require(
            after <= before or traits.makes_zeros or traits.leaves_codes or traits.changes_shapes,
            f"{after} weights are zero, {before} before, and the technique does not say so",
            "declare Traits(makes_zeros=True), so that later steps keep them",
        )

    def test_zeros_are_kept_when_declared(self) -> None:
        """Check the trait `keeps_zeros`."""
        traits = self.config.traits
        if not traits.keeps_zeros or traits.new_architecture:
            return
        model, generator = self.model(), torch.Generator().manual_seed(0)
        for weight in weights(model).values():
            weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.5, 0)
        after = weights(self._compress(model, zeros_to_keep=True).model)
        filled = [
            name
            for name, weight in weights(model).items()
            if name in after and after[name].shape == weight.shape and bool(after[name][weight == 0].any())
        ]
        require(
            not filled,
            f"Weights of {', '.join(filled)} that were zero are not any more",
            "leave zeros alone, or declare Traits(keeps_zeros=False) so that recipes put this step before pruning",
        )

    def test_codes_are_left_when_declared(self) -> None:
        """Check the trait `leaves_codes`."""
        if not self.config.traits.leaves_codes:
            return
        before, after = weights(self.model()), weights(self._outcome().model)
        changed = [n for n in after if n not in before or not torch.equal(before[n], after[n])]
        values = sum(len(torch.unique(after[name])) for name in changed)
        size = sum(after[name].numel() for name in changed)
        require(
            values <= size / 2,
            f"The {size} changed weights take {values} distinct values, and the technique says that it leaves few",
            "give each weight one of a few values per layer, or drop Traits(leaves_codes=True)",
        )
