"""Vector quantization of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from rarefy.hessian import columns
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis
from rarefy.weights import LayerWeight, layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.codes import Lookup, entropy
from rarefy_quantization.config import VectorConfig, VectorSharing
from rarefy_quantization.sharing import CodebookTechnique

_ELEMENTS = 2**23
"""Most distances that are computed at a time."""
ConfigT = TypeVar("ConfigT", bound=VectorSharing)
CodedT = TypeVar("CodedT")


@dataclass(frozen=True)
class VectorCoded:
    """A tensor whose vectors of consecutive entries are looked up in a codebook."""

    codes: torch.Tensor
    """(vectors,), int32, in the order of the entries."""
    codebook: torch.Tensor
    """(distinct vectors, length), of the tensor's type."""
    shape: torch.Size

    def decode(self) -> torch.Tensor:
        """Return the tensor."""
        return self.codebook[self.codes].reshape(self.shape)

    def lookup(self) -> Lookup:
        """Return the parametrization of the tensor by its codebook."""
        return SharedVectors(self)

    def error(self, tensor: torch.Tensor) -> float:
        """Return the squared error as a share of the square of `tensor`."""
        return relative_error(self.decode(), tensor)

    def entropy(self) -> float:
        """Return the order-0 entropy of the codes in bits per weight."""
        return entropy(self.codes) / self.codebook.shape[1]


class SharedVectors(Lookup):
    """Parametrization of a tensor by its vectors; the gradient of one is the sum over the places that use it."""

    codes: torch.Tensor

    def __init__(self, coded: VectorCoded) -> None:
        super().__init__()
        self.size, self.shape = coded.codebook.shape, coded.shape
        self.register_buffer("codes", coded.codes)

    def forward(self, codebook: torch.Tensor) -> torch.Tensor:
        """Look the codes up."""
        return codebook.index_select(0, self.codes).view(self.shape)

    def right_inverse(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the codebook of a tensor that these codes describe."""
        rows = tensor.reshape(-1, self.size[1])
        return rows.new_zeros(self.size).index_copy_(0, self.codes.long(), rows)


class VectorQuantizer(CodebookTechnique[ConfigT], Generic[ConfigT, CodedT]):
    """Gives the vectors of each target layer codes; write `code`, `obstacle` and `report`."""

    def code(self, tensor: torch.Tensor, seed: int) -> CodedT:
        """Return `tensor` with few distinct vectors, or sums of few."""
        raise NotImplementedError

    def obstacle(self, model: nn.Module, weight: LayerWeight) -> str | None:
        """Return why a layer whose rows can be cut into vectors is left alone, or None."""
        raise NotImplementedError

    def report(self, weight: LayerWeight, coded: CodedT) -> LayerReport:
        """Return what becomes of a layer."""
        raise NotImplementedError

    @torch.no_grad()
    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Quantize every target layer and say with what error."""
        weights, skipped = layer_weights(model, self.config)
        layers, plan = [], {}
        for weight in weights:
            if (obstacle := uneven(weight, self.config.length) or self.obstacle(model, weight)) is not None:
                skipped.append(SkippedLayer(name=weight.name, kind=weight.kind, reason=obstacle))
                continue
            name = f"{weight.name}.weight"
            plan[name] = self.code(weight.parameter.detach(), derive(self.seed, name))
            layers.append(self.report(weight, plan[name]))
        return Analysis(tuple(layers), tuple(skipped), plan)


class VectorQuantization(VectorQuantizer[VectorConfig, VectorCoded]):
    """Least squared error of vectors from few (Gong et al. 2014, section 3.3, with one codebook for a whole layer)."""

    def code(self, tensor: torch.Tensor, seed: int) -> VectorCoded:
        """Return `tensor` with at most as many distinct vectors as the options say."""
        rows = tensor.reshape(-1, self.config.length)
        generator = torch.Generator().manual_seed(seed)
        codes, codebook = cluster(rows.double(), self.config.codes, self.config.rounds, generator)
        return VectorCoded(codes.int(), codebook.to(tensor.dtype), tensor.shape)

    def obstacle(self, model: nn.Module, weight: LayerWeight) -> str | None:
        """Return that a layer has too few vectors, if so."""
        count = weight.parameter.numel() // self.config.length
        if count <= self.config.codes:
            return f"it has {count:,} vectors of {self.config.length}, and `codes` is {self.config.codes:,}"
        return None

    def report(self, weight: LayerWeight, coded: VectorCoded) -> LayerReport:
        """Return what becomes of a layer."""
        count, length = coded.codebook.shape
        action = f"{count:,} shared vectors of {length}, {math.log2(count) / length:.2f} bits per weight"
        scores = {"distinct": count, "relative_mse": coded.error(weight.parameter), "entropy": coded.entropy()}
        return LayerReport(name=weight.name, kind=weight.kind, action=action, scores=scores)


def relative_error(decoded: torch.Tensor, tensor: torch.Tensor) -> float:
    """Return the squared error of a tensor as a share of its square."""
    exact = tensor.detach().double()
    return float((decoded.double() - exact).square().sum() / exact.square().sum())


def uneven(weight: LayerWeight, length: int) -> str | None:
    """Return why the rows of a layer cannot be cut into vectors, or None when they can."""
    row = columns(weight.layer)
    return f"its outputs have {row:,} weights each, no multiple of `length`, {length}" if row % length else None


def cluster(
    rows: torch.Tensor, count: int, rounds: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cluster of each of `rows`, (n, length), and the centroids, (at most `count`, length).

    Lloyd's iterations from the centroids of k-means++ (Arthur & Vassilvitskii 2007); a centroid that lost all its rows
    comes back at the row that is farthest from its own.
    """
    centroids = _spread(rows, count, generator)
    before: torch.Tensor | None = None
    for _ in range(rounds):
        codes, errors = _nearest(rows, centroids)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        centroids, empty = _means(rows, codes, len(centroids))
        if empty.any():
            farthest = errors.argsort(descending=True, stable=True)[: int(empty.sum())]
            centroids[empty] = rows[farthest]
            before = None
    codes, _ = _nearest(rows, centroids)
    used, codes = torch.unique(codes, return_inverse=True)
    return codes, centroids[used]


def _spread(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return up to `count` distinct rows, each drawn with a chance that grows with its squared distance to the rest."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distance = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count and bool((distance > 0).any()):
        edges = distance.cumsum(0)
        place = torch.rand(1, generator=generator, dtype=torch.float64).to(rows) * edges[-1]
        new = int(torch.searchsorted(edges, place, right=True).clamp(max=len(rows) - 1))
        chosen.append(new)
        distance = distance.minimum((rows - rows[new]).square().sum(1))
    return rows[chosen].clone()


def _nearest(rows: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest centroid of each row, of equally near ones the first, and the squared distance to it."""
    norms = centroids.square().sum(1)
    codes = torch.cat(
        [(norms - 2 * part @ centroids.T).argmin(1) for part in rows.split(max(1, _ELEMENTS // len(centroids)))]
    )
    return codes, (rows - centroids[codes]).square().sum(1)


def _means(rows: torch.Tensor, codes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of each cluster, and which clusters are empty."""
    sizes = torch.bincount(codes, minlength=count)
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, codes, rows)
    return sums / sizes.clamp(min=1).unsqueeze(1), sizes == 0
