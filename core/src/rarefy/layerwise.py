"""Changing one layer after the other on the inputs it gets: in which order, by which Hessian, and what is left alone.

One forward pass per calibration batch serves all layers, see `rarefy.passes`. Memory holds the model, what each pass
has at the layer where they are, and that layer's Hessian and workspace.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from rarefy.calibration import Visit, stream_inputs
from rarefy.hessian import InputHessian, PairedHessian, as_rows, columns
from rarefy.passes import Passes
from rarefy.progress import track
from rarefy.task import Task
from rarefy.weights import LayerWeight, holders

log = logging.getLogger(__name__)

Solve = Callable[[str, nn.Module, InputHessian], torch.Tensor]
"""Is given the name of a layer, the layer and its Hessian; returns its new rows, as those of `as_rows`."""


@dataclass(frozen=True)
class LayerCalibration:
    """The data that layers are calibrated on, and the size up to which they are."""

    task: Task
    batches: int = 8
    batch_size: int | None = None
    """Samples per batch; the task's own number when None."""
    max_inputs: int = 16384
    """Most inputs of one output, kernel positions included."""
    dtype: torch.dtype = torch.float32
    """Precision of the Hessians."""

    def order(self, model: nn.Module, weights: Sequence[LayerWeight]) -> list[tuple[LayerWeight, str | None]]:
        """Return the weights in the order in which the data reaches them, each with the reason to leave it alone."""
        places = self._places(model, weights)
        ordered = sorted(weights, key=lambda weight: places.get(weight.name, len(places)))
        return [(weight, self._why_not(model, weight, weight.name in places)) for weight in ordered]

    def passes(self, model: nn.Module, names: Iterable[str] = (), reference: nn.Module | None = None) -> Passes:
        """Return passes that go through the named layers together, those aside that share their weight."""
        alone = [n for n in names if holders(model, model.get_submodule(n).get_parameter("weight")) == [n]]
        models = [model] if reference is None else [reference, model]
        return Passes(models, alone, self.task, self.batches, self.batch_size)

    def hessian(self, passes: Passes, name: str) -> InputHessian:
        """Return the Hessian of a layer over the inputs of all layers that share its weight.

        With passes through a reference it knows in `cross` what these inputs are there.
        """
        model = passes.models[-1]
        layer = model.get_submodule(name)
        # torch computes in double precision everywhere but on Apple's devices
        dtype = torch.float32 if layer.weight.device.type == "mps" else self.dtype
        paired = len(passes.models) == 2
        hessian = PairedHessian(layer, name, dtype) if paired else InputHessian(layer, name, dtype)
        for user in holders(model, layer.get_parameter("weight")):
            for *before, inputs in passes.calls(user):
                if isinstance(hessian, PairedHessian):
                    hessian.update_pair(before[0], inputs, model.get_submodule(user))
                else:
                    hessian.update(inputs, model.get_submodule(user))
        return hessian

    def _places(self, model: nn.Module, weights: Sequence[LayerWeight]) -> dict[str, int]:
        """Return when the first batch reaches each weight, by any of its layers; absent where it does not."""
        users = {weight.name: holders(model, weight.parameter) for weight in weights}
        visits: dict[str, Visit] = {name: lambda _: None for names in users.values() for name in names}
        batch = self.task.calibration(self.batch_size, 1)
        calls = list(stream_inputs(model, batch, visits, "finding the layers that are reached", 1))
        found = {weight: [calls.index(name) for name in names if name in calls] for weight, names in users.items()}
        return {weight: min(places) for weight, places in found.items() if places}

    def _why_not(self, model: nn.Module, weight: LayerWeight, reached: bool) -> str | None:
        inputs = columns(weight.layer)
        others = [name for name in holders(model, weight.parameter) if not _alike(model, weight.name, name)]
        if others:
            return f"it shares its weight with {others[0]!r}, which uses it in another way"
        if not reached:
            return "the calibration data never reaches it, or its weight is used without calling it"
        if inputs > self.max_inputs:
            return f"its Hessian is {inputs:,} x {inputs:,} and `max_inputs` is {self.max_inputs:,}"
        return None


@torch.no_grad()
def solve_layers_(
    model: nn.Module,
    names: Iterable[str],
    calibration: LayerCalibration,
    solve: Solve,
    sequential: bool = True,
    description: str = "layers",
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Replace the rows of the named layers by what `solve` returns, one layer after the other.

    With `sequential` each layer is calibrated on the model as it is then, behind the layers already changed; otherwise
    on the model as it was, at the price of memory for all new weights. With `reference`, the model as it was, the
    Hessians tell in `cross` what the inputs of the layer are there.

    Returns the squared error of each layer's outputs relative to their squares, on the inputs it was calibrated on.
    """
    names = list(names)
    later: list[Callable[[], None]] = []
    errors: dict[str, float] = {}
    with contextlib.closing(calibration.passes(model, names, reference)) as passes:
        for name in track(names, description, len(names)):
            layer, hessian = model.get_submodule(name), calibration.hessian(passes, name)
            before = as_rows(layer).to(hessian.value)
            after = solve(name, layer, hessian)
            errors[name] = hessian.error(after - before) / max(hessian.error(before), 1e-30)
            log.info("%s: the squared error of its outputs is %.2g of their square", name, errors[name])
            later.append(partial(_write_, layer.get_parameter("weight"), after))
            if sequential:
                later.pop()()
        for write in later:
            write()
    return errors


def worst_error(errors: dict[str, float]) -> str:
    """Return a note that names the layer whose outputs changed most; `errors`, not empty, are of `solve_layers_`."""
    worst = max(errors, key=lambda name: errors[name])
    return f"largest relative output error of a layer: {errors[worst] ** 0.5:.1%}, at {worst!r}"


def _alike(model: nn.Module, one: str, other: str) -> bool:
    """Tell whether two modules multiply their weight with inputs in the same way, stride and padding aside."""
    kinds = [(type(m), getattr(m, "groups", 1)) for m in (model.get_submodule(one), model.get_submodule(other))]
    return kinds[0] == kinds[1]


def _write_(weight: nn.Parameter, rows: torch.Tensor) -> None:
    weight.copy_(rows.reshape(weight.shape))
