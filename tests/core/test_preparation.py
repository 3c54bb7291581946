"""Linear layers of other classes are found by what they compute, and by nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rarefy.errors import StageError
from rarefy.modules.skeleton import meta_copy
from rarefy.nouns import implement
from rarefy.preparation.config import LinearLayersConfig
from rarefy.preparation.linear import as_linear
from rarefy.recipe import load_recipe
from rarefy.testing.subjects import small_task
from torch import nn
from torch.nn import functional as F


class Foreign(nn.Module):
    """A layer of 5 inputs, or of as many as outputs, with a weight that is used in a given way."""

    def __init__(self, use: Any, outputs: int = 3, bias: bool = True, transposed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.weight = nn.Parameter(torch.randn(*((5, outputs) if transposed else (outputs, 5))))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(self, x)


def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = x @ layer.weight
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("outputs", [3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_layer_is_one_whichever_way_its_weight_lies(outputs: int, bias: bool, dtype: torch.dtype) -> None:
    uses = (product, True), (lambda layer, x: F.linear(x, layer.weight, layer.bias), False)
    for use, transposed in uses:
        layer = Foreign(use, outputs, bias, transposed).to(dtype)
        linear = as_linear(layer)
        assert linear is not None
        x = torch.randn(2, 4, 5, dtype=dtype)
        torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-5 if dtype != torch.bfloat16 else 0.05)
        assert linear.weight.is_contiguous()


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: product(layer, x).relu(),
        lambda layer, x: product(layer, x) * 1.001,
        lambda layer, x: product(layer, F.dropout(x, 0.5, layer.training)),
        lambda layer, x: product(layer, x) if x.dim() == 2 else product(layer, x.flip(1)),
        lambda layer, x: (product(layer, x), None),
        lambda layer, x: product(layer, x).sum(),
        lambda layer, x: layer.nothing,
    ],
    ids=["a nonlinearity", "a factor", "dropout", "other dimensions", "a tuple", "a sum", "an error"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_computes_something_else_is_none(use: Any, dtype: torch.dtype) -> None:
    layer = Foreign(use).to(dtype)
    layer.train()
    assert as_linear(layer) is None
    assert layer.training


def test_what_has_other_tensors_or_hooks_is_none() -> None:
    for change in (
        lambda layer: layer.register_buffer("scale", torch.ones(1)),
        lambda layer: setattr(layer, "more", nn.Parameter(torch.ones(1))),
        lambda layer: setattr(layer, "inner", nn.ReLU()),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(5, 3, 1))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(0, 3))),
    ):
        layer = Foreign(product)
        change(layer)
        assert as_linear(layer) is None
    assert as_linear(nn.ReLU()) is None


def test_layers_are_replaced_and_the_others_told() -> None:
    model = nn.Sequential(Foreign(product), nn.ReLU(), nn.Linear(3, 5), Foreign(product), Foreign(product))
    model[4].weight = model[3].weight
    technique, x = implement(LinearLayersConfig()), torch.randn(4, 5)
    analysis = technique.analyze(model, small_task())
    assert [(layer.name, layer.action) for layer in analysis.layers] == [("0", "Linear of 5 inputs and 3 outputs")]
    assert {layer.name: layer.reason for layer in analysis.skipped} == {
        "2": "its class is torch's own",
        "3": "it shares its weight with another layer",
        "4": "it shares its weight with another layer",
    }
    changed = technique.transform(copy.deepcopy(model), analysis, small_task())
    assert type(changed[0]) is nn.Linear
    torch.testing.assert_close(changed[:4](x), model[:4](x))
    predicted = technique.predict(meta_copy(model))
    assert type(predicted[0]) is nn.Linear
    assert type(predicted[3]) is Foreign


def test_techniques_that_pass_over_such_a_layer_say_what_to_do() -> None:
    step: Any = load_recipe({"steps": [{"technique": "pruning/magnitude", "amount": 0.5}]}).steps[0]
    model = nn.Sequential(Foreign(product), nn.ReLU(), nn.Linear(3, 5))
    analysis = implement(step).analyze(model, small_task())
    assert [(layer.name, "prepare/linear" in layer.reason) for layer in analysis.skipped] == [("0", True)]
    with pytest.raises(StageError, match=r"'0': it computes what torch's Linear does .* put `prepare/linear`"):
        implement(step).analyze(model[:2], small_task())
