"""Rules for the moments of a technique and the layers it takes."""

from __future__ import annotations

import copy

from rarefy.errors import RarefyError
from rarefy.modules.skeleton import meta_copy
from rarefy.technique import select
from rarefy.testing.compressing import Compressing
from rarefy.testing.require import require
from rarefy.testing.subjects import differences, scaffolding, shapes, tensors


class MomentRules(Compressing):
    """Each moment does its own work and no other's."""

    def test_analyze_only_reads(self) -> None:
        """Check that analyzing leaves no trace on the model."""
        model = self.model()
        before = copy.deepcopy(model)
        self._technique().analyze(model, self.task())
        changed = differences(before, model)
        require(
            not changed,
            f"`analyze` changes {', '.join(changed)}",
            "work on copies there; changes belong in `transform`",
        )
        modes = [module.training for module in model.modules()]
        require(
            modes == [module.training for module in before.modules()],
            "`analyze` leaves modules in another mode (training or evaluation)",
            "restore `model.training` after running the model",
        )
        left = scaffolding(model) + [name for name, p in model.named_parameters() if p.grad is not None]
        require(
            not left,
            f"`analyze` leaves hooks, parametrizations or gradients: {', '.join(left)}",
            "remove hooks in a `finally` block, and use torch.autograd.grad instead of `backward`",
        )

    def test_analyze_accounts_for_every_target(self) -> None:
        """Check that no layer is left alone in silence."""
        if self.config.traits.new_architecture:
            return
        model = self.model()
        analysis = self._technique().analyze(model, self.task())
        told = {layer.name for layer in analysis.layers} | {layer.name for layer in analysis.skipped}
        missing = [name for name, _ in select(model, self.config) if name not in told]
        require(
            not missing,
            f"`analyze` says nothing about the targets {', '.join(missing)}",
            "list each in `layers`, or in `skipped` with the reason",
        )

    def test_transform_leaves_the_original(self) -> None:
        """Check that the analysis does not smuggle the original into the transformation."""
        model = self.model()
        before = copy.deepcopy(model)
        self._compress(model)
        changed = differences(before, model)
        require(
            not changed,
            f"`transform` or fine-tuning changes {', '.join(changed)} of the original",
            "keep names and plain values in the plan of the analysis, not the original's modules or parameters",
        )

    def test_it_changes_the_model(self) -> None:
        """Check that something is done."""
        outcome = self._outcome()
        require(
            outcome.analysis.layers or self.config.traits.new_architecture,
            f"`analyze` finds no layer to change: {outcome.analysis.skipped}",
            "give options, or a `model`, with which there is something to do",
        )
        require(
            differences(self.model(), outcome.model),
            "The model is the same as before",
            "change the weights in `transform`, in place or by returning new layers",
        )

    def test_consolidate_leaves_plain_modules(self) -> None:
        """Check that no training scaffolding remains."""
        left = scaffolding(self._outcome().model)
        require(
            not left,
            f"After `consolidate` there are still {', '.join(left)}",
            "remove hooks and parametrizations there; the model must consist of plain modules",
        )

    def test_predict_needs_no_values(self) -> None:
        """Check the moment behind `--dry-run`."""
        if self.config.traits.new_architecture:
            return
        model = meta_copy(self.model())
        before = shapes(model)
        predicted = self._technique().predict(model)
        require(
            all(tensor.is_meta for tensor in tensors(predicted).values()),
            "`predict` computes with values",
            "build the new layers on the meta device, as the given model is, or leave `predict` as it is",
        )
        require(
            self.config.traits.changes_shapes or shapes(predicted) == before,
            "`predict` changes shapes",
            "declare Traits(changes_shapes=True)",
        )

    def test_it_keeps_to_its_targets(self) -> None:
        """Check that an excluded layer stays as it is."""
        traits, model = self.config.traits, self.model()
        names = [layer.name for layer in self._technique().analyze(model, self.task()).layers]
        if traits.changes_shapes or traits.new_architecture or len(names) < 2:
            return
        spared = names[-1]
        exclude = (*self.config.targets.exclude, spared)
        targets = self.config.targets.model_copy(update={"exclude": exclude})
        config = self.config.model_copy(update={"targets": targets, "finetune": None})
        outcome = self._compress(model, config=config)
        changed = differences(model.get_submodule(spared), outcome.model.get_submodule(spared))
        require(
            not changed,
            f"With targets.exclude naming {spared!r}, its {', '.join(changed)} still change",
            "take the layers from rarefy.technique.select, or derive from LayerTechnique",
        )

    def test_targets_that_match_nothing_are_refused(self) -> None:
        """Check that an empty set of targets is an error."""
        if self.config.traits.new_architecture:
            return
        targets = self.config.targets.model_copy(update={"include": ("no-such-layer",)})
        try:
            self._technique(self.config.model_copy(update={"targets": targets})).analyze(self.model(), self.task())
        except RarefyError:
            return
        require(
            False,
            "Targets that match no layer are accepted in silence",
            "take the layers from rarefy.technique.select, which refuses them, or derive from LayerTechnique",
        )
