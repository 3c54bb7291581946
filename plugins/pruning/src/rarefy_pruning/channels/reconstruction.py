"""Fit the layers that lost inputs to the outputs that they had, by least squares."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from rarefy.calibration import stream_inputs
from rarefy.dependencies import Dependencies, Removal, removed
from rarefy.hessian import LAYERS, as_rows, vectors
from rarefy.passes import Passes
from rarefy.progress import track
from rarefy.task import Task
from rarefy.weights import holders
from torch import nn

_RIDGE = 1e-3
"""Pull towards the weights as they are, as a share of the mean square of an input."""
log = logging.getLogger(__name__)


@torch.no_grad()
def reconstruct_(
    compact: nn.Module, model: nn.Module, found: Dependencies, removal: Removal, task: Task, batches: int
) -> dict[str, float]:
    """Change the weights of each layer of `compact` that lost inputs, so that it gives what it gave in `model`.

    One layer after the other in the order of the data, each on the inputs that it has by then, so that it also makes
    up for those before it. Solves min over W, b of sum ||y - W x - b||^2 over all samples and positions, with y the
    outputs in `model` that are left and x the inputs in `compact` (He et al. 2017, Channel pruning for accelerating
    very deep neural networks, section 3; Luo et al. 2017, ThiNet, section 3.3). Returns what is lost of each layer's
    outputs: the squared error as a share of their mean square, about their mean when the layer has a bias.
    """
    gone = removed(found, removal)
    losses = {}
    names = _in_order(model, list(_narrower(model, gone)), task)
    with contextlib.closing(Passes((model, compact), names, task, batches)) as passes:
        for name in track(names, "reconstructing", len(names)):
            wide, narrow = model.get_submodule(name), compact.get_submodule(name)
            rows = torch.ones(wide.weight.shape[0], dtype=torch.bool, device=wide.weight.device)
            rows[gone.get((f"{name}.weight", 0), [])] = False
            fit = _Fit(narrow)
            for before, given in passes.calls(name):
                # the channels last, as those of vectors are
                fit.update(given, wide(before).movedim(_channels(wide), -1)[..., rows].flatten(0, -2))
            if fit.seen:
                losses[name] = fit.solve_()
                log.info("%s: %.2g of the square of its outputs is lost", name, losses[name])
    return losses


class _Fit:
    """Means of products over the vectors x that a layer multiplies its rows with, and the outputs y it should give."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.seen = layer, 0
        self.weight = as_rows(layer)[0].float()
        rows, columns = self.weight.shape
        self.xx, self.yx = self.weight.new_zeros(columns, columns), self.weight.new_zeros(rows, columns)
        self.x, self.y, self.yy = self.xx[0].clone(), self.yx[:, 0].clone(), self.xx.new_zeros(())

    def update(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take in an input and what should come out of it, `(vectors, rows)`."""
        for (x,) in vectors(self.layer, inputs.float()):
            y, outputs = outputs[: len(x)].float(), outputs[len(x) :]
            self.seen += len(x)
            share = len(x) / self.seen
            for mean, new in (
                (self.xx, x.T @ x / len(x)),
                (self.yx, y.T @ x / len(x)),
                (self.x, x.mean(0)),
                (self.y, y.mean(0)),
                (self.yy, y.square().sum(1).mean()),
            ):
                mean.lerp_(new, share)

    def solve_(self) -> float:
        """Give the layer the weights that fit best, and return the share of the outputs that is lost."""
        xx, yx, x, y, yy = (mean.double() for mean in (self.xx, self.yx, self.x, self.y, self.yy))
        if self.layer.bias is not None:
            xx, yx, yy = xx - x.outer(x), yx - y.outer(x), yy - y.square().sum()
        ridge = (_RIDGE * xx.diagonal().mean()).clamp_min(1e-30)
        weight = torch.linalg.solve(
            xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), (yx + ridge * self.weight).T
        ).T
        self.layer.weight.copy_(weight.reshape(self.layer.weight.shape))
        if self.layer.bias is not None:
            self.layer.bias.copy_(y - weight @ x)
        lost = yy - 2 * (weight * yx).sum() + (weight @ xx * weight).sum()
        return float((lost / yy.clamp_min(1e-30)).clamp(0, 1))


def _narrower(model: nn.Module, gone: Mapping[tuple[str, int], torch.Tensor]) -> Iterator[str]:
    """Yield the layers that lost inputs and have their weight for themselves."""
    for tensor, dim in gone:
        name, _, leaf = tensor.rpartition(".")
        layer = model.get_submodule(name)
        plain = isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1
        if leaf == "weight" and dim == 1 and plain and holders(model, layer.weight) == [name]:
            yield name


def _in_order(model: nn.Module, names: list[str], task: Task) -> list[str]:
    """Return the layers in the order in which the data reaches them, without those that it does not reach."""
    batch = task.calibration(batches=1)
    return list(stream_inputs(model, batch, {name: lambda _: None for name in names}, "finding the order", 1))


def _channels(layer: nn.Module) -> int:
    """Return the axis of a layer's output along which its channels lie, counted from the last."""
    return -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
