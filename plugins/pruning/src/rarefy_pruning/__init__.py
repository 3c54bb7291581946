"""Pruning techniques."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rarefy.hookspecs import hookimpl

if TYPE_CHECKING:
    from rarefy_schemas import TechniqueConfig


@hookimpl
def register_techniques() -> Iterable[type[TechniqueConfig]]:
    """Register the family."""
    from rarefy_pruning.channels import config as channels
    from rarefy_pruning.second_order.config import NetworkOBSConfig, OBSConfig, SparseGPTConfig
    from rarefy_pruning.sharing.config import DataFreeConfig, HashedConfig
    from rarefy_pruning.sparsity.config import GroupLassoConfig, KernelLassoConfig, NetworkSlimmingConfig
    from rarefy_pruning.weights.config import (
        BiasedWeightDecayConfig,
        MagnitudeConfig,
        MovementConfig,
        OptimalBrainDamageConfig,
        SnipConfig,
        WandaConfig,
    )

    return [
        channels.ChannelActivationConfig,
        channels.ChannelBatchNormConfig,
        channels.ChannelFisherConfig,
        channels.ChannelGeometricMedianConfig,
        channels.ChannelL1Config,
        channels.ChannelL2Config,
        channels.ChannelRandomConfig,
        channels.ChannelTaylorConfig,
        GroupLassoConfig,
        KernelLassoConfig,
        NetworkSlimmingConfig,
        DataFreeConfig,
        HashedConfig,
        BiasedWeightDecayConfig,
        MagnitudeConfig,
        MovementConfig,
        NetworkOBSConfig,
        OBSConfig,
        OptimalBrainDamageConfig,
        SnipConfig,
        SparseGPTConfig,
        WandaConfig,
    ]
