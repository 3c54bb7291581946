"""Batch norms taken into the layers before them: by hand, where it may not be, and the outputs that stay."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from rarefy import artifact, zoo
from rarefy.folding import fold_batch_norms, outputs_of
from rarefy.modules import as_base
from rarefy.testing.subjects import differences
from torch import nn


def lived(model: nn.Module, *shape: int) -> nn.Module:
    """Return a model whose norms have statistics, weights and biases that matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(16, *shape) + 0.5)
    return model.eval()


class TestFolding:
    def test_one_layer_by_hand(self) -> None:
        model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0))
        for tensor, value in zip(
            [model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[1].running_mean],
            (3, 1, 2, 5, 7),
            strict=True,
        ):
            tensor.data.fill_(float(value))
        model[1].running_var.fill_(16.0)
        folded, norms = fold_batch_norms(model.eval(), (torch.ones(1, 1),))
        assert norms == {"0": "1"}
        assert (folded[0].weight.item(), folded[0].bias.item()) == (1.5, (1 - 7) * 0.5 + 5)
        assert isinstance(folded[1], nn.Identity)

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
                          nn.BatchNorm2d(8, affine=False)),
            nn.Sequential(nn.Flatten(), nn.Linear(108, 9), nn.BatchNorm1d(9)),
            zoo.resnet20(in_channels=3),
        ],
        ids=["convolutions", "linear", "resnet"],
    )  # fmt: skip
    def test_the_outputs_stay_and_all_norms_are_gone(self, model: nn.Module) -> None:
        model, inputs = lived(model, 3, 6, 6), (torch.randn(4, 3, 6, 6),)
        folded, norms = fold_batch_norms(model, inputs)
        torch.testing.assert_close(outputs_of(folded, inputs), outputs_of(model, inputs), rtol=1e-4, atol=1e-4)
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
        assert len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    def test_the_original_stays_and_the_result_can_be_stored(self, tmp_path: Path) -> None:
        model, inputs = lived(zoo.resnet20(in_channels=3), 3, 6, 6), (torch.randn(4, 3, 6, 6),)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folded, _ = fold_batch_norms(model, inputs)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        base = as_base(zoo.resnet20(in_channels=3))
        artifact.write(folded, base, tmp_path / "model.rarefy")
        assert not differences(folded, artifact.load(tmp_path / "model.rarefy", base=base.build))


class Twice(nn.Module):
    """What the first layer gives is used before its norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.end = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.end(self.last(y + self.norm(y)))


class Reader(nn.Sequential):
    """Reads an attribute of its norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x)) * self[1].eps


class TestWhatStays:
    def test_norms_whose_input_others_use(self) -> None:
        model, inputs = lived(Twice(), 4), (torch.randn(8, 4),)
        folded, norms = fold_batch_norms(model, inputs)
        assert norms == {"last": "end"}
        torch.testing.assert_close(outputs_of(folded, inputs), outputs_of(model, inputs))

    def test_norms_that_code_reads_have_no_statistics_or_follow_something_else(self) -> None:
        inputs = (torch.randn(8, 4),)
        for model in (
            Reader(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.ReLU(), c=nn.BatchNorm1d(4))),
            nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.ReLU(inplace=True), c=nn.BatchNorm1d(4))),
        ):
            folded, norms = fold_batch_norms(lived(model, 4), inputs)
            assert norms == {}
            assert not differences(folded, model)

    def test_layers_that_share_a_weight_or_are_not_named(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        inputs = (torch.randn(8, 4),)
        assert fold_batch_norms(lived(model, 4), inputs, ["2"])[1] == {"2": "3"}
        model[2].weight = model[0].weight
        assert fold_batch_norms(model, inputs)[1] == {}
