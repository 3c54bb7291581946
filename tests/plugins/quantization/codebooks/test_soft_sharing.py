"""Soft weight-sharing: the mixture against numpy and scipy, its pitfalls one by one, training, and what remains."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rarefy import compress, load
from rarefy.artifact import inspect
from rarefy.errors import RecipeError, StageError
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.tasks import ClassificationTask
from rarefy.training import fit
from rarefy_quantization.codebooks.config import SoftSharingConfig
from rarefy_quantization.codebooks.mixture import Components, Mixture
from rarefy_quantization.codebooks.soft_sharing import MixturePrior, SoftSharing
from rarefy_schemas import Finetune
from scipy.special import logsumexp
from scipy.stats import beta, gamma, norm
from torch import nn

TASK: Any = None  # analyzing needs no data
PRIORS: tuple[Any, ...] = ((5000, 2), (250, 0.1), 0.99, None)


def config(**options: Any) -> SoftSharingConfig:
    return SoftSharingConfig(**{"strength": 1e-3, "finetune": Finetune(epochs=1)} | options)


def weights(count: int = 200, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixture(components: int = 5, learn: bool = False) -> Mixture:
    """Return a mixture away from its beginning."""
    found = Mixture(weights(), components, 0.9, learn)
    with torch.no_grad():
        for i, parameter in enumerate(found.parameters()):
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            parameter += 0.1 * noise
    return found


def of(means: list[float], deviations: list[float], shares: list[float]) -> Components:
    log_precisions = -2 * torch.tensor(deviations, dtype=torch.float64).log()
    return Components(torch.tensor(means, dtype=torch.float64), log_precisions, torch.tensor(shares).double().log())


class TestMixture:
    def test_complexity_is_the_negative_log_likelihood(self) -> None:
        found = mixture()
        means = np.append(0, found.means.detach())
        logits = found.logits.detach().numpy()
        zero = 1 / (1 + math.exp(-float(found.zero_logit)))
        shares = np.append(zero, (1 - zero) * np.exp(logits - logsumexp(logits)))
        deviations = np.exp(-found.log_precisions.detach().numpy() / 2)
        densities = norm.pdf(weights().numpy()[:, None], means, deviations)
        assert float(found.complexity(weights()).detach()) == pytest.approx(-np.log(densities @ shares).sum())
        assert shares.sum() == pytest.approx(1)

    def test_many_weights_are_looked_at_in_parts(self) -> None:
        found, values = mixture(), weights(20_000).requires_grad_()
        whole = -found.components().joint(values).logsumexp(0).sum()
        parameters = (values, found.means, found.log_precisions, found.logits)
        wanted = torch.autograd.grad(whole, parameters, retain_graph=True)
        torch.testing.assert_close(found.complexity(values), whole)
        torch.testing.assert_close(torch.autograd.grad(found.complexity(values), parameters), wanted)

    @pytest.mark.parametrize("learn", [False, True])
    def test_gradients_are_those_of_finite_differences(self, learn: bool) -> None:
        found, values = mixture(learn=learn), weights(20).requires_grad_()
        parameters = dict(found.named_parameters())

        def total(w: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            named = dict(zip(parameters, given, strict=True))
            both = _Total(found, (50, 2), (25, 0.1), 0.9, 30.0 if learn else None)
            result: torch.Tensor = torch.func.functional_call(both, {f"mixture.{k}": v for k, v in named.items()}, w)
            return result

        assert torch.autograd.gradcheck(total, (values, *parameters.values()))

    def test_weights_far_from_all_components_do_not_underflow(self) -> None:
        """Without log-sum-exp each density would be 0 in float32, its logarithm infinite and its gradient NaN."""
        found = Mixture(torch.linspace(-0.1, 0.1, 50), 4, 0.99, False)
        with torch.no_grad():
            found.log_precisions.fill_(12.0)
        far = torch.tensor([5.0, -3.0, 0.0], requires_grad=True)
        value = found.complexity(far)
        value.backward()
        assert math.isfinite(float(value.detach()))
        # the nearest mean is 0.1, and its component pulls by precision times distance
        assert float(far.grad[0]) == pytest.approx(math.exp(12) * 4.9, rel=1e-4)

    def test_the_prior_of_the_precisions_is_gamma(self) -> None:
        one, other = mixture(), mixture()
        with torch.no_grad():
            other.log_precisions += torch.linspace(-1, 1, 5)
        difference = other.hyperpriors(*PRIORS) - one.hyperpriors(*PRIORS)

        def negative_log(found: Mixture) -> float:
            precisions = found.log_precisions.detach().exp().numpy()
            return float(
                -gamma.logpdf(precisions[0], 5000, scale=1 / 2) - gamma.logpdf(precisions[1:], 250, scale=10).sum()
            )

        assert float(difference.detach()) == pytest.approx(negative_log(other) - negative_log(one))

    def test_its_gradient_is_zero_at_the_mode_of_the_precision(self) -> None:
        found = mixture()
        with torch.no_grad():
            found.log_precisions.copy_(torch.tensor([4999 / 2] + 4 * [249 / 0.1]).double().log())
        found.hyperpriors(*PRIORS).backward()
        assert float(found.log_precisions.grad.abs().max()) < 1e-3  # of 5000

    def test_the_prior_of_the_share_of_zeros_is_beta_with_its_mode_there(self) -> None:
        found, strength = mixture(learn=True), 40.0
        values = []
        for share in (0.5, 0.8, 0.9, 0.95):
            with torch.no_grad():
                found.zero_logit.fill_(math.log(share / (1 - share)))
            with_it = found.hyperpriors((1, 1), (1, 1), 0.9, strength) - found.hyperpriors((1, 1), (1, 1), 0.9, None)
            values.append((float(with_it.detach()), -beta.logpdf(share, 1 + strength * 0.9, 1 + strength * 0.1)))
        ours, theirs = np.array(values).T
        np.testing.assert_allclose(ours - ours[0], theirs - theirs[0])
        assert ours.argmin() == 2

    def test_it_begins_with_means_over_the_range_of_the_weights(self) -> None:
        values = weights()
        found = Mixture(values, 6, 0.99, False).components()
        expected = np.append(0, np.linspace(float(values.min()), float(values.max()), 5))
        np.testing.assert_allclose(found.means.detach(), expected)
        np.testing.assert_allclose((-0.5 * found.log_precisions).exp().detach(), expected[2] - expected[1])
        np.testing.assert_allclose(found.log_shares.exp().detach(), [0.99] + 5 * [0.002])

    def test_each_weight_takes_the_component_with_the_largest_responsibility(self) -> None:
        found = of([0, 0.3, -0.4], [0.02, 0.1, 0.3], [0.9, 0.05, 0.05])
        values = np.linspace(-1, 1, 101)
        joint = np.log([0.9, 0.05, 0.05]) + norm.logpdf(values[:, None], [0, 0.3, -0.4], [0.02, 0.1, 0.3])
        assert np.array_equal(found.nearest(torch.tensor(values)), joint.argmax(1))


class TestMerging:
    def test_distances_are_kullback_leibler_divergences_both_ways(self) -> None:
        found = of([0, 0.3, -0.4], [0.02, 0.1, 0.3], [0.9, 0.05, 0.05])
        parts = [torch.distributions.Normal(m, d) for m, d in ((0.0, 0.02), (0.3, 0.1), (-0.4, 0.3))]
        kl = torch.distributions.kl_divergence
        expected = [[float(kl(one, other) + kl(other, one)) for other in parts] for one in parts]
        np.testing.assert_allclose(found.distances(), expected, rtol=1e-5, atol=1e-12)

    def test_two_that_overlap_become_one_with_their_common_mean_and_variance(self) -> None:
        found = of([0, 0.5, 0.52, -0.5], [0.02, 0.1, 0.12, 0.1], [0.7, 0.1, 0.15, 0.05]).merged(0.3)
        mean = (0.1 * 0.5 + 0.15 * 0.52) / 0.25
        variance = (0.1 * (0.01 + (0.5 - mean) ** 2) + 0.15 * (0.0144 + (0.52 - mean) ** 2)) / 0.25
        np.testing.assert_allclose(found.means, [0, mean, -0.5])
        np.testing.assert_allclose(found.log_shares.exp(), [0.7, 0.25, 0.05])
        np.testing.assert_allclose((-found.log_precisions).exp(), [0.0004, variance, 0.01])

    def test_what_merges_with_the_component_of_the_zeros_has_the_mean_zero(self) -> None:
        found = of([0, 0.001, 0.4], [0.02, 0.02, 0.02], [0.8, 0.1, 0.1]).merged(0.1)
        assert found.means.tolist() == [0, 0.4]
        np.testing.assert_allclose(found.log_shares.exp(), [0.9, 0.1])

    def test_a_limit_of_zero_merges_nothing_and_a_large_one_everything(self) -> None:
        found = of([0, 0.1, 0.1], [0.1, 0.1, 0.1], [0.8, 0.1, 0.1])
        assert len(found.merged(0).means) == 3
        assert found.merged(1e9).means.tolist() == [0]


class _Total(nn.Module):
    """Complexity and priors as a function of the parameters."""

    def __init__(self, mixture: Mixture, *priors: Any) -> None:
        super().__init__()
        self.mixture, self.priors = mixture, priors

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return self.mixture.complexity(w) + self.mixture.hyperpriors(*self.priors)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class TestRule:
    NAMES: ClassVar = ["0.weight", "2.weight"]

    def test_the_penalty_has_the_value_and_the_gradient_of_the_complexity(self) -> None:
        model = network()
        rule = MixturePrior(config(strength=0.01), self.NAMES, model)
        penalty = rule.penalty(model)
        penalty.backward()
        flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
        value = 0.01 * (rule.mixture.complexity(flat) + rule.mixture.hyperpriors(*PRIORS))
        assert float(penalty.detach()) == pytest.approx(float(value.detach()))
        wanted = torch.autograd.grad(value, [model[0].weight, model[2].weight, rule.mixture.means])
        for got, want in zip(
            (model[0].weight.grad, model[2].weight.grad, rule.mixture.means.grad), wanted, strict=True
        ):
            torch.testing.assert_close(got, want)
        assert model[0].bias.grad is None

    def test_each_part_of_the_mixture_has_its_learning_rate_and_zero_is_pinned(self) -> None:
        """The first step of Adam is as long as its learning rate."""
        model = network()
        rule = MixturePrior(config(mean_lr=1e-4, precision_lr=2e-3, share_lr=3e-3), self.NAMES, model)
        before = copy.deepcopy(rule.mixture)
        rule.penalty(model)
        rule.after_step(model, 0.1)
        for name, rate in (("means", 1e-4), ("log_precisions", 2e-3), ("logits", 3e-3)):
            moved = (getattr(rule.mixture, name) - getattr(before, name)).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.02, atol=1e-6)
        found = rule.mixture.components()
        assert found.means[0].item() == 0
        assert found.log_shares[0].exp().item() == pytest.approx(0.99)

    def test_the_share_of_zeros_is_learned_where_that_is_wanted(self) -> None:
        model = network()
        rule = MixturePrior(config(zero_share_strength=10.0), self.NAMES, model)
        for _ in range(50):
            rule.penalty(model)
            rule.after_step(model, 0.5)
        assert rule.mixture.components().log_shares[0].exp().item() < 0.989

    def test_weights_gather_around_the_means_and_at_zero(self) -> None:
        layer = nn.Linear(30, 30, bias=False)
        centres = torch.tensor([0.0, 0.0, 0.0, 0.5, -0.3])[torch.arange(900) % 5]
        noise = 0.04 * torch.randn(900, generator=torch.Generator().manual_seed(0))
        layer.weight.data = (centres + noise).view(30, 30)
        given = config(components=6, zero_share=0.6, mean_lr=1e-3, precision_lr=2e-2, share_lr=2e-2)
        rule = MixturePrior(given, ["weight"], layer)
        optimizer = torch.optim.Adam(layer.parameters(), lr=2e-4)
        for step in range(300):
            optimizer.zero_grad()
            rule.penalty(layer).backward()
            optimizer.step()
            rule.after_step(layer, step / 300)
        spread = (layer.weight.flatten() - centres).detach()
        assert float(spread.std()) < 0.5 * 0.04
        components = rule.mixture.components().merged(0.1)
        values = components.means[components.nearest(layer.weight.detach().flatten())]
        assert float((values == 0)[centres == 0].float().mean()) > 0.98
        assert float(((values - centres).abs() < 0.05).float().mean()) > 0.98


def compressed(model: nn.Module, given: SoftSharingConfig, task: Any) -> tuple[SoftSharing, nn.Module]:
    technique = implement(given)
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    fit(changed, model, task, given.finetune, rules_for(technique, changed))
    return technique, technique.consolidate(changed)


class TestTechnique:
    def test_weights_end_as_means_of_components_and_zeros_as_zeros(
        self, trained_digits: nn.Module, digits_task: ClassificationTask
    ) -> None:
        trained_digits.fc1.weight.data[:, ::2] = 0
        given = config(strength=1e-5, finetune=Finetune(epochs=2, lr=1e-3))
        technique, plain = compressed(trained_digits, given, digits_task)
        assert technique.rule is not None
        means = technique.rule.mixture.components().merged(given.merge).means.tolist()
        layers = [plain.conv1, plain.conv2, plain.fc1, plain.fc2]
        assert {v for layer in layers for v in layer.weight.unique().tolist()} <= set(means)
        assert len(plain.fc1.bias.unique()) == 64
        assert float((plain.fc1.weight == 0).float().mean()) > 0.8
        assert "components are left of 16" in technique.notes[0]
        assert [layer.name for layer in technique.analyze(trained_digits, digits_task).layers] == [
            "conv1", "conv2", "fc1", "fc2",
        ]  # fmt: skip

    def test_the_file_holds_codes_and_earlier_zeros_stay(
        self, trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
    ) -> None:
        prune = {"technique": "pruning/magnitude", "amount": 0.7, "scope": "layer"}
        share = {"technique": "quantization/soft-weight-sharing", "strength": 1e-5, "finetune": {"lr": 1e-3}}
        recipe = {"steps": [prune, share], "evaluate": {"batch_sizes": []}}
        result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
        pruned = load(tmp_path / "run" / "checkpoints" / "01.rarefy", base=lambda: copy.deepcopy(trained_digits))
        assert not result.model.fc1.weight[pruned.fc1.weight == 0].any()
        row = {row.tensor: row for row in inspect(tmp_path / "run" / "exports" / "model.rarefy")}["fc1.weight"]
        codes = result.model.fc1.weight.unique(return_counts=True)[1].double()
        bits = float(torch.special.entr(codes / codes.sum()).sum()) / math.log(2)
        assert row.coding == "codebook"
        assert row.bits_per_element < bits + 8 * (8 * len(codes) + 16) / int(codes.sum())

    def test_codes_cannot_be_shared_again(self, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
        share = {"technique": "quantization/soft-weight-sharing", "strength": 1e-5, "finetune": {}}
        with pytest.raises(RecipeError, match="leaves weights that share few values"):
            compress(trained_digits, {"steps": [share, {"technique": "quantization/kmeans"}]}, digits_task)

    def test_biases_can_share_too(self, digits_task: ClassificationTask, trained_digits: nn.Module) -> None:
        given = config(biases=True, finetune=Finetune(epochs=1, max_steps=2))
        _, plain = compressed(trained_digits, given, digits_task)
        assert len(plain.fc1.bias.unique()) <= 16

    def test_a_weight_that_is_zero_stays_it_whatever_its_component(self) -> None:
        model = network()
        model[0].weight.data[:, 0] = 0
        technique = implement(config())
        technique.transform(model, technique.analyze(model, TASK), TASK)
        technique.training_rule(model)
        with torch.no_grad():
            technique.rule.mixture.log_precisions[0] = -20  # so flat that no weight is its
        plain = technique.consolidate(model)
        assert plain[0].weight[:, 0].count_nonzero() == 0
        assert plain[0].weight[:, 1:].count_nonzero() == 16 * 7

    def test_a_shared_weight_counts_once(self) -> None:
        model = network()
        model.add_module("twin", nn.Linear(16, 4))
        model.twin.weight = model[2].weight
        analysis = implement(config()).analyze(model, TASK)
        assert analysis.plan == ("0.weight", "2.weight")
        assert [layer.name for layer in analysis.skipped] == ["twin"]

    def test_without_training_nothing_happens_and_that_is_told(self) -> None:
        technique, model = implement(config()), network()
        technique.transform(model, technique.analyze(model, TASK), TASK)
        plain = technique.consolidate(model)
        assert torch.equal(plain[0].weight, network()[0].weight)
        assert "No mixture was learned" in technique.notes[0]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"finetune": None}, "give `finetune`"),
            ({"finetune": Finetune(epochs=0)}, "give `finetune`"),
            ({"finetune": Finetune(keep="best")}, "keep: last"),
            ({"strength": 0}, "strength"),
            ({"zero_share": 1.0}, "zero_share"),
            ({"components": 1}, "components"),
            ({"precision": (0.5, 1)}, "precision"),
            ({"merge": -1}, "merge"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            config(**options)

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        model = network()
        model[2].weight.data[0, 0] = math.nan
        with pytest.raises(StageError, match=r"'2'.*NaN or infinite"):
            implement(config()).analyze(model, TASK)
