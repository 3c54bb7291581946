"""Bank-balanced pruning (Cao et al. 2019)."""

from rarefy import LayerTechnique, Plan, Skip
from rarefy.rules import KeepZeros
from torch import nn

from rarefy_bank_balanced.config import BankBalancedConfig


class BankBalanced(LayerTechnique[BankBalancedConfig]):
    """Zero the smallest weights of each bank; a row of `in * kh * kw` weights must divide into whole banks."""

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        """Count the weights to remove from a bank."""
        row, bank = layer.weight[0].numel(), self.config.bank
        count = round(self.config.amount * bank)
        if row % bank or count == 0:
            return Skip(f"its rows of {row} weights, or a share of {self.config.amount}, do not fit banks of {bank}")
        return Plan(f"remove {count} of {bank} weights per bank", {"sparsity": count / bank}, detail=count)

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        """Remove them."""
        banks = layer.weight.reshape(-1, self.config.bank)
        smallest = banks.abs().topk(plan.detail, largest=False).indices
        layer.weight.copy_(banks.scatter(1, smallest, 0).view_as(layer.weight))
        return layer

    def training_rule(self, model: nn.Module) -> KeepZeros:
        """Hold the zeros during fine-tuning."""
        return KeepZeros(model)
