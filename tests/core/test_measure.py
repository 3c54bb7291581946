from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rarefy.errors import StageError
from rarefy.measure import (
    compression_rate,
    flops,
    flops_by_module,
    histograms,
    index_space_saving,
    latency,
    layer_parameters,
    measure,
    nonzero,
    parameters,
    peak_memory,
    speed_up_rate,
)
from rarefy_schemas import Evaluate
from torch import nn


class Function(nn.Module):
    """A model made of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


class Constant:
    """A task whose metric and inputs are given."""

    metric, higher_is_better, has_labels = "perplexity", False, True

    def score(self, model: nn.Module, split: str) -> float:
        return {"validation": 12.5}[split]

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, ...]:
        return (torch.ones(batch_size, 6),)


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_tied_parameter_counts_once_and_buffers_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    assert parameters(model) == 25 + 5 + 5 + 5 + 5
    assert layer_parameters(model) == {"0": int(25 + model[0].bias.count_nonzero()), "1": 5, "2": 5}


def test_exact_zeros_are_the_only_parameters_that_nonzero_leaves_out() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1e-30, -0.0], [2.0, 0.0, 3.0]]))
        model.bias.fill_(1)
    assert nonzero(model) == 5
    assert layer_parameters(model) == {"(root)": 5}


def test_rates_are_the_survey_s() -> None:
    assert compression_rate(1000, 100) == 10
    assert speed_up_rate(3.0, 1.5) == 2
    assert index_space_saving(1000, 100) == 0.9
    assert index_space_saving(1000, 100, printed=True) == 9
    with pytest.raises(ValueError, match="positive"):
        compression_rate(1000, 0)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(7, 3), (4, 7), 4 * 7 * 3),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 10), 2 * 8 * 10 * 10 * 3 * 3 * 3),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), (1, 4, 9, 9), 8 * 4 * 4 * 2 * 3 * 3),
        (nn.LSTM(16, 8, batch_first=True), (2, 10, 16), 2 * 10 * 4 * 8 * (16 + 8)),
        (Function(lambda x: nn.functional.scaled_dot_product_attention(x, x, x)), (2, 4, 10, 8), 12800),
    ],
    ids=["linear", "conv", "grouped", "lstm", "attention"],
)  # fmt: skip
@pytest.mark.parametrize("needs_values", [False, True])
def test_flops_are_twice_the_macs(model: nn.Module, shape: tuple[int, ...], macs: int, needs_values: bool) -> None:
    """Also for a model that looks at its values, which cannot run on the meta device."""

    def looking(x: torch.Tensor) -> Any:
        return model(x) if x.sum().item() < 1e9 else x

    assert flops(Function(looking) if needs_values else model, (torch.randn(shape),)) == 2 * macs


def test_attention_is_counted_in_multi_head_attention() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    tokens = 2 * 10
    projections, attention, mlp = tokens * 4 * 32 * 32, 2 * tokens * 10 * 32, tokens * 2 * 32 * 64
    assert flops(layer, (torch.randn(2, 10, 32),)) == 2 * (projections + attention + mlp)


def test_a_fourier_transform_is_not_free() -> None:
    there_and_back = Function(lambda x: torch.fft.irfft(torch.fft.rfft(x), n=16))
    assert flops(there_and_back, (torch.randn(3, 16),)) == 2 * 3 * 2.5 * 16 * 4


def test_flops_take_several_inputs_and_leave_model_and_inputs_alone() -> None:
    model = nn.MultiheadAttention(8, 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    queries, keys = torch.randn(3, 1, 8), torch.randn(5, 1, 8)
    macs = (3 + 5 + 5 + 3) * 8 * 8 + 2 * 3 * 5 * 8
    assert flops(model, (queries, keys, keys)) == 2 * macs
    assert model.training
    assert queries.device.type == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flops_of_the_modules_add_up_to_the_model_s() -> None:
    model = linears()
    by_module = flops_by_module(model, (torch.ones(1, 6),))
    assert by_module == {"": 2 * (48 + 32), "0": 2 * 48, "2": 2 * 32}


def test_flops_without_values_work_on_the_meta_device_or_say_why_not() -> None:
    with torch.device("meta"):
        model = linears()
    assert flops(model, (torch.ones(1, 6),)) == 2 * (48 + 32)
    looking = nn.Sequential(model, Function(lambda x: x if x.sum().item() > 0 else -x))
    with pytest.raises(StageError, match="without values"):
        flops(looking, (torch.ones(1, 6),))


def test_peak_memory_is_weights_inputs_and_the_largest_set_of_activations() -> None:
    narrow_then_wide = nn.Sequential(nn.Linear(10, 2), nn.Linear(2, 30), nn.Linear(30, 30)).train()
    weights = parameters(narrow_then_wide)
    assert peak_memory(narrow_then_wide, (torch.randn(4, 10),)) == 4 * (weights + 4 * 10 + 4 * 30 + 4 * 30)
    assert narrow_then_wide.training


def test_views_and_work_in_place_need_no_memory() -> None:
    model = Function(lambda x: x.view(-1).relu_())
    assert peak_memory(model, (torch.randn(4, 10),)) == 4 * 40


def test_a_model_is_as_fast_as_itself_and_faster_than_a_slow_twin() -> None:
    model, inputs = linears(), (torch.ones(1, 6),)
    slow = nn.Sequential(model, Function(lambda x: (time.sleep(0.002), x)[1]))
    same = latency(model, model, inputs, rounds=10)
    assert 0.3 < same.speed_up < 3
    gained = latency(slow, model, inputs, rounds=5)
    assert gained.low > 2
    assert gained.low <= gained.speed_up <= gained.high
    assert gained.original_ms > 2 * gained.ms[1]
    lost = latency(model, slow, inputs, rounds=5)
    assert lost.ratio > 2


def test_timing_restores_modes_and_threads() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6)).train()
    model[2].eval()
    threads, seen = torch.get_num_threads(), set[tuple[int, bool]]()
    model.register_forward_hook(lambda module, *_: seen.add((torch.get_num_threads(), module.training)))
    latency(model, model, (torch.ones(2, 6),), rounds=3, threads=threads + 1)
    assert seen == {(threads + 1, False)}
    assert torch.get_num_threads() == threads
    assert [m.training for m in model] == [True, True, False]


class Caching(nn.Module):
    """A model that computes its scale in the first forward pass, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.scale: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale = torch.arange(6.0).cos() if self.scale is None else self.scale
        return self.layer(x) * self.scale


def test_a_model_that_caches_can_be_trained_after_it_was_timed() -> None:
    model = Caching()
    latency(model, model, (torch.ones(2, 6),), rounds=3)
    model(torch.ones(2, 6)).sum().backward()
    assert model.layer.weight.grad is not None


def test_the_original_and_the_model_take_turns_in_going_first() -> None:
    order: list[str] = []
    original = Function(lambda x: (order.append("original"), time.sleep(0.003)))
    model = Function(lambda x: (order.append("model"), time.sleep(0.003)))
    latency(original, model, (torch.ones(1),), rounds=4)
    assert order[-8:] == ["original", "model", "model", "original"] * 2


def test_measure_gives_every_figure_beside_the_original() -> None:
    original = linears()
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        for parameter in [*original.parameters(), *model.parameters()]:
            parameter.fill_(1)
        model[0].weight[:2] = 0
    found = {m.name: m for m in measure(model, original, Constant(), Evaluate(batch_sizes=(1, 3), rounds=3))}
    values = {name: measurement.value for name, measurement in found.items()}
    assert found["perplexity"].value == 12.5
    assert found["perplexity"].better == "lower"
    assert (values["parameters"], values["nonzero"], values["sparsity"]) == (48, 36, 0.25)
    assert values["compression_rate"] == (56 + 36) / 48
    assert values["nonzero_rate"] == (56 + 36) / 36
    assert values["index_space_saving"] == 1 - 48 / 92
    assert values["flops"] == 2 * (24 + 16)
    assert values["flops_rate"] == 2
    assert values["peak_memory"] >= 4 * 48
    for batch in (1, 3):
        time_, speed = found[f"latency@{batch}"], found[f"speed_up_rate@{batch}"]
        assert time_.low <= time_.value <= time_.high
        assert speed.low <= speed.value <= speed.high


def test_a_model_without_weights_has_no_rates() -> None:
    names = {m.name for m in measure(nn.Identity(), linears(), Constant(), Evaluate(batch_sizes=()))}
    assert names == {"perplexity", "parameters", "nonzero", "flops", "peak_memory"}


def test_histograms_leave_out_zeros_and_keep_the_largest_layers() -> None:
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight[:4] = 0
    (found,) = histograms(layer, bins=7)
    assert (found.layer, len(found.edges), sum(found.counts)) == ("(root)", 8, 60)
    assert found.edges[0] == layer.weight.min()
    many = nn.Sequential(*(nn.Linear(size, size) for size in range(1, 21)))
    assert [h.layer for h in histograms(many)] == [str(index) for index in range(8, 20)]
