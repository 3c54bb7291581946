"""Factorized layers compute what the layer would with the product as its weight; ranks and errors are the best."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rarefy import artifact
from rarefy.errors import StageError
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.pipeline import run
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy.technique import Plan, Skip
from rarefy_factorization.config import SvdConfig
from rarefy_factorization.schemes import ChannelScheme, LinearScheme, SpatialScheme
from torch import nn

TASK: Any = None  # factorization needs no data


def factorized(layer: nn.Module, **options: Any) -> nn.Module:
    """Return the two layers for a layer, whether or not they pay."""
    technique = implement(SvdConfig(**options))
    scheme = technique.scheme(layer)
    with torch.no_grad():
        matrix = scheme.unfold(layer)
        rank = technique.rank(matrix.shape, technique.spectrum(matrix))
        found = technique.factors(matrix, rank)
        return scheme.build(layer, found.left, found.right)


@st.composite
def convolutions(draw: Any) -> nn.Conv2d:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    padding = draw(st.sampled_from(["valid", "same", "numbers", "numbers"]))
    stride = (1, 1) if padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    numbers = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    return nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 4)),
        (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        stride,
        numbers if padding == "numbers" else padding,
        (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.sampled_from(["spatial", "channel"]))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_at_full_rank_a_convolution_is_reproduced(layer: nn.Conv2d, scheme: str) -> None:
    x = torch.randn(2, layer.in_channels, 12, 11)
    try:
        expected = layer(x)
    except RuntimeError:  # padding modes that this size does not allow
        assume(False)
    built = factorized(layer, rank=10_000, scheme=scheme)
    assert torch.allclose(built(x), expected, atol=1e-4)
    assert all(type(child) in (nn.Conv2d, nn.Linear) for child in built)


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Linear(5, 9, bias=False), nn.Conv1d(4, 6, 3, 2, 1, groups=2)])
def test_at_full_rank_other_layers_are_reproduced(layer: nn.Module) -> None:
    x = torch.randn(3, 7 if layer.weight.shape[1] == 7 else 5) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9)
    assert torch.allclose(factorized(layer, fraction=1.0)(x), layer(x), atol=1e-5)


def test_the_error_is_that_of_the_dropped_singular_values() -> None:
    """Tai et al. 2016, theorem 1: the separable kernel nearest to a trained one, in closed form."""
    layer = nn.Conv2d(6, 8, 3)
    technique = implement(SvdConfig(rank=5))
    plan = technique.plan("x", layer)
    singular = torch.linalg.svdvals(SpatialScheme().unfold(layer).detach().double())[0]
    by_hand = (singular[5:].square().sum() / singular.square().sum()).sqrt()
    assert plan.scores["relative_error"] == pytest.approx(float(by_hand), rel=1e-6)
    vertical, horizontal = technique.apply(layer, plan)
    kernel = torch.einsum("nkx,kcy->ncyx", horizontal.weight[:, :, 0], vertical.weight[..., 0])
    kernel = kernel.detach()
    error = torch.linalg.norm(kernel - layer.weight.detach()) / torch.linalg.norm(layer.weight.detach())
    assert float(error) == pytest.approx(float(by_hand), rel=1e-5)


def test_ranks_are_chosen_as_asked() -> None:
    layer = nn.Linear(40, 20)
    with torch.no_grad():
        u, v = torch.linalg.qr(torch.randn(20, 20)).Q, torch.linalg.qr(torch.randn(40, 20)).Q
        layer.weight.copy_(u @ torch.diag(2.0 ** -torch.arange(20)) @ v.T)

    def rank(**options: Any) -> float:
        plan = implement(SvdConfig(**options)).plan("x", layer)
        assert isinstance(plan, Plan)
        return plan.scores["rank"]

    assert rank(rank=3) == 3
    assert rank(fraction=0.25) == 5
    assert rank(parameters=0.5) == 6  # 6 * (20 + 40) = 360 <= 400 < 7 * 60
    assert rank() == 6
    # squared values 1, 1/4, 1/16 ... sum to 4/3: two of them hold 15/16 of it
    assert rank(energy=0.93) == 2
    assert rank(energy=0.94) == 3


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (nn.Linear(10, 10), {"rank": 5}, "at most 4"),
        (nn.Linear(10, 10), {"rank": 99}, "at rank 10"),
        (nn.Linear(4, 1), {}, "even rank 1"),
        (nn.Conv2d(4, 4, 3, stride=(1, 3)), {"parameters": 0.9}, "because of its stride"),
    ],
)
def test_a_layer_that_would_not_gain_is_left_alone(layer: nn.Module, options: dict[str, Any], reason: str) -> None:
    skip = implement(SvdConfig(**options)).plan("x", layer)
    assert isinstance(skip, Skip)
    assert reason in skip.reason


def test_the_scheme_follows_the_layer() -> None:
    technique = implement(SvdConfig())
    assert isinstance(technique.scheme(nn.Conv2d(2, 2, 3)), SpatialScheme)
    assert isinstance(technique.scheme(nn.Conv2d(2, 2, (1, 3))), ChannelScheme)
    assert isinstance(technique.scheme(nn.Conv1d(2, 2, 3)), ChannelScheme)
    assert isinstance(technique.scheme(nn.Linear(2, 2)), LinearScheme)
    assert isinstance(implement(SvdConfig(scheme="channel")).scheme(nn.Conv2d(2, 2, 3)), ChannelScheme)


@pytest.mark.parametrize("options", [{"rank": 8}, {"fraction": 0.3}, {"parameters": 0.4}, {}])
def test_a_dry_run_predicts_the_shapes(
    options: dict[str, Any], trained_digits: nn.Module, digits_task: ClassificationTask
) -> None:
    technique = implement(SvdConfig(**options))
    predicted = technique.predict(copy.deepcopy(trained_digits).to("meta")).state_dict()
    done = technique.transform(trained_digits, technique.analyze(trained_digits, digits_task), digits_task).state_dict()
    assert {k: v.shape for k, v in predicted.items()} == {k: v.shape for k, v in done.items()}


def test_half_precision_and_shared_layers(digits_task: ClassificationTask) -> None:
    layer = nn.Linear(64, 64).bfloat16()
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
    technique = implement(SvdConfig())
    model = technique.transform(model, technique.analyze(model, digits_task), digits_task)
    assert model[1] is model[3]
    assert model[1][0].weight.dtype == torch.bfloat16


def test_a_weight_that_another_module_uses_stays() -> None:
    model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 32), nn.Linear(32, 100, bias=False))
    model[2].weight = model[0].weight
    technique = implement(SvdConfig())
    analysis = technique.analyze(model, TASK)
    assert [layer.name for layer in analysis.layers] == ["1"]
    assert "another module uses the same weight" in analysis.skipped[0].reason
    assert [type(layer) for layer in technique.predict(model)] == [nn.Embedding, nn.Sequential, nn.Linear]


def test_a_layer_of_zeros_stays() -> None:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    assert implement(SvdConfig(energy=0.5)).plan("x", layer) == Skip("all its weights are zero")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("include", ["*", "layers.1.*"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layers_of_torch_run_without_their_fused_kernel(padded: bool, include: str, tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 6, 32), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padded
    with torch.no_grad():
        for layer in model.layers:
            for linear in (layer.linear1, layer.linear2):
                linear.weight.copy_(torch.randn(linear.out_features, 5) @ torch.randn(5, linear.in_features) / 20)
        expected = model(x, src_key_padding_mask=padding if padded else None)
        technique = implement(SvdConfig(rank=5, targets={"include": [include]}))
        base = copy.deepcopy(model)
        changed = technique.transform(model, technique.analyze(model, TASK), TASK)
        artifact.write(changed, as_base(base), tmp_path / "model.rarefy")
        for result in (changed, artifact.load(tmp_path / "model.rarefy", base=base).eval()):
            assert isinstance(result.layers[1].linear1, nn.Sequential)
            outputs = result(x, src_key_padding_mask=padding if padded else None)
            assert torch.allclose(outputs[~padding], expected[~padding], atol=1e-4)


def test_an_analysis_serves_for_several_copies() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    technique = implement(SvdConfig())
    analysis = technique.analyze(model, TASK)
    one, other = (technique.transform(copy.deepcopy(model), analysis, TASK) for _ in range(2))
    nn.init.zeros_(one[0][0].weight)
    assert other[0][0].weight.any()


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="`rank` and `energy` choose the rank in different ways"):
        SvdConfig(rank=1, energy=0.5)


def test_nan_weights(digits_task: ClassificationTask) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="NaN or infinite"):
        implement(SvdConfig()).analyze(model, digits_task)


def test_a_factorized_network_is_smaller_lighter_and_learns_again(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    step = {
        "technique": "factorization/svd",
        "parameters": 0.35,
        "targets": {"exclude": ["fc2"]},  # ten classes do not fit three dimensions
        "finetune": {"epochs": 4, "lr": 0.003},
    }
    recipe = load_recipe({"steps": [step], "evaluate": {"batch_sizes": []}})
    report = run(recipe, tmp_path, model=trained_digits, task=digits_task).report
    before, after = report.baseline, report.steps[0]
    for name in ("parameters", "flops", "bytes"):
        assert after.value(name) < before.value(name) / 2
    assert report.test[1].value > report.test[0].value - 0.03
