"""Q-CNN: codebooks against direct solves and enumeration, plain product quantization, and trained networks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.hessian import InputHessian, PairedHessian
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.tasks import ClassificationTask
from rarefy.testing.subjects import Inputs
from rarefy.training import fit
from rarefy_quantization.codebooks.config import ProductConfig, QCNNConfig
from rarefy_quantization.codebooks.product import cluster_blocks
from rarefy_quantization.codebooks.response import Responses, refitted
from rarefy_schemas import Finetune
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hessian(inputs: int, groups: int = 1) -> torch.Tensor:
    x = normal(groups, 3 * inputs, inputs, seed=5) @ normal(groups, inputs, inputs, seed=6)
    return x.mT @ x / (3 * inputs)


def started(
    groups: int = 1, rows: int = 60, columns: int = 12, h: torch.Tensor | None = None, edges: tuple[int, ...] = ()
) -> Responses:
    target, places = normal(groups, rows, columns), columns // 2
    edges = edges or tuple(range(places + 1))
    coded = cluster_blocks(target.flatten(0, 1), 2, list(edges), 4, 100, 0)
    codes = coded.codes.long().view(groups, rows, places)
    return Responses(target, hessian(columns, groups) if h is None else h, codes, coded.codebook, list(edges))


SHAPES: list[dict[str, Any]] = [{}, {"groups": 2, "rows": 30}, {"edges": (0, 6)}, {"edges": (0, 2, 4, 6), "groups": 3}]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_never_rises_and_falls_well_below_that_of_k_means(shape: dict[str, Any]) -> None:
    responses = started(**shape)
    errors = responses.fit(20)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    change = responses.target - responses.rows()
    by_hand = 0.5 * torch.einsum("gri,gij,grj->", change, responses.hessian, change)
    assert errors[-1] == pytest.approx(float(by_hand))


@pytest.mark.parametrize("shape", SHAPES)
def test_where_inputs_do_not_interact_k_means_is_where_it_stays(shape: dict[str, Any]) -> None:
    groups = shape.get("groups", 1)
    responses = started(**shape, h=torch.eye(12, dtype=torch.float64).repeat(groups, 1, 1))
    rows = responses.rows()
    errors = responses.fit(20)
    torch.testing.assert_close(responses.rows(), rows)
    assert errors[-1] == pytest.approx(errors[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_codebooks_are_those_of_a_direct_solve(shape: dict[str, Any]) -> None:
    """Least squares over all vectors at once, with the Cholesky factors of H as weights."""
    responses = started(**shape)
    responses.update_()
    groups, rows = responses.codes.shape[:2]
    design = torch.nn.functional.one_hot(responses.codes, len(responses.codebook)).double()
    design = torch.einsum("grpk,ij->grpikj", design, torch.eye(2, dtype=torch.float64)).reshape(groups, rows, 12, -1)
    roots = torch.linalg.cholesky(responses.hessian).mT.unsqueeze(1)
    left, right = (roots @ design).flatten(0, 2), (roots @ responses.target.unsqueeze(-1)).flatten()
    direct = torch.linalg.lstsq(left, right.unsqueeze(1), driver="gelsd").solution
    best = 0.5 * float((left @ direct - right.unsqueeze(1)).square().sum())
    assert responses.error() == pytest.approx(best, rel=2e-3)
    assert responses.error() >= best * (1 - 1e-9)


def test_a_code_is_the_best_of_all_given_the_others() -> None:
    responses = started(rows=10)
    responses.assign_()
    best = responses.error()
    place = responses.codes.shape[-1] - 1  # the last is chosen with all others as they are in the end
    for row, code in itertools.product(range(10), range(*responses.blocks[place])):
        kept = int(responses.codes[0, row, place])
        responses.codes[0, row, place] = code
        assert responses.error() >= best - 1e-9
        responses.codes[0, row, place] = kept


def test_codes_stay_in_their_blocks() -> None:
    responses = started(edges=(0, 2, 4, 6))
    responses.fit(5)
    for block, (first, last) in enumerate([(0, 2), (2, 4), (4, 6)]):
        codes = responses.codes[..., first:last]
        assert 4 * block <= int(codes.min())
        assert int(codes.max()) < 4 * (block + 1)


def test_rows_are_refitted_to_what_they_gave_on_other_inputs() -> None:
    layer = nn.Linear(5, 3, bias=False).double()
    x, new = normal(40, 5), normal(40, 5) + 0.3 * normal(40, 5, seed=2)
    seen = PairedHessian(layer, dtype=torch.float64)
    seen.update_pair(x, new)
    weight = layer.weight.detach().unsqueeze(0)
    found = refitted(weight, seen, 1e-9)[0]
    wanted = torch.linalg.lstsq(new, x @ weight[0].T).solution.T
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    alone = InputHessian(layer, dtype=torch.float64)
    alone.update(new)
    same = refitted(weight, alone, 0.01)
    torch.testing.assert_close(same, weight)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)
    ).eval()


def images() -> Inputs:
    """Neighbouring pixels are alike, so that inputs interact."""
    return Inputs(nn.functional.avg_pool2d(normal(200, 4, 8, 8), 3, 2, padding=1).float())


def quantized(model: nn.Module, config: Any, task: Any) -> nn.Module:
    technique = implement(config)
    return technique.consolidate(technique.transform(copy.deepcopy(model), technique.analyze(model, task), task))


def distance(one: nn.Module, other: nn.Module, task: Any) -> float:
    ((x,),) = task.calibration()
    with torch.no_grad():
        return float((one(x) - other(x)).square().mean() / one(x).square().mean())


def test_outputs_stay_nearer_than_by_product_quantization_and_nearest_when_errors_are_made_up_for() -> None:
    model, task = network(), images()
    options: dict[str, Any] = {"length": 2, "codes": 4, "blocks": 2}
    plain = distance(model, quantized(model, ProductConfig(**options), task), task)
    fitted = distance(model, quantized(model, QCNNConfig(**options, correct=False), task), task)
    corrected = distance(model, quantized(model, QCNNConfig(**options), task), task)
    assert corrected < fitted < 0.7 * plain


def test_layers_take_few_vectors_per_block_and_are_plain_again() -> None:
    model, task = network(), images()
    plain = quantized(model, QCNNConfig(length=2, codes=4, blocks=3), task)
    for i, rows, edges in ((0, 16, (0, 3, 6, 9)), (3, 40, (0, 10, 21, 32)), (5, 10, (0, 6, 13, 20))):
        grid = plain[i].weight.detach().reshape(rows, -1, 2)
        assert all(len(grid[:, a:b].reshape(-1, 2).unique(dim=0)) <= 4 for a, b in itertools.pairwise(edges))
        assert type(plain[i]) is type(model[i])


def test_what_cannot_be_calibrated_is_left_alone_with_its_reason() -> None:
    analysis = implement(QCNNConfig(length=2, codes=4, max_inputs=40)).analyze(network(), images())
    reasons = {layer.name: layer.reason for layer in analysis.skipped}
    assert [layer.name for layer in analysis.layers] == ["0", "5"]
    assert "its Hessian is 64 x 64 and `max_inputs` is 40" in reasons["3"]
    analysis = implement(QCNNConfig(length=4, codes=12)).analyze(network(), images())
    reasons = {layer.name: layer.reason for layer in analysis.skipped}
    assert "18 weights each, no multiple of `length`, 4" in reasons["0"]
    assert reasons["5"] == "a block has 10 vectors of 4, and `codes` is 12"


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = torch.ones(4, 4, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(StageError, match=r"'0' are NaN, infinite"):
        quantized(network(), QCNNConfig(length=2, codes=4), Inputs(x))


def test_options_that_cannot_work_are_refused() -> None:
    for options in ({"damping": 0}, {"batches": 0}, {"rounds": -1}, {"blocks": 0}):
        with pytest.raises(ValidationError, match=next(iter(options))):
            QCNNConfig(**options)


def test_the_codebooks_can_be_trained(trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    config = QCNNConfig(codes=8, blocks=1, targets={"include": ["conv2", "fc1"]}, finetune=Finetune(epochs=3, lr=5e-3))
    technique = implement(config)
    model = technique.transform(
        copy.deepcopy(trained_digits), technique.analyze(trained_digits, digits_task), digits_task
    )
    before = digits_task.score(model, "validation")
    trained = fit(model, trained_digits, digits_task, config.finetune, rules_for(technique, model))
    plain = technique.consolidate(model)
    assert trained.history[-1]["loss"] < 0.8 * trained.history[0]["loss"]
    assert digits_task.score(plain, "validation") >= before
    assert len(plain.fc1.weight.detach().reshape(-1, 4).unique(dim=0)) <= 8
