"""Few multiplications: the mean of drawn weights, powers of two by hand, and the gradient they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy_quantization.activations.config import FewMultiplicationsConfig
from rarefy_quantization.activations.few_multiplications import ConnectedTernary, ShiftedInput, power_of_two
from rarefy_schemas import Finetune
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestWeights:
    def test_drawn_weights_are_right_on_average_and_evaluation_takes_the_nearest(self) -> None:
        torch.manual_seed(0)
        projection, weight = ConnectedTernary(0.5), torch.tensor([0.4, -0.1, 0.0, 0.5, -0.5, 0.24])
        drawn = torch.stack([projection(weight) for _ in range(4000)])
        torch.testing.assert_close(drawn.mean(0), weight, rtol=0, atol=0.02)
        assert set(drawn.unique().tolist()) == {-0.5, 0.0, 0.5}
        assert projection.eval()(weight).tolist() == [0.5, 0.0, 0.0, 0.5, -0.5, 0.0]

    def test_the_gradient_of_a_weight_is_that_of_the_drawn_one_and_weights_stay_in_range(self) -> None:
        weight = torch.tensor([0.3, -0.2], requires_grad=True)
        ConnectedTernary(0.5)(weight).backward(torch.tensor([2.0, 3.0]))
        assert weight.grad is not None
        assert weight.grad.tolist() == [2.0, 3.0]
        latent = torch.tensor([0.9, -0.7, 0.2])
        ConnectedTernary(0.5).confine_(latent)
        torch.testing.assert_close(latent, torch.tensor([0.5, -0.5, 0.2]))


class TestShifts:
    def test_powers_of_two_by_hand(self) -> None:
        values = torch.tensor([1.0, -1.4, 1.5, 3.0, 100.0, 0.2, -0.1, 0.0])
        assert power_of_two(values, 2).tolist() == [1.0, -1.0, 2.0, 4.0, 4.0, 0.25, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Linear(6, 3), (4, 6)),
            (nn.Linear(6, 3), (2, 5, 6)),
            (nn.Conv2d(2, 4, 3, padding=1), (3, 2, 5, 5)),
        ],
    )
    def test_only_the_gradient_of_the_weight_is_that_of_rounded_inputs(
        self, layer: nn.Module, shape: tuple[int, ...]
    ) -> None:
        x = normal(*shape).requires_grad_()

        def gradients(x: torch.Tensor) -> Any:
            y = layer(x)
            return (
                y.detach(),
                *torch.autograd.grad((y * normal(*y.shape, seed=1)).sum(), [layer.weight, layer.bias, x]),
            )

        plain, of_rounded = gradients(x), gradients(power_of_two(x, 4).detach().requires_grad_())
        shifted = ShiftedInput(layer, 4)
        ours = gradients(x)
        for one, other in zip(ours, (plain[0], of_rounded[1], plain[2], plain[3]), strict=True):
            torch.testing.assert_close(one, other)
        assert not torch.equal(ours[1], plain[1])
        shifted.remove()
        assert torch.equal(gradients(x)[1], plain[1])

    def test_an_error_in_the_layer_leaves_nothing_behind(self) -> None:
        layer, other = nn.Linear(6, 3), nn.Linear(6, 3)
        ShiftedInput(layer, 4)
        x = normal(2, 5)
        with pytest.raises(RuntimeError):
            layer(x)
        x = normal(2, 6)
        other(x).sum().backward()
        torch.testing.assert_close(other.weight.grad, x.sum(0).expand(3, 6))


class TestTraining:
    @pytest.mark.parametrize("values", ["binary", "ternary"])
    def test_digits(self, values: str, digits_task: Any, trained_digits: nn.Module, quantized: Any) -> None:
        config = FewMultiplicationsConfig(values=values, finetune=Finetune(epochs=6, lr=3e-3))
        changed = quantized(trained_digits, config, digits_task)
        assert digits_task.score(changed, "test") > 0.85
        assert changed.fc1.weight.unique().numel() == {"binary": 2, "ternary": 3}[values]
        assert not changed.fc1._forward_hooks
        assert not changed.fc1._forward_pre_hooks

    def test_options_that_cannot_work_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="precision"):
            FewMultiplicationsConfig(finetune=Finetune(precision="bf16"))
        with pytest.raises(ValidationError, match="granularity"):
            FewMultiplicationsConfig(granularity="tensor")
