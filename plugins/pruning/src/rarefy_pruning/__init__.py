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
    from rarefy_pruning.sharing.config import HashedConfig
    from rarefy_pruning.weights.config import (
        BiasedWeightDecayConfig,
        MagnitudeConfig,
        MovementConfig,
        OptimalBrainDamageConfig,
        SnipConfig,
        WandaConfig,
    )

    return [
        HashedConfig,
        BiasedWeightDecayConfig,
        MagnitudeConfig,
        MovementConfig,
        OptimalBrainDamageConfig,
        SnipConfig,
        WandaConfig,
    ]
