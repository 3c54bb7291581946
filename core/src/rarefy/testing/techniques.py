"""All rules that a technique keeps."""

from __future__ import annotations

import json

from rarefy_schemas import TechniqueConfig

from rarefy.hookspecs import hookimpl
from rarefy.recipe import load_recipe
from rarefy.registry import Registry, discover, get
from rarefy.testing.moments import MomentRules
from rarefy.testing.require import require
from rarefy.testing.results import ResultRules
from rarefy.testing.traits import TraitRules


class TechniqueConformance(MomentRules, ResultRules, TraitRules):
    """Rules for a technique; subclass it with a `config`, and with `model` and `task` where the defaults do not fit.

    With `config.finetune` set, every rule is checked after a fine-tuning of three steps.
    """

    def test_it_names_its_paper(self) -> None:
        """Check that the method can be looked up."""
        require(
            type(self._noun()).paper,
            f"{type(self.config).__name__} names no paper",
            "set `paper: ClassVar[str]` to where the method is described, or to 'unpublished'",
        )

    def test_its_options_survive_json(self) -> None:
        """Check that a step can be written into a recipe and read back."""
        step = json.loads(json.dumps(self.config.model_dump(mode="json")))
        self._same_options(load_recipe({"steps": [step]}, registry=_registry_with(type(self.config))).steps[0])


def _registry_with(config: type[TechniqueConfig]) -> Registry:
    class Ours:
        @hookimpl
        def register_techniques(self) -> list[type[TechniqueConfig]]:
            return [config]

    registry = get()
    known = registry.techniques.get(config.registered_name())
    if known is not None and known.implementation == config.implementation:
        return registry
    registry = Registry(discover())
    registry.manager.register(Ours(), "the conformance kit")
    return registry
