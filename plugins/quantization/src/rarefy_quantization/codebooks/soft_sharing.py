"""Soft weight-sharing: a mixture learned with the weights, which in the end take its means."""

from __future__ import annotations

import torch
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule, refuse_not_finite
from rarefy.weights import layer_weights
from rarefy_schemas import LayerReport
from torch import nn

from rarefy_quantization.codebooks.config import SoftSharingConfig
from rarefy_quantization.codebooks.mixture import Mixture


class MixturePrior(TrainingRule):
    """Adds the complexity of the weights to the loss, and learns the mixture beside them.

    Its learning rates are its own, so its optimizer is too; it takes a step whenever the weights do. Every process
    sees the same weights, and so has the same mixture.
    """

    def __init__(self, config: SoftSharingConfig, names: list[str], model: nn.Module) -> None:
        self.config, self.names = config, names
        with torch.no_grad():
            weights = self._weights(model)
        learn = config.zero_share_strength is not None
        self.mixture = Mixture(weights, config.components, config.zero_share, learn)
        rates = [
            ([self.mixture.means], config.mean_lr),
            ([self.mixture.log_precisions], config.precision_lr),
            ([self.mixture.logits, self.mixture.zero_logit], config.share_lr),
        ]
        self.optimizer = torch.optim.Adam([{"params": params, "lr": lr} for params, lr in rates])

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Return the complexity with its gradient for the weights, and keep that for the mixture.

        What mixed precision and clipping do to the gradients of the model is none of the mixture's business.
        """
        config, weights = self.config, self._weights(model)
        leaf = weights.detach().requires_grad_()
        own = [parameter for parameter in self.mixture.parameters() if parameter.requires_grad]
        value = self.mixture.complexity(leaf) + self.mixture.hyperpriors(
            config.zero_precision, config.precision, config.zero_share, config.zero_share_strength
        )
        gradient, *rest = torch.autograd.grad(config.strength * value, [leaf, *own])
        for parameter, found in zip(own, rest, strict=True):
            parameter.grad = found
        linear = (weights * gradient).sum()
        return config.strength * value.detach() + linear - linear.detach()

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Move the mixture."""
        self.optimizer.step()

    def _weights(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model.get_parameter(name).flatten() for name in self.names])


class SoftSharing(Technique[SoftSharingConfig]):
    """Trains under the mixture, and gives each weight the mean of the component with the largest responsibility."""

    names: tuple[str, ...] = ()
    rule: MixturePrior | None = None

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which tensors the mixture is over."""
        weights, skipped = layer_weights(model, self.config)
        names: dict[nn.Parameter, str] = {}
        for weight in weights:
            names[weight.parameter] = f"{weight.name}.weight"
            bias = weight.layer.bias
            if self.config.biases and isinstance(bias, nn.Parameter):
                refuse_not_finite(weight.name, bias)
                names.setdefault(bias, f"{weight.name}.bias")
        action = f"train towards a mixture of {self.config.components} components"
        layers = tuple(LayerReport(name=weight.name, kind=weight.kind, action=action) for weight in weights)
        return Analysis(layers, tuple(skipped), tuple(names.values()))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Change nothing yet; the fine-tuning does."""
        self.names = analysis.plan
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule | None:
        """Return the prior; None when there are no weights."""
        self.rule = MixturePrior(self.config, list(self.names), model) if self.names else None
        return self.rule

    @torch.no_grad()
    def consolidate(self, model: nn.Module) -> nn.Module:
        """Merge components that overlap, and leave means in the place of weights; what is zero stays zero."""
        if self.rule is None:
            self.notes.append("No mixture was learned, as nothing was fine-tuned; the weights are as they were.")
            return model
        components = self.rule.mixture.components().merged(self.config.merge)
        total = alive = 0
        for name in self.names:
            parameter = model.get_parameter(name)
            flat = parameter.flatten()
            means = components.means[components.nearest(flat)]
            parameter.copy_(means.masked_fill(flat == 0, 0).view_as(parameter))
            total, alive = total + flat.numel(), alive + int(parameter.count_nonzero())
        self.notes.append(
            f"{len(components.means)} components are left of {self.config.components}; {alive:,} of {total:,} weights "
            f"({alive / total:.2%}) are not zero."
        )
        return model
