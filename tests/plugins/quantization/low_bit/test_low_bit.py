"""What binary and ternary quantization have in common: layers, ends, values, training and the file."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy import artifact
from rarefy.errors import StageError
from rarefy.modules import Base
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.training import fit
from rarefy_quantization.low_bit.config import BinaryConfig, TernaryConfig
from rarefy_schemas import Finetune, Targets
from torch import nn
from torch.nn.utils import parametrize

METHODS: list[tuple[Any, dict[str, Any]]] = [
    (BinaryConfig, {"method": "binary-connect"}),
    (BinaryConfig, {"method": "binary-connect", "stochastic": True}),
    (BinaryConfig, {"method": "bwn"}),
    (BinaryConfig, {"method": "bwn", "gradient": "scaled", "granularity": "tensor"}),
    (BinaryConfig, {"method": "loss-aware"}),
    (TernaryConfig, {"method": "twn"}),
    (TernaryConfig, {"method": "twn", "threshold": "exact", "granularity": "tensor"}),
    (TernaryConfig, {"method": "ttq"}),
]
every_method = pytest.mark.parametrize(("kind", "options"), METHODS)
ALL = {"keep_ends": False}


class Example:
    """A task that has example inputs and nothing else."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def example_inputs(self, batch_size: int = 1) -> tuple[torch.Tensor]:
        return (torch.zeros(batch_size, *self.shape),)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))


def are_few(weight: torch.Tensor, kind: Any, options: dict[str, Any]) -> bool:
    """Tell whether a weight takes the values that the method allows."""
    if options["method"] in ("binary-connect", "ttq") or options.get("granularity") == "tensor":
        rows = [weight.flatten()]
    else:
        rows = list(weight.flatten(1))
    ternary = kind is TernaryConfig
    symmetric = options["method"] == "ttq" or all(len(row.abs().unique()) <= 1 + ternary for row in rows)
    return symmetric and all(len(row.unique()) <= 2 + ternary and (ternary or bool(row.all())) for row in rows)


class TestLayers:
    @every_method
    def test_they_are_plain_with_few_values_and_the_ends_are_left(
        self, kind: Any, options: dict[str, Any], quantized: Any
    ) -> None:
        model = network()
        changed = quantized(model, kind(**options), Example(1, 8, 8))
        assert [type(module) for module in changed] == [type(module) for module in model]
        assert changed.state_dict().keys() == model.state_dict().keys()
        assert are_few(changed[3].weight, kind, options)
        assert not torch.equal(changed[3].weight, model[3].weight)
        for name, value in model.state_dict().items():
            assert name == "3.weight" or torch.equal(changed.state_dict()[name], value)

    def test_the_ends_are_named_with_the_reason(self) -> None:
        class Backwards(nn.Module):
            """Registers its layers in another order than it runs them in."""

            def __init__(self) -> None:
                super().__init__()
                self.last, self.middle, self.first = (nn.Linear(4, 4) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.last(self.middle(self.first(x)))

        model = Backwards()
        analysis = implement(BinaryConfig()).analyze(model, Example(4))
        assert [layer.name for layer in analysis.layers] == ["middle"]
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert reasons.keys() == {"first", "last"}
        for name, reason in reasons.items():
            assert f"it is the {name} layer" in reason
            assert "`keep_ends: true`" in reason
        analysis = implement(BinaryConfig(targets=Targets(exclude=("first",)))).analyze(model, Example(4))
        assert [layer.name for layer in analysis.layers] == ["middle"]
        analysis = implement(BinaryConfig(keep_ends=False)).analyze(model, None)
        assert len(analysis.layers) == 3

    def test_a_layer_that_shares_the_weight_of_an_end_is_left_too(self) -> None:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        model[3].weight = model[1].weight
        analysis = implement(TernaryConfig()).analyze(model, Example(4))
        assert [layer.name for layer in analysis.layers] == ["2"]
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert reasons["1"].startswith("it shares its weight with '3', the last layer")

    @every_method
    def test_the_report_tells_the_error(self, kind: Any, options: dict[str, Any], quantized: Any) -> None:
        model, config = network(), kind(**options, **ALL)
        before = copy.deepcopy(model.state_dict())
        analysis = implement(config).analyze(model, None)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        changed = quantized(model, config)
        for layer in analysis.layers:
            assert options["method"] in layer.action
            old, new = (m.get_submodule(layer.name).weight.detach().double() for m in (model, changed))
            shares = [float((new.sign() == sign).double().mean()) for sign in (-1, 0, 1)]
            entropy = -sum(share * math.log2(share) for share in shares if share)
            assert layer.scores["entropy"] == pytest.approx(entropy, abs=1e-6)
            relative = float((old - new).square().sum() / old.square().sum())
            # `ttq` sees the weights over the largest one
            assert options["method"] == "ttq" or layer.scores["relative_mse"] == pytest.approx(relative, rel=1e-6)
            assert layer.scores["relative_mse"] == pytest.approx(relative, rel=1e-4)

    @every_method
    def test_quantizing_without_training_is_noted(self, kind: Any, options: dict[str, Any]) -> None:
        for finetune in (None, Finetune()):
            technique, model = implement(kind(**options, **ALL, finetune=finetune)), network()
            technique.transform(model, technique.analyze(model, None), None)
            assert bool(technique.notes) == (finetune is None)
            assert all("give `finetune`" in note for note in technique.notes)

    @every_method
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_are_kept(self, kind: Any, options: dict[str, Any], dtype: torch.dtype, quantized: Any) -> None:
        after = quantized(network().to(dtype), kind(**options, **ALL))[3].weight.detach()
        assert after.dtype == dtype
        assert are_few(after, kind, options)
        error = (after.float() - quantized(network(), kind(**options, **ALL))[3].weight).abs()
        assert (error > 1e-3).float().mean() < 0.02  # weights at a threshold may fall on its other side

    def test_layers_that_have_nothing_are_told(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(4, 0)
        dead = nn.Linear(8, 8)
        nn.init.zeros_(dead.weight)
        model = nn.ModuleDict({"empty": empty, "dead": dead, "good": nn.Linear(8, 8)})
        analysis = implement(BinaryConfig(**ALL)).analyze(model, None)
        assert [layer.name for layer in analysis.layers] == ["good"]
        assert {layer.name for layer in analysis.skipped} == {"empty", "dead"}

    @pytest.mark.parametrize("kind", [BinaryConfig, TernaryConfig])
    def test_a_channel_of_zeros_stays_one(self, kind: Any, quantized: Any) -> None:
        model = network()
        model[3].weight.data[5] = 0
        changed = quantized(model, kind(**ALL))
        assert not changed[3].weight[5].any()
        assert torch.isfinite(changed[3].weight).all()


class TestTraining:
    @every_method
    def test_what_is_trained_is_bitwise_what_remains(
        self, kind: Any, options: dict[str, Any], digits_task: Any, trained_digits: nn.Module
    ) -> None:
        config = kind(**options, finetune=Finetune(max_steps=5, keep="best"))
        technique = implement(config)
        analysis = technique.analyze(trained_digits, digits_task)
        changed = technique.transform(copy.deepcopy(trained_digits), analysis, digits_task)
        assert parametrize.is_parametrized(changed.fc1)
        untrained = changed.eval().fc1.weight.detach().clone()
        fit(changed, trained_digits, digits_task, config.finetune, rules=rules_for(technique, changed))
        x = digits_task.example_inputs(8)[0]
        during = changed.eval()(x)
        plain = technique.consolidate(changed.train()).eval()
        assert torch.equal(during, plain(x))
        assert not parametrize.is_parametrized(plain.fc1)
        assert are_few(plain.fc1.weight, kind, options)
        assert not torch.equal(plain.fc1.weight, untrained)

    @every_method
    def test_layers_that_share_a_weight_still_do(
        self, kind: Any, options: dict[str, Any], digits_task: Any, quantized: Any
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
        model[3].weight = model[1].weight
        for finetune in (None, Finetune(max_steps=2)):
            changed = quantized(model, kind(**options, **ALL, finetune=finetune), digits_task)
            assert changed[3].weight is changed[1].weight
            assert are_few(changed[1].weight, kind, options)

    @every_method
    def test_frozen_weights_are_quantized_and_not_trained(
        self, kind: Any, options: dict[str, Any], digits_task: Any, trained_digits: nn.Module, quantized: Any
    ) -> None:
        trained_digits.fc1.weight.requires_grad_(False)
        one = quantized(trained_digits, kind(**options), digits_task)
        other = quantized(trained_digits, kind(**options, finetune=Finetune(max_steps=2)), digits_task)
        assert not other.fc1.weight.requires_grad
        assert torch.equal(one.fc1.weight, other.fc1.weight)
        assert not torch.equal(one.conv2.weight, other.conv2.weight)

    @pytest.mark.parametrize(("kind", "options", "loss"), [
        (kind, options, 0.03 if kind is BinaryConfig else 0.02) for kind, options in METHODS
        if "granularity" not in options
    ])  # fmt: skip
    def test_real_digits(
        self,
        kind: Any,
        options: dict[str, Any],
        loss: float,
        digits_task: Any,
        trained_digits: nn.Module,
        quantized: Any,
    ) -> None:
        full = digits_task.score(trained_digits, "test")
        trained = quantized(trained_digits, kind(**options, finetune=Finetune(epochs=3)), digits_task)
        assert digits_task.score(trained, "test") >= full - loss
        assert all(are_few(layer.weight, kind, options) for layer in (trained.conv2, trained.fc1))


class TestFile:
    """A layer of 64 x 64 x 3 x 3 in the `.rarefy` file."""

    def bits(self, layer: nn.Module, path: Path) -> tuple[str, float]:
        model = nn.Sequential(layer)
        artifact.write(model, Base(lambda: copy.deepcopy(model)), path)
        return next((row.coding, row.bits_per_element) for row in artifact.inspect(path) if row.tensor == "0.weight")

    @every_method
    def test_bits_per_weight(self, kind: Any, options: dict[str, Any], quantized: Any, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(64, 64, 3))
        nn.init.normal_(model[0].weight, std=0.05)
        weight = quantized(model, kind(**options, **ALL))[0].weight.detach()
        counts = weight.sign().unique(return_counts=True)[1].double() / weight.numel()
        entropy = float(-(counts * counts.log2()).sum())
        coding, bits = self.bits(quantized(model, kind(**options, **ALL))[0], tmp_path / "m.rarefy")
        assert coding in ("steps", "codebook")
        assert bits <= (1.1 if kind is BinaryConfig else 1.03 * entropy)


class TestBadInput:
    @pytest.mark.parametrize(
        ("kind", "options", "told"),
        [
            (BinaryConfig, {"method": "xnor"}, "'binary-connect', 'bwn' or 'loss-aware'"),
            (BinaryConfig, {"stochastic": True}, "`stochastic` is an option of `method: binary-connect`"),
            (BinaryConfig, {"scale": "one"}, "`scale` is an option of `method: binary-connect`, and the method is bwn"),
            (BinaryConfig, {"method": "loss-aware", "gradient": "scaled"}, "`gradient` is an option of `method: bwn`"),
            (
                BinaryConfig,
                {"method": "binary-connect", "granularity": "tensor"},
                "`method: bwn` and `method: loss-aware`",
            ),
            (TernaryConfig, {"method": "three"}, "'twn' or 'ttq'"),
            (TernaryConfig, {"share": 0.1}, "`share` is an option of `method: ttq`"),
            (TernaryConfig, {"method": "ttq", "share": 1}, "less than 1"),
            (TernaryConfig, {"method": "ttq", "threshold": "exact"}, "`threshold` is an option of `method: twn`"),
            (TernaryConfig, {"granularity": "group"}, "'tensor' or 'channel'"),
            (TernaryConfig, {"bits": 2}, "bits"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, kind: Any, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            kind(**options)

    @pytest.mark.parametrize("kind", [BinaryConfig, TernaryConfig])
    def test_values_that_are_not_finite_are_refused(self, kind: Any) -> None:
        model = network()
        model[3].weight.data.view(-1)[0] = math.nan
        with pytest.raises(StageError, match=r"'3'.*NaN or infinite"):
            implement(kind()).analyze(model, None)
