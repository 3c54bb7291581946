"""Which layers a technique acts on."""

from __future__ import annotations

import copy

import torch
from rarefy.nouns import implement
from rarefy.recovery.config import BatchNormConfig
from rarefy.technique import derived_from, select
from rarefy.testing.subjects import Inputs
from rarefy.weights import layer_weights
from rarefy_quantization.config import GPTQConfig, UniformConfig
from torch import nn
from torch.nn import functional as F


class Same(nn.Conv2d):
    """A convolution that keeps the size of images, as timm has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Clamped(nn.BatchNorm2d):
    """A batch norm with its activation, as timm has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Same(2, 4, 3), Clamped(4), nn.Conv2d(4, 4, 3), nn.MultiheadAttention(4, 2)).eval()


def test_weights_of_derived_layers_count_where_only_weights_matter() -> None:
    weights, skipped = layer_weights(network(), UniformConfig())
    assert [(weight.name, weight.kind) for weight in weights] == [("0", "Same"), ("2", "Conv2d")]
    assert skipped == []
    model = network()
    technique = implement(UniformConfig(bits=2))
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, None), None)
    changed = technique.consolidate(changed)
    assert isinstance(changed[0], Same)
    assert all(len(row.unique()) <= 4 for row in changed[0].weight.flatten(1))


def test_a_technique_that_computes_with_a_layer_says_why_it_leaves_a_derived_one() -> None:
    weights, skipped = layer_weights(network(), GPTQConfig())
    assert [weight.name for weight in weights] == ["2"]
    assert [(layer.name, layer.kind) for layer in skipped] == [("0", "Same")]
    assert "derived from Conv2d" in skipped[0].reason
    alone = Same(2, 4, 3)
    alone.inner = nn.Linear(2, 2)  # the model itself is no layer of it
    assert layer_weights(alone, GPTQConfig())[1] == []
    excluded = GPTQConfig(targets={"exclude": ["0"]})
    assert layer_weights(network(), excluded)[1] == []


def test_statistics_of_derived_batch_norms_are_measured() -> None:
    model, batch = network()[:2], torch.randn(8, 2, 6, 6)
    technique = implement(BatchNormConfig())
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, Inputs(batch)), Inputs(batch))
    torch.testing.assert_close(changed[1].running_mean, model[0](batch).mean((0, 2, 3)))


def test_classes_of_torch_itself_are_what_they_are() -> None:
    """The output projection of attention is derived from `Linear`, and is not called."""
    model = network()
    assert derived_from(model[3].out_proj, ("Linear",)) is None
    assert derived_from(model[0], ("Conv2d", "Linear")) == "Conv2d"
    assert derived_from(model[0], ("Linear",)) is None
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert derived_from(parametrized, ("Linear",)) is None
    assert [name for name, _ in select(model, UniformConfig())] == ["0", "2"]
