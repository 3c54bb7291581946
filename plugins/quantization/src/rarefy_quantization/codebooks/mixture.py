"""A Gaussian mixture over weights, one component of which stands for zero: complexity, merging, assignment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_ROWS = 8192
"""Most weights that are looked at at a time: what they need stays in the processor's cache."""
Gamma = tuple[float, float]
"""Shape and rate of a Gamma distribution."""


@dataclass(frozen=True)
class Components:
    """The components of a mixture, (components,) each, the one with the pinned mean first."""

    means: torch.Tensor
    log_precisions: torch.Tensor
    log_shares: torch.Tensor

    def joint(self, weights: torch.Tensor) -> torch.Tensor:
        """Return log pi_j N(w_i | mu_j, 1 / lambda_j), `(components, weights)`."""
        squares = (weights - self.means.unsqueeze(1)).square()
        constants = self.log_shares + 0.5 * (self.log_precisions - math.log(2 * math.pi))
        return constants.unsqueeze(1) - 0.5 * self.log_precisions.exp().unsqueeze(1) * squares

    def nearest(self, weights: torch.Tensor) -> torch.Tensor:
        """Return for each weight the component with the largest responsibility, `(weights,)`."""
        return torch.cat([self.joint(part).argmax(0) for part in weights.split(_ROWS)])

    def merged(self, limit: float) -> Components:
        """Return the mixture in which no two components are nearer than `limit`, the nearest two merged first.

        Two become one with the sum of their shares and their common mean and variance; with the first, the mean is 0.
        """
        found = self
        while len(found.means) > 1:
            distances = found.distances().fill_diagonal_(torch.inf)
            place = int(distances.argmin())
            one, other = sorted(divmod(place, len(found.means)))
            if not distances[one, other] < limit:
                break
            found = found._joined(one, other)
        return found

    def distances(self) -> torch.Tensor:
        """Return the symmetric Kullback-Leibler divergences, KL(i|j) + KL(j|i), of the components from each other.

        1/2 (l_i + l_j) (mu_i - mu_j)^2 + 1/2 (l_i / l_j + l_j / l_i) - 1 with the precisions l.
        """
        precisions = self.log_precisions.exp()
        apart = (self.means.unsqueeze(1) - self.means).square()
        ratios = torch.cosh(self.log_precisions.unsqueeze(1) - self.log_precisions)
        return 0.5 * (precisions.unsqueeze(1) + precisions) * apart + ratios - 1

    def _joined(self, one: int, other: int) -> Components:
        pair = torch.tensor([one, other], device=self.means.device)
        log_share = self.log_shares[pair].logsumexp(0)
        parts = (self.log_shares[pair] - log_share).exp()
        mean = (parts * self.means[pair]).sum() if one else self.means[0]
        variance = (parts * ((-self.log_precisions[pair]).exp() + (self.means[pair] - mean).square())).sum()
        kept = [tensor.clone() for tensor in (self.means, self.log_precisions, self.log_shares)]
        for tensor, value in zip(kept, (mean, -variance.log(), log_share), strict=True):
            tensor[one] = value
        rest = torch.arange(len(self.means), device=pair.device) != other
        return Components(*(tensor[rest] for tensor in kept))


class _Complexity(torch.autograd.Function):
    """-sum_i log sum_j pi_j N(w_i | mu_j, 1 / lambda_j), with its gradients from one pass in little memory.

    With the responsibilities r_ij they are sum_j r_ij lambda_j (w_i - mu_j) for a weight, and sums over the weights of
    -r_ij lambda_j (w_i - mu_j) for a mean, r_ij (lambda_j (w_i - mu_j)^2 - 1) / 2 for a log-precision and -r_ij for the
    logarithm of a share.
    """

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, *mixture: torch.Tensor) -> torch.Tensor:
        """Return the complexity and keep its gradients."""
        found = Components(*mixture)
        precisions, value = found.log_precisions.exp(), weights.new_zeros(())
        sums = weights.new_zeros(3, len(precisions))
        gradients = []
        for part in weights.split(_ROWS):
            joint, apart = found.joint(part), part - found.means.unsqueeze(1)
            total = joint.logsumexp(0)
            shares = (joint - total).exp()
            pulls = shares * apart
            value -= total.sum()
            gradients.append(precisions @ pulls)
            sums += torch.stack([pulls.sum(1), (pulls * apart).sum(1), shares.sum(1)])
        first, second, mass = sums
        precise = 0.5 * (precisions * second - mass)
        ctx.save_for_backward(torch.cat(gradients), -precisions * first, precise, -mass)
        return value

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        """Return the gradients."""
        return tuple(gradient[0] * kept for kept in ctx.saved_tensors)


class Mixture(nn.Module):
    """A mixture that is learned: means but the first, log-precisions, and the shares' logits."""

    def __init__(self, weights: torch.Tensor, components: int, zero_share: float, learn_zero_share: bool) -> None:
        """Begin with means spread evenly over the range of `weights`, and the distance of two as deviation of all."""
        super().__init__()
        least, most = float(weights.min()), float(weights.max())
        spread = (most - least) / max(components - 2, 1)
        like = {"dtype": weights.dtype, "device": weights.device}
        self.means = nn.Parameter(torch.linspace(least, most, components - 1, **like))
        self.log_precisions = nn.Parameter(torch.full((components,), -2 * math.log(max(spread, 1e-8)), **like))
        self.logits = nn.Parameter(torch.zeros(components - 1, **like))
        zero_logit = torch.tensor(math.log(zero_share) - math.log1p(-zero_share), **like)
        self.zero_logit = nn.Parameter(zero_logit, requires_grad=learn_zero_share)

    def components(self) -> Components:
        """Return the components."""
        others = F.logsigmoid(-self.zero_logit) + self.logits.log_softmax(0)
        shares = torch.cat([F.logsigmoid(self.zero_logit).unsqueeze(0), others])
        return Components(F.pad(self.means, (1, 0)), self.log_precisions, shares)

    def complexity(self, weights: torch.Tensor) -> torch.Tensor:
        """Return -sum_i log sum_j pi_j N(w_i | mu_j, 1 / lambda_j) (Ullrich et al. 2017, eq. 6 and 8)."""
        found = self.components()
        value: torch.Tensor = _Complexity.apply(weights, found.means, found.log_precisions, found.log_shares)
        return value

    def hyperpriors(self, zero: Gamma, others: Gamma, zero_share: float, strength: float | None) -> torch.Tensor:
        """Return the negative logarithm of the priors on precisions and pi_0, without constants.

        (1 - a) log lambda + b lambda for Gamma(a, b); -s (m log pi_0 + (1 - m) log (1 - pi_0)) for a Beta distribution
        with the mode m = `zero_share` and the `strength` s.
        """
        like = self.log_precisions
        shape, rate = (F.pad(like.new_full((len(self.means),), others[i]), (1, 0), value=zero[i]) for i in (0, 1))
        total = ((1 - shape) * like + rate * like.exp()).sum()
        if strength is not None:
            here, away = F.logsigmoid(self.zero_logit), F.logsigmoid(-self.zero_logit)
            total = total - strength * (zero_share * here + (1 - zero_share) * away)
        return total
