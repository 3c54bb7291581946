"""Rules that every technique keeps."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rarefy_schemas import TechniqueConfig
from torch import nn

from rarefy import artifact
from rarefy.errors import RarefyError
from rarefy.hookspecs import hookimpl
from rarefy.modules import Base
from rarefy.modules.skeleton import meta_copy
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy.references import build_model
from rarefy.registry import Registry, discover
from rarefy.rules import rules_for
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, select
from rarefy.testing.nouns import NounConformance
from rarefy.testing.require import require
from rarefy.testing.subjects import (
    GuardedTask,
    differences,
    outputs,
    scaffolding,
    small_model,
    small_task,
    tensors,
    weights,
)


@dataclass(frozen=True)
class Outcome:
    """What a technique made of a model."""

    analysis: Analysis
    model: nn.Module
    base: Base


class TechniqueConformance(NounConformance):
    """Rules for a technique; subclass it with a `config`, and with `model` and `task` where the defaults do not fit.

    With `config.finetune` set, every rule is checked after a fine-tuning of three steps.
    """

    config: TechniqueConfig
    parent = Technique
    seed = 1

    def model(self) -> nn.Module:
        """Return the network to try it on, the same at every call."""
        return small_model()

    def task(self) -> Task:
        """Return the task to try it with, the same at every call."""
        return small_task()

    def test_it_names_its_paper(self) -> None:
        """Check that the method can be looked up."""
        require(
            type(self._noun()).paper,
            f"{type(self.config).__name__} names no paper",
            "set `paper: ClassVar[str]` to where the method is described, or to 'unpublished'",
        )

    # The moments

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
        model = self.model()
        outcome = self._compress(model)
        require(
            outcome.analysis.layers or self.config.traits.new_architecture,
            f"`analyze` finds no layer to change: {outcome.analysis.skipped}",
            "give options, or a `model`, with which there is something to do",
        )
        require(
            differences(model, outcome.model),
            "The model is the same as before",
            "change the weights in `transform`, in place or by returning new layers",
        )

    def test_consolidate_leaves_plain_modules(self) -> None:
        """Check that no training scaffolding remains."""
        left = scaffolding(self._compress(self.model()).model)
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
        shapes = _shapes(model)
        predicted = self._technique().predict(model)
        require(
            all(tensor.is_meta for tensor in tensors(predicted).values()),
            "`predict` computes with values",
            "build the new layers on the meta device, as the given model is, or leave `predict` as it is",
        )
        require(
            self.config.traits.changes_shapes or _shapes(predicted) == shapes,
            "`predict` changes shapes",
            "declare Traits(changes_shapes=True)",
        )

    # The result

    def test_output_shapes_are_kept(self) -> None:
        """Check that the compressed model can stand in for the original."""
        model, task = self.model(), self.task()
        before, after = outputs(model, task), outputs(self._compress(model).model, task)
        shapes = [tuple(t.shape) for t in before], [tuple(t.shape) for t in after]
        require(
            shapes[0] == shapes[1],
            f"The outputs have the shapes {shapes[1]}, not {shapes[0]}",
            "give new layers the stride, padding, dilation and groups of those they replace",
        )
        require(
            all(bool(torch.isfinite(t).all()) for t in after),
            "The outputs are not finite",
            "look for divisions by zero and overflow in `transform`",
        )

    def test_parameters_do_not_grow(self) -> None:
        """Check that compression does not enlarge."""
        model = self.model()
        before, after = _size(model), _size(self._compress(model).model)
        require(
            after <= before or self.config.traits.may_grow,
            f"The model has {after} parameters, {before} before",
            "return `Skip(reason)` for layers that would grow, or declare Traits(may_grow=True)",
        )

    def test_the_result_survives_the_file(self) -> None:
        """Check that the model can be written and loaded."""
        outcome, task = self._compress(self.model()), self.task()
        mend = (
            "keep state in parameters, buffers and plain attributes, and register your own module classes with "
            "rarefy.modules.register_module"
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.rarefy"
            try:
                artifact.write(outcome.model, outcome.base, path)
                loaded = artifact.load(path, base=outcome.base.build)
            except RarefyError as error:
                raise AssertionError(
                    f"The model cannot be written and loaded: {error}\n  To mend it: {mend}."
                ) from error
        pairs = zip(outputs(outcome.model, task), outputs(loaded, task), strict=True)
        lost = differences(outcome.model, loaded)
        require(
            not lost and all(torch.equal(one, other) for one, other in pairs),
            f"The model loaded from its file is not the one written: {', '.join(lost) or 'its outputs differ'}",
            mend,
        )

    def test_the_same_seed_gives_the_same_result(self) -> None:
        """Check that nothing random escapes the seed."""
        results = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            results.append(self._compress(self.model()).model)
        differ = differences(*results)
        require(
            not differ,
            f"Two runs with one seed differ in {', '.join(differ)}",
            "draw from `torch.Generator().manual_seed(self.seed)`, never from the global generator",
        )

    # The targets

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

    # The traits

    def test_it_needs_no_more_data_than_declared(self) -> None:
        """Check the trait `data`."""
        guarded = cast(Task, GuardedTask(self.task(), self.config.traits.data))
        technique, model = self._technique(), self.model()
        technique.transform(copy.deepcopy(model), technique.analyze(model, guarded), guarded)

    def test_shapes_change_only_when_declared(self) -> None:
        """Check the trait `changes_shapes`."""
        model = self.model()
        before, after = _shapes(model), _shapes(self._compress(model).model)
        changed = sorted({name for name, _ in before.items() ^ after.items()})
        require(
            not changed or self.config.traits.changes_shapes or self.config.traits.new_architecture,
            f"The names or shapes of {', '.join(changed)} change",
            "declare Traits(changes_shapes=True), or `new_architecture` for a student",
        )

    def test_zeros_are_made_when_declared(self) -> None:
        """Check the trait `makes_zeros`."""
        traits, model = self.config.traits, self.model()
        before, after = _zeros(model), _zeros(self._compress(model).model)
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
        before, after = weights(self.model()), weights(self._compress(self.model()).model)
        changed = [n for n in after if n not in before or not torch.equal(before[n], after[n])]
        values = sum(len(torch.unique(after[name])) for name in changed)
        size = sum(after[name].numel() for name in changed)
        require(
            values <= size / 2,
            f"The {size} changed weights take {values} distinct values, and the technique says that it leaves few",
            "give each weight one of a few values per layer, or drop Traits(leaves_codes=True)",
        )

    def test_its_options_survive_json(self) -> None:
        """Check that a step can be written into a recipe and read back."""
        step = json.loads(json.dumps(self.config.model_dump(mode="json")))
        self._same_options(load_recipe({"steps": [step]}, registry=_registry_with(type(self.config))).steps[0])

    # How they are checked

    def _technique(self, config: TechniqueConfig | None = None) -> Technique[Any]:
        self._noun()
        technique: Technique[Any] = implement(config or self.config)
        technique.seed = self.seed
        return technique

    def _compress(
        self, model: nn.Module, config: TechniqueConfig | None = None, zeros_to_keep: bool = False
    ) -> Outcome:
        """Do what the pipeline does for a step."""
        technique, task = self._technique(config), self.task()
        technique.zeros_to_keep = zeros_to_keep
        analysis = technique.analyze(model, task)
        changed = technique.transform(copy.deepcopy(model), analysis, task)
        finetune = technique.config.finetune
        if finetune is not None:
            from rarefy.training import fit

            short = finetune.model_copy(update={"epochs": 1, "max_steps": 3})
            fit(changed, copy.deepcopy(model), task, short, rules_for(technique, changed), self.seed)
        reference = technique.new_reference()
        base = Base(lambda: copy.deepcopy(model) if reference is None else build_model(reference), reference)
        return Outcome(analysis, technique.consolidate(changed).eval(), base)


def _registry_with(config: type[TechniqueConfig]) -> Registry:
    class Ours:
        @hookimpl
        def register_techniques(self) -> list[type[TechniqueConfig]]:
            return [config]

    registry = Registry(discover())
    if registry.techniques.get(config.registered_name()) is config:
        return registry
    registry = Registry(discover())
    registry.manager.register(Ours(), "the conformance kit")
    return registry


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors(model).items()}


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in weights(model).values())
