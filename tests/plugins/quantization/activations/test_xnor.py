"""XNOR-Net: alpha and K by hand, the gradient of signs, the order of blocks, training and the bytes of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rarefy import artifact
from rarefy.errors import StageError
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy_quantization.activations.config import XnorConfig
from rarefy_quantization.activations.layers import SignConv2d, SignLinear, binarized
from rarefy_schemas import Finetune
from torch import nn
from torch.nn import functional as F


class Inputs:
    """A task that has calibration and example inputs and nothing else."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.values = inputs

    def calibration(self, batch_size: int | None = None, batches: int = 8) -> Any:
        return iter([(self.values,)])

    def example_inputs(self, batch_size: int = 1) -> Any:
        return (self.values[:batch_size],)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ALL = {"keep_ends": False, "norm": "never"}


class TestLayers:
    def test_signs_have_the_gradient_of_a_clipping(self) -> None:
        x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 1.1], requires_grad=True)
        y = binarized(x)
        y.backward(torch.arange(1.0, 8.0))
        assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
        assert x.grad is not None
        assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]

    def test_the_map_of_scales_by_hand(self) -> None:
        layer = SignConv2d(2, 1, (2, 2), padding=(1, 1))
        x = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]], [[-3.0, 0.0], [1.0, 0.0]]]])
        # A = [[2, 1], [2, 2]]; each place of K is a sum of 2 x 2 places of A with zeros around it, over 4
        expected = np.array([[2, 3, 1], [4, 7, 3], [2, 4, 2]]) / 4
        assert layer.scales(x)[0, 0].tolist() == expected.tolist()

    @pytest.mark.parametrize(
        "options",
        [
            {"padding": (1, 1)},
            {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
            {"groups": 2, "padding": "same"},
        ],
    )
    def test_the_output_is_the_convolution_of_signs_times_both_scales(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        original = nn.Conv2d(4, 6, 3, **options)
        x = normal(2, 4, 7, 7)
        task = Inputs(x)
        technique = implement(XnorConfig(**ALL))
        model = nn.Sequential(original)
        changed = technique.consolidate(technique.transform(model, technique.analyze(model, task), task)).eval()
        groups = options.get("groups", 1)
        signs = nn.Conv2d(4, 6, 3, bias=False, **options)
        signs.weight.data = original.weight.detach().sign()
        with torch.no_grad():
            plain = signs(x.sign())
            box = torch.ones(groups, 1, 3, 3) / 9
            near = x.abs().view(2, groups, 4 // groups, 7, 7).mean(2)
            where = {name: value for name, value in options.items() if name != "groups"}
            k = F.conv2d(near, box, groups=groups, **where).repeat_interleave(6 // groups, 1)
            alpha = original.weight.abs().mean((1, 2, 3)).view(1, 6, 1, 1)
            expected = plain * k * alpha + original.bias.view(1, 6, 1, 1)
            torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-5)

    def test_the_scale_of_the_weights_is_their_mean_magnitude_not_their_norm(self, quantized: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 3))
        changed = quantized(model, XnorConfig(**ALL), Inputs(normal(9, 50)))
        alpha = changed[0].weight.detach().abs()
        torch.testing.assert_close(alpha, model[0].weight.abs().mean(1, keepdim=True).expand(3, 50), rtol=1e-4, atol=0)
        assert torch.equal(changed[0].weight.sign(), model[0].weight.sign())

    def test_a_linear_layer_of_signs_approximates_the_product(self) -> None:
        layer, x = SignLinear(400, 1, bias=False), normal(500, 400)
        weight = normal(1, 400, seed=1)
        layer.weight.data = weight.sign() * weight.abs().mean()
        with torch.no_grad():
            one, other = layer(x).flatten(), (x @ weight.T).flatten()
        # two Gaussian factors each correlate with their signs by sqrt(2 / pi)
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) == pytest.approx(2 / np.pi, abs=0.05)

    def test_they_are_exported(self) -> None:
        layers = SignConv2d(2, 4, (3, 3), padding=(1, 1), groups=2), nn.Flatten(), SignLinear(64, 3)
        model, x = nn.Sequential(*layers).eval(), normal(2, 2, 4, 4)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    def test_without_scales_of_inputs_products_of_signs_are_whole_numbers(self) -> None:
        layer = SignConv2d(3, 2, (3, 3), bias=False, input_scale=False)
        layer.weight.data = normal(2, 3, 3, 3).sign()
        y = layer(normal(1, 3, 5, 5)).detach()
        assert torch.equal(y, y.round())
        # 2 popcount - n: as even or odd as n
        assert ((y.long() - 27) % 2 == 0).all()


class TestBlocks:
    def network(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, 5), nn.ReLU(), nn.Linear(5, 3),
        ).eval()  # fmt: skip

    def test_a_norm_comes_before_the_signs_of_what_a_relu_gives(self, quantized: Any) -> None:
        model, x = self.network(), normal(20, 1, 8, 8)
        analysis = implement(XnorConfig()).analyze(model, Inputs(x))
        assert {layer.name: "batch norm" in layer.action for layer in analysis.layers} == {
            "2": True,
            "4": False,
            "7": True,
        }
        assert {layer.name for layer in analysis.skipped} == {"0", "9"}
        changed = quantized(model, XnorConfig(), Inputs(x))
        norm, layer = changed[2]
        assert (type(norm), type(layer)) == (nn.BatchNorm2d, SignConv2d)
        with torch.no_grad():
            given = norm(changed[:2](x))
        torch.testing.assert_close(given.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
        assert 0.2 < float((given > 0).float().mean()) < 0.8

    def test_norms_always_or_never(self, quantized: Any) -> None:
        model, task = self.network(), Inputs(normal(20, 1, 8, 8))
        kinds = {
            norm: type(quantized(model, XnorConfig(norm=norm), task)[4]) for norm in ("always", "where-needed", "never")
        }
        assert kinds == {"always": nn.Sequential, "where-needed": SignConv2d, "never": SignConv2d}

    def test_layers_that_cannot_be_replaced_are_named(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        analysis = implement(XnorConfig(norm="never")).analyze(model, Inputs(normal(3, 4)))
        assert not analysis.layers
        assert all("shares its weight" in layer.reason for layer in analysis.skipped if layer.name in "12")
        reflecting = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"))
        analysis = implement(XnorConfig(**ALL)).analyze(reflecting, Inputs(normal(1, 1, 5, 5)))
        assert "'reflect'" in analysis.skipped[0].reason

    def test_no_data_is_an_error(self) -> None:
        task = Inputs(normal(1, 1, 8, 8))
        task.calibration = lambda *_, **__: iter([])
        with pytest.raises(StageError, match="gives no batches"):
            implement(XnorConfig()).analyze(self.network(), task)


class TestTraining:
    @pytest.mark.parametrize("method", ["xnor-net", "binary-net"])
    def test_digits_and_the_bytes_of_the_file(
        self, method: str, digits_task: Any, trained_digits: nn.Module, quantized: Any, tmp_path: Path
    ) -> None:
        config = XnorConfig(method=method, finetune=Finetune(epochs=6, lr=3e-3))
        changed = quantized(trained_digits, config, digits_task)
        assert digits_task.score(changed, "test") > 0.85
        weights = [module.weight for module in changed.modules() if isinstance(module, SignConv2d | SignLinear)]
        assert len(weights) == 2
        assert all(len(row.unique()) == 2 for weight in weights for row in weight.detach().flatten(1))
        artifact.write(changed, as_base(trained_digits), tmp_path / "model.rarefy")
        binary = sum(weight.numel() for weight in weights)
        rest = sum(p.numel() for p in changed.parameters()) - binary + sum(b.numel() for b in changed.buffers())
        scales = sum(len(weight) for weight in weights)
        # a bit per weight, floats for the rest and the scales, and what names and hashes take
        assert (tmp_path / "model.rarefy").stat().st_size < binary / 8 + 4 * (rest + scales) + 6000
        again = artifact.load(tmp_path / "model.rarefy", base=as_base(trained_digits).build).eval()
        x = digits_task.example_inputs(4)
        torch.testing.assert_close(again(*x), changed(*x))
