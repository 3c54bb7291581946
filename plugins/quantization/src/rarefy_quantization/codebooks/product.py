"""Product quantization: a codebook for each block of columns."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

import torch
from rarefy.artifact.vectors import block_edges
from rarefy.hessian import columns
from rarefy.weights import LayerWeight
from rarefy_schemas import LayerReport
from torch import nn

from rarefy_quantization.codebooks.config import BlockSharing, ProductConfig
from rarefy_quantization.vectors import VectorCoded, VectorQuantizer, cluster

ConfigT = TypeVar("ConfigT", bound=BlockSharing)


class BlockQuantizer(VectorQuantizer[ConfigT, VectorCoded]):
    """Knows the blocks of a layer; their codebooks stand one after the other in that of the layer."""

    def edges(self, row: int) -> list[int]:
        """Return where each block of the places of a row of `row` weights begins, and where the last ends."""
        places = row // self.config.length
        return block_edges(places, min(self.config.blocks or places, places))

    def obstacle(self, model: nn.Module, weight: LayerWeight) -> str | None:
        """Return that a block of a layer has too few vectors, if so."""
        rows, edges = weight.parameter.shape[0], self.edges(columns(weight.layer))
        count = rows * min(last - first for first, last in pairwise(edges))
        if count <= self.config.codes:
            return f"a block has {count:,} vectors of {self.config.length}, and `codes` is {self.config.codes:,}"
        return None

    def report(self, weight: LayerWeight, coded: VectorCoded) -> LayerReport:
        """Return what becomes of a layer."""
        return LayerReport(name=weight.name, kind=weight.kind, action=self.action(weight), scores={
            "distinct": len(coded.codebook), "relative_mse": coded.error(weight.parameter),
        })  # fmt: skip

    def action(self, weight: LayerWeight) -> str:
        """Return what is done to a layer, in words."""
        codes, length = self.config.codes, self.config.length
        blocks = len(self.edges(columns(weight.layer))) - 1
        return f"{blocks} x {codes:,} shared vectors of {length}, {math.log2(codes) / length:.2f} bits per weight"


class ProductQuantization(BlockQuantizer[ProductConfig]):
    """Least squared error of the vectors of each block from few (Gong et al. 2014, section 3.3, eq. 5 and 6)."""

    def code(self, tensor: torch.Tensor, seed: int) -> VectorCoded:
        """Return `tensor` with at most as many distinct vectors in each block as the options say."""
        edges = self.edges(tensor[0].numel())
        return cluster_blocks(tensor, self.config.length, edges, self.config.codes, self.config.rounds, seed)


def cluster_blocks(
    tensor: torch.Tensor, length: int, edges: list[int], count: int, rounds: int, seed: int
) -> VectorCoded:
    """Return `tensor`, (rows, ...), with at most `count` vectors of `length` in each block of places of its rows."""
    generator = torch.Generator().manual_seed(seed)
    grid = tensor.reshape(len(tensor), -1, length)
    codes = torch.empty(grid.shape[:2], dtype=torch.int64, device=grid.device)
    codebooks: list[torch.Tensor] = []
    for first, last in pairwise(edges):
        block = grid[:, first:last]
        found, centroids = cluster(block.reshape(-1, length).double(), count, rounds, generator)
        codes[:, first:last] = found.view(block.shape[:2]) + sum(map(len, codebooks))
        codebooks.append(centroids)
    return VectorCoded(codes.flatten().int(), torch.cat(codebooks).to(tensor.dtype), tensor.shape)
