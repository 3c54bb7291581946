"""The input Hessian equals what an explicit unfold gives, and its inverse and factor those of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rarefy.errors import StageError
from rarefy.hessian import InputHessian, as_rows, columns, inverse, inverse_factor
from torch import nn

CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (9,)),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 2}, (15,)),
    (nn.Conv2d, {"kernel_size": 1, "stride": 2}, (6, 7)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)}, (9, 11)),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 2}, (9, 8)),
    (nn.Conv2d, {"kernel_size": 3, "groups": 4, "padding": "valid"}, (7, 7)),
    (nn.Conv2d, {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"}, (6, 8)),
    (nn.Conv2d, {"kernel_size": 2, "padding": "same", "padding_mode": "replicate", "groups": 2}, (5, 6)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (5, 6)),
    (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 0), "groups": 2}, (4, 6, 3)),
]


def seen(layer: nn.Module, *inputs: torch.Tensor) -> InputHessian:
    hessian = InputHessian(layer, "layer", torch.float64)
    for x in inputs:
        hessian.update(x)
    return hessian


def symmetric(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(3 * n, n))
    return 2 * x.T @ x / len(x)


class TestHessian:
    def test_it_is_twice_the_mean_outer_product(self) -> None:
        x = torch.randn(7, 5, 3)
        rows = x.double().reshape(-1, 3).numpy()
        expected = 2 * rows.T @ rows / len(rows)
        np.testing.assert_allclose(seen(nn.Linear(3, 2), x).value[0].numpy(), expected, rtol=1e-12)

    def test_a_grouped_strided_dilated_convolution_equals_its_explicit_unfold(self) -> None:
        x = torch.randn(5, 6, 9, 8, dtype=torch.float64)
        layer = nn.Conv2d(6, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 3), groups=3)
        patches = nn.functional.unfold(x, (3, 2), dilation=(2, 3), padding=(1, 2), stride=(2, 1))
        patches = patches.view(5, 3, 12, -1).permute(1, 0, 3, 2).reshape(3, -1, 12).numpy()
        value = seen(layer, x).value.numpy()
        for group in range(3):
            expected = 2 * patches[group].T @ patches[group] / patches.shape[1]
            np.testing.assert_allclose(value[group], expected, rtol=1e-12)

    @pytest.mark.parametrize(("kind", "options", "size"), CONVOLUTIONS)
    def test_it_gives_the_output_error_of_any_change(
        self, kind: type[nn.Module], options: dict[str, Any], size: tuple[int, ...]
    ) -> None:
        torch.manual_seed(0)
        layer = kind(4, 8, **options).double()
        x = torch.randn(3, 4, *size, dtype=torch.float64)
        with torch.no_grad():
            before = layer(x)
            change = torch.randn_like(layer.weight)
            layer.weight.add_(change)
            squared = (layer(x) - before).square().sum(1).mean()
        groups = options.get("groups", 1)
        assert seen(layer, x).error(change.view(groups, 8 // groups, -1)) == pytest.approx(float(squared), rel=1e-10)

    def test_batches_stream_to_the_same_mean(self) -> None:
        layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(12, 2, 6, 6)
        at_once, streamed = seen(layer, x), seen(layer, *x.split([1, 7, 4]))
        torch.testing.assert_close(streamed.value, at_once.value, rtol=1e-12, atol=0)
        assert streamed.seen == at_once.seen == 12 * 36

    def test_large_inputs_are_unfolded_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x = nn.Conv2d(2, 3, 3), torch.randn(5, 2, 6, 6)
        whole = seen(layer, x).value
        monkeypatch.setattr("rarefy.hessian._WORKSPACE", 1)
        torch.testing.assert_close(seen(layer, x).value, whole, rtol=1e-12, atol=0)

    def test_inputs_without_a_batch_dimension(self) -> None:
        layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 6, 6)
        assert torch.equal(seen(layer, x).value, seen(layer, x[None]).value)
        assert torch.equal(seen(nn.Linear(4, 1), x[0, 0, :4]).value, seen(nn.Linear(4, 1), x[:1, 0, :4]).value)

    def test_rows_and_columns_are_those_of_the_weight(self) -> None:
        layer = nn.Conv2d(4, 6, 3, groups=2)
        assert columns(layer) == 18
        assert torch.equal(as_rows(layer)[1, 2], layer.weight[5].flatten())

    def test_half_precision_inputs_are_summed_in_the_precision_asked_for(self) -> None:
        x = torch.full((4, 2), 300.0, dtype=torch.float16)  # 300^2 overflows in half precision
        assert seen(nn.Linear(2, 2).half(), x).value[0, 0, 1] == 2 * 300**2

    def test_nothing_seen_is_an_error(self) -> None:
        with pytest.raises(StageError, match=r"'layer' has seen no inputs"):
            _ = seen(nn.Linear(2, 2)).value
        with pytest.raises(StageError, match="seen no inputs"):
            _ = seen(nn.Linear(2, 2), torch.zeros(0, 2)).value

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_inputs_that_are_not_finite_are_an_error(self, value: float) -> None:
        with pytest.raises(StageError, match="NaN, infinite"):
            _ = seen(nn.Linear(1, 2), torch.tensor([[1.0], [value]])).value

    def test_other_layers_are_refused(self) -> None:
        with pytest.raises(StageError, match="BatchNorm2d 'norm' has no input Hessian"):
            InputHessian(nn.BatchNorm2d(3), "norm")


class TestInverse:
    def test_it_equals_numpys(self) -> None:
        h = symmetric(6)
        np.testing.assert_allclose(inverse(torch.from_numpy(h)).numpy(), np.linalg.inv(h), rtol=1e-9)

    def test_the_factor_is_upper_and_its_square_is_the_inverse(self) -> None:
        h = np.stack([symmetric(5, 1), symmetric(5, 2)])
        factor = inverse_factor(torch.from_numpy(h)).numpy()
        np.testing.assert_allclose(factor, np.triu(factor))
        np.testing.assert_allclose(np.swapaxes(factor, 1, 2) @ factor, np.linalg.inv(h), rtol=1e-9)

    def test_its_rows_are_those_of_the_inverses_of_what_is_left(self) -> None:
        h = symmetric(5)
        factor = inverse_factor(torch.from_numpy(h)).numpy()
        for j in range(5):
            left = np.linalg.inv(h[j:, j:])
            np.testing.assert_allclose(factor[j, j:], left[0] / np.sqrt(left[0, 0]), rtol=1e-9)

    def test_a_singular_hessian_is_an_error_that_names_damping(self) -> None:
        with pytest.raises(StageError, match="raise `damping`"):
            inverse(torch.ones(3, 3))
        with pytest.raises(StageError, match="raise `damping`"):
            inverse_factor(torch.zeros(1, 3, 3))


class TestDamping:
    def test_it_is_a_share_of_the_mean_diagonal(self) -> None:
        h = seen(nn.Linear(3, 1), torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]))
        # the diagonal of H = 2/2 sum x x^T is 10, 4, 0
        np.testing.assert_allclose(h.damped(0.3)[0, :2, :2].numpy(), [[11.4, 2], [2, 5.4]], rtol=1e-6)

    def test_dead_inputs_are_found_and_cost_next_to_nothing(self) -> None:
        h = seen(nn.Linear(3, 1), torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]))
        assert h.dead.tolist() == [[False, False, True]]
        for share in (0, 0.3):
            np.testing.assert_allclose(h.damped(share)[0, 2].numpy(), [0, 0, 14e-6 / 3])

    def test_each_group_has_its_own(self) -> None:
        x = torch.zeros(2, 2, 3)
        x[:, 0] = 1
        h = seen(nn.Conv1d(2, 2, 1, groups=2), x)
        np.testing.assert_allclose(h.damped(0.5).flatten().numpy(), [3, 1e-6])
