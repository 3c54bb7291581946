"""Uniform quantization of models: exact products, zeros, training through the rounding, bias correction."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.testing.subjects import Inputs
from rarefy.training import fit
from rarefy_quantization.config import GPTQConfig, UniformConfig
from rarefy_quantization.grids import Grid, Units
from rarefy_quantization.training import LearnedGrid
from rarefy_schemas import Finetune
from torch import nn
from torch.nn.utils import parametrize

NO_TASK: Any = None


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))


def quantized(model: nn.Module, config: Any, task: Any = NO_TASK) -> nn.Module:
    technique = implement(config)
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    if config.finetune is not None:
        fit(changed, model, task, config.finetune, rules=rules_for(technique, changed))
    return technique.consolidate(changed).eval()


def steps_of(model: nn.Module, config: UniformConfig) -> dict[str, Grid]:
    return implement(config).analyze(model, NO_TASK).plan


def is_on(grid: Grid, units: torch.Tensor) -> bool:
    codes = units / grid.step
    return bool(((codes == codes.round()) & (codes >= grid.low) & (codes <= grid.high)).all())


class TestWeights:
    @pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"range": "min-max", "bits": 3}, {"bits": 5}])
    @pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
    def test_they_are_integers_times_steps_bit_for_bit(self, granularity: str, options: dict[str, Any]) -> None:
        model, config = network(), UniformConfig(granularity=granularity, group_size=32, **options)
        changed = quantized(model, config)
        for name, grid in steps_of(model, config).items():
            weight = changed.get_submodule(name).weight.detach()
            split = Units.of(weight.shape, granularity, 32).split(weight)
            assert is_on(grid, split)
            assert torch.equal(split.double(), grid.codes(split).double() * grid.step.double())

    def test_the_report_tells_bits_steps_and_error(self) -> None:
        model, config = network(), UniformConfig(bits=3, per_layer={"3": 6}, granularity="group", group_size=32)
        before = copy.deepcopy(model.state_dict())
        analysis = implement(config).analyze(model, NO_TASK)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        after = quantized(model, config)
        assert [layer.action for layer in analysis.layers] == [
            f"{bits} bits, symmetric, a step per group of 32" for bits in (3, 6, 3)
        ]
        assert [layer.scores["steps"] for layer in analysis.layers] == [8, 288, 10]
        for layer in analysis.layers:
            old, new = (m.get_submodule(layer.name).weight.detach().double() for m in (model, after))
            assert layer.scores["relative_mse"] == pytest.approx(float((old - new).square().sum() / old.square().sum()))

    def test_bits_per_layer(self) -> None:
        changed = quantized(network(), UniformConfig(bits=2, per_layer={"3": 6}, granularity="tensor"))
        counts = [changed[i].weight.unique().numel() for i in (0, 3, 5)]
        assert counts[0] <= 4
        assert 32 < counts[1] <= 64
        assert counts[2] <= 4

    @pytest.mark.parametrize("options", [{}, {"symmetric": False, "bits": 3}, {"granularity": "group"}])
    def test_zeros_stay_zero(self, options: dict[str, Any]) -> None:
        model = network()
        with torch.no_grad():
            model[3].weight[model[3].weight.abs() < 0.03] = 0
            model[3].weight[5] = 0
        changed = quantized(model, UniformConfig(**options))
        assert not changed[3].weight[model[3].weight == 0].any()
        assert changed[3].weight.any()

    def test_the_layers_are_plain_and_biases_the_same(self) -> None:
        model = network()
        changed = quantized(model, UniformConfig())
        assert [type(module) for module in changed] == [type(module) for module in model]
        assert changed.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(changed[3].bias, model[3].bias)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_are_kept(self, dtype: torch.dtype) -> None:
        model = network().to(dtype)
        after = quantized(model, UniformConfig(bits=4))[3].weight
        assert after.dtype == dtype
        assert max(row.unique().numel() for row in after) <= 16
        torch.testing.assert_close(after, model[3].weight, atol=0.02, rtol=0)

    def test_channels_last_weights(self) -> None:
        model = nn.Sequential(nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last)
        plain = nn.Sequential(nn.Conv2d(8, 16, 3))
        plain.load_state_dict(model.state_dict())
        assert torch.equal(*(quantized(m, UniformConfig(bits=4))[0].weight for m in (model, plain)))

    def test_layers_that_have_nothing_are_told(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(4, 0)
        dead = nn.Linear(8, 8)
        nn.init.zeros_(dead.weight)
        model = nn.ModuleDict({"empty": empty, "dead": dead, "good": nn.Linear(8, 8)})
        analysis = implement(UniformConfig()).analyze(model, NO_TASK)
        assert [layer.name for layer in analysis.layers] == ["good"]
        assert {layer.name for layer in analysis.skipped} == {"empty", "dead"}


class TestLearnedSteps:
    STEP, LOW, HIGH = 0.5, -2.0, 1.0

    def rounding(self, size: int) -> LearnedGrid:
        values = (torch.tensor([[value]]) for value in (self.STEP, self.LOW, self.HIGH))
        return LearnedGrid(Grid(*values), Units((1, size), size, size))

    def test_gradients_are_those_of_the_paper(self) -> None:
        weight = torch.tensor([[-1.9, -0.7, -0.2, 0.1, 0.3, 0.4, 2.0]], requires_grad=True)
        upstream = torch.tensor([[1.0, -2.0, 3.0, 0.5, -1.0, 2.0, 0.25]])
        rounding = self.rounding(7)
        out = rounding(weight)
        assert out.tolist() == [[-1.0, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5]]
        (out * upstream).sum().backward()
        # eq. 3 with v / s = -3.8, -1.4, -0.4, 0.2, 0.6, 0.8, 4
        pieces = torch.tensor([[-2.0, -1 + 1.4, 0.4, -0.2, 1 - 0.6, 1 - 0.8, 1.0]])
        scale = 1 / math.sqrt(7 * 2)  # the largest code of -2, -1, 0, 1
        expected = float((pieces * upstream).sum()) * scale
        # SGD of rate r moves the step, 0.5 times the factor, by r times this
        assert self.STEP * rounding.factor.grad.item() == pytest.approx(expected, rel=1e-5)
        assert weight.grad.tolist() == [[0.0, -2.0, 3.0, 0.5, -1.0, 2.0, 0.0]]

    def test_where_all_is_clipped_the_gradient_is_that_of_finite_differences(self) -> None:
        weight, rounding = torch.tensor([[-3.0, 4.0, 5.0, -6.0, 7.0]]), self.rounding(5)
        rounding(weight).square().sum().backward()
        slope = rounding.factor.grad.item() * self.STEP / (1 / math.sqrt(5 * 2))
        with torch.no_grad():
            losses = []
            for factor in (1 + 2.0**-8, 1 - 2.0**-8):
                rounding.factor.fill_(factor)
                losses.append(rounding(weight).square().sum().item())
        assert slope == pytest.approx((losses[0] - losses[1]) / (2 * 2.0**-8 * self.STEP), rel=1e-4)

    def test_a_step_never_turns_negative(self) -> None:
        rounding = self.rounding(2)
        with torch.no_grad():
            rounding.factor.fill_(-3)
        assert rounding.step.item() > 0

    def test_training_evaluates_exactly_what_is_left_of_it(self, digits_task: Any, trained_digits: nn.Module) -> None:
        config = UniformConfig(bits=3, finetune=Finetune(max_steps=5))
        technique = implement(config)
        analysis = technique.analyze(trained_digits, digits_task)
        changed = technique.transform(copy.deepcopy(trained_digits), analysis, digits_task)
        assert parametrize.is_parametrized(changed.fc1)
        fit(changed, trained_digits, digits_task, config.finetune, rules=rules_for(technique, changed))
        x = digits_task.example_inputs(8)[0]
        with torch.no_grad():
            during = changed.eval()(x)
            steps = {
                name: module.parametrizations.weight[0].step
                for name, module in changed.named_children()
                if parametrize.is_parametrized(module)
            }
            plain = technique.consolidate(changed)
            assert torch.equal(during, plain(x))
        assert not parametrize.is_parametrized(plain.fc1)
        for name, step in steps.items():
            codes = plain.get_submodule(name).weight.flatten(1) / step
            assert torch.equal(codes, codes.round())
            assert (step != analysis.plan[name].step).any()

    def test_zeros_stay_zero_in_training(self, digits_task: Any, trained_digits: nn.Module) -> None:
        with torch.no_grad():
            trained_digits.fc1.weight[trained_digits.fc1.weight.abs() < 0.02] = 0
        zeros = trained_digits.fc1.weight == 0
        config = UniformConfig(bits=8, finetune=Finetune(max_steps=10, lr=1e-2))
        changed = quantized(trained_digits, config, digits_task)
        assert not changed.fc1.weight[zeros].any()
        assert changed.fc1.weight[~zeros].count_nonzero() > 0.8 * (~zeros).sum()

    def test_layers_that_share_a_weight_still_do(self, digits_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
        model[3].weight = model[1].weight
        for finetune in (None, Finetune(max_steps=2)):
            changed = quantized(model, UniformConfig(bits=4, finetune=finetune), digits_task)
            assert changed[3].weight is changed[1].weight
            assert max(row.unique().numel() for row in changed[1].weight) <= 16


class TestBiasCorrection:
    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Linear(12, 5), (30, 12)),
            (nn.Conv2d(4, 6, 3, padding=1, groups=2), (9, 4, 6, 6)),
            (nn.Conv1d(3, 4, 3, stride=2), (9, 3, 11)),
        ],
    )
    def test_mean_outputs_of_a_layer_come_back(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        inputs = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
        model, task = nn.Sequential(layer), Inputs(*inputs.split(5))
        channels = [0, *range(2, inputs.dim())]
        plain, corrected = (quantized(model, UniformConfig(bits=2, correct_bias=on), task) for on in (False, True))
        with torch.no_grad():
            means = [m(inputs).mean(channels) for m in (model, corrected, plain)]
        torch.testing.assert_close(means[1], means[0], atol=1e-5, rtol=1e-5)
        assert (means[2] - means[0]).abs().max() > 1e-3
        assert torch.equal(corrected[0].weight, plain[0].weight)

    def test_layers_that_share_a_weight_are_corrected_each_on_its_own_inputs(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        inputs = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
        changed = quantized(model, UniformConfig(bits=2, correct_bias=True), Inputs(inputs))
        with torch.no_grad():
            hidden = model[1](model[0](inputs))
            for layer, x in ((0, inputs), (2, hidden)):
                torch.testing.assert_close(changed[layer](x).mean(0), model[layer](x).mean(0), atol=1e-5, rtol=1e-5)
        assert changed[2].weight is changed[0].weight

    def test_layers_without_bias_or_data_stay_as_they_are(self) -> None:
        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(x)

        model = Idle()
        changed = quantized(model, UniformConfig(bits=2, correct_bias=True), Inputs(torch.rand(5, 4)))
        assert changed.used.bias is None
        assert torch.equal(changed.idle.bias, model.idle.bias)

    def test_it_needs_unlabelled_data_and_only_then(self) -> None:
        assert UniformConfig(correct_bias=True).needed_data() == "unlabelled"
        assert UniformConfig().needed_data() == "none"
        with pytest.raises(StageError, match="gives no batches"):
            quantized(network(), UniformConfig(correct_bias=True), Inputs())


class TestDigits:
    def test_eight_bits_per_channel_cost_nothing(self, digits_task: Any, trained_digits: nn.Module) -> None:
        full = digits_task.score(trained_digits, "test")
        for options in ({}, {"range": "min-max"}, {"range": "percentile"}, {"range": "entropy"}, {"symmetric": False}):
            changed = quantized(trained_digits, UniformConfig(**options))
            assert abs(digits_task.score(changed, "test") - full) <= 0.005, options

    def test_bias_correction_lowers_the_error_of_few_bits(self, digits_task: Any, trained_digits: nn.Module) -> None:
        x = next(iter(digits_task.loader("validation", 180)))[0]
        errors = []
        for on in (False, True):
            changed = quantized(trained_digits, UniformConfig(bits=3, correct_bias=on), digits_task)
            with torch.no_grad():
                errors.append(float((changed(x) - trained_digits(x)).square().mean()))
        assert errors[1] < 0.6 * errors[0]

    def test_training_brings_two_bits_back(self, digits_task: Any, trained_digits: nn.Module) -> None:
        full = digits_task.score(trained_digits, "test")
        rounded = quantized(trained_digits, UniformConfig(bits=2))
        config = UniformConfig(bits=2, finetune=Finetune(epochs=3, lr=1e-3))
        trained = quantized(trained_digits, config, digits_task)
        before, after = (digits_task.score(m, "test") for m in (rounded, trained))
        assert before < full - 0.04
        assert after > full - 0.03
        assert max(row.unique().numel() for row in trained.fc1.weight) <= 4


class TestBadInput:
    @pytest.mark.parametrize("kind", [UniformConfig, GPTQConfig])
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"bits": 1}, "greater than or equal to 2"),
            ({"bits": 9}, "less than or equal to 8"),
            ({"per_layer": {"3": 12}}, "per_layer.3"),
            ({"granularity": "row"}, "'tensor', 'channel' or 'group'"),
            ({"group_size": 48}, "32, 64 or 128"),
            ({"range": "max"}, "'min-max', 'percentile', 'mse' or 'entropy'"),
            ({"percentile": 50}, "greater than 50"),
            ({"batches": 0}, "batches"),
            ({"codes": 16}, "codes"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, kind: Any, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            kind(**options)

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(StageError, match=r"'fc\*'.*target layers are 0, 3, 5"):
            implement(UniformConfig(per_layer={"fc*": 3})).analyze(network(), NO_TASK)

    def test_values_that_are_not_finite_are_refused(self) -> None:
        model = network()
        model[3].weight.data.view(-1)[0] = math.nan
        with pytest.raises(StageError, match=r"'3'.*NaN or infinite"):
            implement(UniformConfig()).analyze(model, NO_TASK)
