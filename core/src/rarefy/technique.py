"""What a technique is: up to four moments, of which most need one or two."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from rarefy_schemas import LayerReport, ModelReference, SkippedLayer, TechniqueConfig
from torch import nn

from rarefy.columns import columns
from rarefy.errors import StageError
from rarefy.task import Task

ConfigT = TypeVar("ConfigT", bound=TechniqueConfig)


@dataclass(frozen=True)
class Analysis:
    """What a technique found and means to do."""

    layers: tuple[LayerReport, ...] = ()
    """One entry per layer that will change."""
    skipped: tuple[SkippedLayer, ...] = ()
    """One entry per layer that was left alone, with the reason."""
    plan: Any = None
    """Whatever the technique's own `transform` needs, such as ranks or thresholds."""

    def __str__(self) -> str:
        """Return a table of the layers."""
        planned = [
            (x.name, x.kind, x.action, ", ".join(f"{k} {v:.4g}" for k, v in x.scores.items())) for x in self.layers
        ]
        planned += [(x.name, x.kind, "left alone", x.reason) for x in self.skipped]
        return columns(("layer", "type", "what would happen", "figures or reason"), planned)


class TrainingRule:
    """What a technique adds to fine-tuning."""

    lr: float | None = None
    """Learning rate of the optimizer step just taken, set by core's loop before `after_step`."""

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Return a scalar to add to the loss, or None."""
        return None

    def before_step(self, model: nn.Module) -> None:
        """Read or change the gradients before an optimizer step; they are clipped already, and not scaled."""

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Change the weights after an optimizer step; `progress` runs from 0 to 1 over the fine-tuning."""


class Technique(Generic[ConfigT]):
    """A compression technique; subclass it, or `LayerTechnique` when it treats one layer at a time."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.seed = 0
        """Seed of this step, set by the pipeline; seed every random generator with it."""
        self.zeros_to_keep = False
        """Whether an earlier step left zeros, set by the pipeline; fine-tuning then holds them."""
        self.original: nn.Module | None = None
        """The model as it was before the first step, set by the pipeline; read only."""
        self.notes: list[str] = []
        """Findings in words for the report, such as what training made of a layer; any moment may add some."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say what would be done; read only."""
        raise NotImplementedError

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Change `model`, a copy, and return it."""
        raise NotImplementedError

    def training_rule(self, model: nn.Module) -> TrainingRule | None:
        """Return the rule to fine-tune the transformed model by, or None."""
        return None

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Turn training scaffolding (masks, parametrizations) into plain modules; always called once."""
        return model

    def new_reference(self) -> ModelReference | None:
        """Return the reference of the network that `transform` builds, when it is not a changed copy."""
        return None

    def predict(self, model: nn.Module) -> nn.Module:
        """Return what `transform` would make of a model without values (meta device), for `--dry-run`.

        Techniques whose outcome depends on the weights keep the default: the model as it is.
        """
        return model


def select(model: nn.Module, config: TechniqueConfig, derived: bool | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the target layers as (name, module), each shared module once; raise `StageError` when there is none.

    `derived` says whether classes count that a library derived from torch's, such as timm's `Conv2dSame`. They may
    compute something else, so by default they do for techniques that leave layers in place and do not look at data.
    """
    found = False
    kinds = config.traits.layers
    if derived is None:
        derived = not config.traits.changes_shapes and config.traits.data == "none"
    for name, module in model.named_modules():
        kind = type(module).__name__
        meant = kind in kinds or ("*" in kinds and _has_tensors(module)) or (derived and derived_from(module, kinds))
        if name and meant and config.targets.matches(name, kind):
            found = True
            yield name, module
    if not found:
        have = sorted({type(m).__name__ for n, m in model.named_modules() if n and not list(m.children())})
        raise StageError(
            f"no layer matches the targets of {config.registered_name()!r}: include {list(config.targets.include)}, "
            f"exclude {list(config.targets.exclude)}, types {list(config.targets.types or kinds)}. "
            f"The model has layers of types {', '.join(have) or 'none'}; `rarefy analyze MODEL` lists their names."
            + "".join(f" {layer.name!r}: {layer.reason}." for layer in passed_over(model, config, ())[:1])
        )


def passed_over(model: nn.Module, config: TechniqueConfig, targets: Collection[str]) -> list[SkippedLayer]:
    """Return the layers that are no targets for their class alone, each with the reason."""
    from rarefy.preparation.linear import as_linear

    found = []
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if not name or name in targets or is_torch(type(layer)) or not config.targets.matches(name, kind):
            continue
        base = derived_from(layer, config.traits.layers)
        if base is not None:
            reason = f"its class is derived from {base}, and what it computes is not known to this technique"
        elif "Linear" in config.traits.layers and as_linear(layer) is not None:
            reason = "it computes what torch's Linear does under another class; put `prepare/linear` before this step"
        else:
            continue
        found.append(SkippedLayer(name=name, kind=kind, reason=reason))
    return found


def derived_from(module: nn.Module, kinds: Sequence[str]) -> str | None:
    """Return the class of torch, one of `kinds`, that somebody else's class of a module is derived from."""
    classes = type(module).__mro__
    if is_torch(classes[0]):
        return None
    return next((base.__name__ for base in classes[1:] if is_torch(base) and base.__name__ in kinds), None)


def is_torch(kind: type) -> bool:
    """Tell whether a class of modules is torch's own."""
    return kind.__module__.partition(".")[0] == "torch"


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def refuse_not_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `StageError` when a value of layer `name` is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        raise StageError(f"layer {name!r} has weights that are NaN or infinite; retrain or reload the model")


@dataclass(frozen=True)
class Skip:
    """The reason why a layer is left alone."""

    reason: str


@dataclass(frozen=True)
class Plan:
    """What will be done to one layer."""

    action: str
    scores: dict[str, float] = field(default_factory=dict)
    detail: Any = None
    """Whatever `apply` needs."""


class LayerTechnique(Technique[ConfigT]):
    """A technique that decides and acts layer by layer: write `plan` and `apply`."""

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        """Decide what to do with `layer`; read only."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        """Return the layer's replacement, or the layer itself changed in place."""
        raise NotImplementedError

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Plan every target layer; refuse weights that are not finite."""
        targets = dict(select(model, self.config))
        layers, skipped, plans = [], passed_over(model, self.config, targets), {}
        for name, layer in targets.items():
            kind = type(layer).__name__
            weight = getattr(layer, "weight", None)
            if weight is not None and weight.numel() == 0:
                skipped.append(SkippedLayer(name=name, kind=kind, reason="it has no weights"))
                continue
            if weight is not None:
                refuse_not_finite(name, weight)
            with torch.no_grad():
                plan = self.plan(name, layer)
            if isinstance(plan, Skip):
                skipped.append(SkippedLayer(name=name, kind=kind, reason=plan.reason))
            else:
                plans[name] = plan
                layers.append(LayerReport(name=name, kind=kind, action=plan.action, scores=plan.scores))
        return Analysis(tuple(layers), tuple(skipped), plans)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Apply the plans; a layer used in several places is replaced in all of them."""
        for name, plan in analysis.plan.items():
            old = model.get_submodule(name)
            with torch.no_grad():
                new = self.apply(old, plan)
            if new is not old:
                new.train(old.training)
                replace_(model, old, new)
        return model


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in `model`."""
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in places:
        model.set_submodule(name, new)
