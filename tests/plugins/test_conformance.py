"""Every installed technique, objective and exporter keeps the rules that plugin authors test theirs by."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from rarefy.recipe import load_recipe
from rarefy.registry import get
from rarefy.testing import check_exporter, check_objective, check_technique
from rarefy.testing.subjects import small_model
from torch import nn

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "distillation/logits": [
        {"student": {"source": "zoo:mlp", "options": {"in_channels": 2, "num_classes": 4, "width": 16}}}
    ],
    "pruning/biased-weight-decay": [
        {"amount": 0.6, "finetune": {}},
        {"amount": 0.6, "form": "exponential", "schedule": "cubic", "finetune": {}},
    ],
    **{
        f"pruning/channel-{criterion}": [
            {"amount": 0.4, "round_to": 1},
            {"amount": 0.4, "reconstruct": True, "finetune": {}},
        ]
        for criterion in ("activation", "batch-norm", "fisher", "geometric-median", "l1", "l2", "random", "taylor")
    },
    "pruning/group-lasso": [
        {"strength": 3.0, "structure": structure, "finetune": {"epochs": 2, "optimizer": "sgd", "lr": 0.05}}
        for structure in ("unit", "filter", "channel")
    ],
    "pruning/kernel-lasso": [{"strength": 0.5, "finetune": {"epochs": 2, "optimizer": "sgd", "lr": 0.05}}],
    "pruning/network-slimming": [
        {"amount": 0.4},
        {"amount": 0.4, "strength": 0.01, "finetune": {"epochs": 2, "optimizer": "sgd", "lr": 0.05}},
    ],
    "pruning/magnitude": [
        {"amount": 0.6},
        {"amount": 0.6, "scope": "layer", "finetune": {}},
        {"amount": 0.6, "schedule": "cubic", "finetune": {"memory_format": "channels_last"}},
        {"sensitivity": 0.8, "schedule": "iterative", "rounds": 2, "finetune": {}},
        {"pattern": "2:4", "schedule": "cubic", "finetune": {}},
    ],
    "pruning/movement": [
        {"amount": 0.6, "finetune": {}},
        {"amount": 0.6, "scope": "global", "schedule": "at-end", "finetune": {}},
    ],
    "pruning/obs": [
        {"amount": 0.6, "batches": 2},
        {"amount": 0.6, "batches": 2, "sequential": False, "max_inputs": 72, "finetune": {}},
    ],
    "pruning/obs-network": [
        {"amount": 0.6, "batches": 1, "targets": {"include": ["stem", "classes"]}, "finetune": {}},
    ],
    "pruning/optimal-brain-damage": [{"amount": 0.6, "batches": 1, "probes": 4}],
    "pruning/snip": [{"amount": 0.6}, {"amount": 0.6, "schedule": "cubic", "finetune": {}}],
    "pruning/sparsegpt": [{"amount": 0.6, "batches": 2}, {"pattern": "2:4", "batches": 2, "finetune": {}}],
    "pruning/wanda": [{"amount": 0.6}, {"pattern": "2:4", "schedule": "iterative", "finetune": {}}],
    "prepare/linear": [{}],
    "recovery/batch-norm": [{}],
    "quantization/adaround": [
        {"bits": 3, "batches": 2, "iterations": 20},
        {"bits": 2, "batches": 2, "iterations": 20, "granularity": "tensor", "sequential": False, "finetune": {}},
    ],
    "quantization/binary": [
        {},
        {"method": "bwn", "gradient": "scaled", "granularity": "tensor", "finetune": {}},
        {"method": "binary-connect", "stochastic": True, "keep_ends": False, "finetune": {}},
        {"method": "loss-aware", "finetune": {"memory_format": "channels_last"}},
    ],
    "quantization/equalize": [{}, {"fold": False, "finetune": {}}],
    "quantization/few-multiplications": [
        {},
        {"finetune": {}},
        {"values": "binary", "keep_ends": False, "finetune": {}},
    ],
    "quantization/fixed-point": [
        {"integer_bits": 1, "fraction_bits": 4},
        {"integer_bits": 1, "fraction_bits": 5, "finetune": {}},
    ],
    "quantization/gptq": [
        {"bits": 3, "batches": 2},
        {"bits": 2, "batches": 2, "granularity": "group", "group_size": 32, "symmetric": False, "finetune": {}},
        {"bits": 3, "batches": 2, "granularity": "tensor", "sequential": False, "order": "data"},
        {"target": {"most": 3, "choices": [2, 4], "batches": 1}, "batches": 1},
    ],
    "quantization/hwgq": [
        {},
        {"bits": 1, "levels": "free", "backward": "log-tailed", "sigma": "one", "keep_ends": False, "finetune": {}},
    ],
    "quantization/xnor": [
        {},
        {"norm": "always", "granularity": "tensor", "finetune": {}},
        {"method": "binary-net", "norm": "never", "keep_ends": False, "finetune": {}},
    ],
    "quantization/ternary": [
        {},
        {"threshold": "exact", "granularity": "tensor", "keep_ends": False, "finetune": {}},
        {"method": "ttq", "finetune": {}},
    ],
    "quantization/uniform": [
        {"bits": 3},
        {"bits": 3, "range": "min-max", "symmetric": False, "correct_bias": True, "finetune": {}},
        {"bits": 2, "range": "percentile", "granularity": "group", "group_size": 32},
        {"range": "entropy", "granularity": "tensor", "finetune": {}},
        {"target": {"measure": "bytes", "most": 5000, "by": "loss"}},
    ],
    "quantization/entropy-constrained": [{"rate": 2.0}, {"rate": 1.5, "importance": "curvature", "finetune": {}}],
    "quantization/product": [
        {"codes": 4, "length": 2, "blocks": 2},
        {"codes": 4, "length": 4, "blocks": 2, "finetune": {}},
    ],
    "quantization/q-cnn": [
        {"codes": 4, "length": 2, "blocks": 4, "batches": 2},
        {"codes": 8, "length": 4, "blocks": 2, "batches": 2, "correct": False, "finetune": {}},
    ],
    "quantization/soft-weight-sharing": [
        {"strength": 1e-3, "finetune": {}},
        {"strength": 1e-3, "biases": True, "zero_share_strength": 100, "finetune": {}},
    ],
    "quantization/residual": [
        {"codes": 4, "length": 2},
        {"codes": 8, "stages": 3, "length": 4, "joint": False, "finetune": {}},
    ],
    "quantization/vector": [{"length": 4, "codes": 16}, {"length": 2, "codes": 8, "finetune": {}}],
    "quantization/precision": [{}, {"bits": 4, "targets": {"exclude": ["0"]}}],
    "quantization/trellis": [{"rate": 3.0}, {"rate": 2.0, "per_layer": {"*": 4.0}, "finetune": {}}],
    "quantization/kmeans": [
        {"bits": 3},
        {"bits": 3, "init": "random", "finetune": {}},
        {"bits": 3, "importance": "curvature", "batches": 1},
    ],
}


def with_a_linear_layer_of_another_class() -> nn.Module:
    model = small_model()
    layer: Any = model.get_submodule("hidden")
    model.set_submodule("hidden", Transposed(layer))
    return model


class Transposed(nn.Module):
    """A linear layer with its weight the other way round."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


MODELS = {"prepare/linear": with_a_linear_layer_of_another_class}
CASES = [(name, options) for name in get().techniques for options in OPTIONS.get(name, [{}, {"finetune": {}}])]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_technique(name: str, options: dict[str, Any]) -> None:
    step = load_recipe({"steps": [{"technique": name, **options}]}).steps[0]
    check_technique(step, model=MODELS.get(name, small_model)())


@pytest.mark.parametrize("name", list(get().objectives))
def test_objective(name: str) -> None:
    check_objective(name)


@pytest.mark.parametrize("name", list(get().exporters))
def test_exporter(name: str) -> None:
    if name.startswith("onnx") and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("pip install 'rarefy[onnx]'")
    check_exporter(name)
