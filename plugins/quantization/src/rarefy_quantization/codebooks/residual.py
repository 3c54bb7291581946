"""Residual quantization: vectors as sums, each codebook for what the ones before it left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rarefy.task import Task
from rarefy.technique import Analysis, replace_
from rarefy.weights import LayerWeight
from rarefy_schemas import LayerReport
from torch import nn

from rarefy_quantization.codebooks.config import ResidualConfig
from rarefy_quantization.codebooks.layers import ResidualConv, ResidualLayer, ResidualLinear, code_type, summed
from rarefy_quantization.codes import entropy
from rarefy_quantization.parametrizations import places
from rarefy_quantization.vectors import VectorQuantizer, cluster, relative_error

_STEPS = 100
"""Most steps of conjugate gradients for the codebooks of a layer."""
_ENOUGH = 1e-12
"""Share of the squared residual at which they stop."""

_KINDS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}


@dataclass(frozen=True)
class ResidualCoded:
    """A tensor whose vectors of consecutive entries are sums of vectors, one from each codebook."""

    codes: torch.Tensor
    """(stages, vectors), the smallest integers that will do; code 0 is the most frequent of a stage."""
    codebooks: torch.Tensor
    """(stages, codes, length), of the tensor's type; zeros where a stage has fewer vectors than another."""
    shape: torch.Size

    def decode(self) -> torch.Tensor:
        """Return the tensor."""
        return summed(self.codes, self.codebooks).view(self.shape)

    def entropy(self) -> float:
        """Return the order-0 entropy of the codes of all stages in bits per weight."""
        return sum(map(entropy, self.codes)) / self.codebooks.shape[2]


class ResidualQuantization(VectorQuantizer[ResidualConfig, ResidualCoded]):
    """k-means on the vectors of a layer, then on what is left of them, stage by stage (Gong et al. 2014).

    The layers keep codes and codebooks: sums of few vectors are too many different ones to be found again in a file.
    Only storage shrinks: the weight is summed up for each forward pass and multiplied as before.
    """

    def code(self, tensor: torch.Tensor, seed: int) -> ResidualCoded:
        """Return `tensor` with vectors that are sums of as many as there are stages."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        rows = tensor.reshape(-1, config.length).double()
        left, stages = rows, []
        for _ in range(config.stages):
            codes, codebook = by_frequency(*cluster(left, config.codes, config.rounds, generator))
            left = left - codebook[codes]
            stages.append((codes, codebook))
        codes = torch.stack([codes for codes, _ in stages])
        codebooks = nn.utils.rnn.pad_sequence([codebook for _, codebook in stages], batch_first=True)
        if config.joint and config.stages > 1:
            codebooks = fitted(rows, codes, codebooks)
        return ResidualCoded(codes.to(code_type(codebooks.shape[1])), codebooks.to(tensor.dtype), tensor.shape)

    def obstacle(self, model: nn.Module, weight: LayerWeight) -> str | None:
        """Return that a layer would not shrink, or that its weight is also that of another kind of layer, if so."""
        config, count = self.config, weight.parameter.numel() // self.config.length
        if count <= config.stages * config.codes:
            return (
                f"it has {count:,} vectors of {config.length}, and {config.stages} stages of {config.codes:,} codes "
                f"store {config.stages * config.codes:,}"
            )
        others = {type(layer) for layer, _ in places(model, weight.parameter)} - _KINDS
        if others:
            names = ", ".join(sorted(kind.__name__ for kind in others))
            return f"its weight is that of a layer which keeps no codes ({names})"
        return None

    def report(self, weight: LayerWeight, coded: ResidualCoded) -> LayerReport:
        """Return what becomes of a layer."""
        stages, count, length = coded.codebooks.shape
        bits = stages * math.log2(count) / length
        action = f"{stages} stages of {count:,} shared vectors of {length}, {bits:.2f} bits per weight"
        return LayerReport(name=weight.name, kind=weight.kind, action=action, scores={
            "distinct": stages * count,
            "relative_mse": relative_error(coded.decode(), weight.parameter),
            "entropy": coded.entropy(),
        })  # fmt: skip

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Put layers of codes and codebooks in place; those that shared a weight share these."""
        for name, coded in analysis.plan.items():
            parameter = model.get_parameter(name)
            codebooks = nn.Parameter(coded.codebooks.clone(), requires_grad=parameter.requires_grad)
            for layer, _ in places(model, parameter):
                new = _layer(layer, coded)
                new.codes, new.codebooks, new.bias = coded.codes, codebooks, layer.bias
                replace_(model, layer, new.train(layer.training))
        return model


def by_frequency(codes: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes renumbered so that the most frequent is 0, and the codebook in that order.

    The codes of all stages lie in one tensor of a file, and take fewer bytes when their frequencies are alike.
    """
    order = torch.bincount(codes, minlength=len(codebook)).argsort(descending=True, stable=True)
    return order.argsort()[codes], codebook[order]


def fitted(rows: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Return the codebooks, (stages, codes, length), whose sums are nearest to `rows`, (n, length), for given codes.

    Linear least squares for all stages together, as codebooks of additive quantization are found (Babenko & Lempitsky
    2014): by conjugate gradients from `codebooks`, each step of which lowers the error, and with the number of rows
    that use a vector as the preconditioner.
    """
    uses = _gathered(torch.ones_like(rows[:, :1]), codes, codebooks.shape[1]).clamp(min=1)
    left = rows - summed(codes, codebooks)
    slope = _gathered(left, codes, codebooks.shape[1])
    direction = slope / uses
    product = first = (slope * direction).sum()
    for _ in range(_STEPS):
        if product <= _ENOUGH * first:
            break
        image = summed(codes, direction)
        scale = product / image.square().sum()
        codebooks, left = codebooks + scale * direction, left - scale * image
        slope = _gathered(left, codes, codebooks.shape[1])
        before, product = product, (slope * slope / uses).sum()
        direction = slope / uses + product / before * direction
    return codebooks


def _gathered(rows: torch.Tensor, codes: torch.Tensor, count: int) -> torch.Tensor:
    """Return for each vector of each stage the sum of the rows that use it: the transpose of `summed`."""
    zeros = rows.new_zeros(count, rows.shape[1])
    return torch.stack([zeros.index_add(0, chosen, rows) for chosen in codes])


def _layer(layer: nn.Module, coded: ResidualCoded) -> ResidualLayer:
    """Return an empty layer of the same options as `layer`."""
    stages, count, length = coded.codebooks.shape
    if isinstance(layer, nn.Linear):
        return ResidualLinear(
            layer.in_features, layer.out_features, stages, count, length, layer.bias is not None, device="meta"
        )
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return ResidualConv(
        layer.in_channels, layer.out_channels, layer.kernel_size, stages, count, length, layer.stride, layer.padding,
        layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
    )  # fmt: skip
