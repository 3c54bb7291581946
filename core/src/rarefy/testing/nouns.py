"""Rules for the torch-free half of whatever a plugin registers."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from typing import Any

from pydantic import ValidationError
from rarefy_schemas import Noun
from torch import nn

from rarefy.nouns import implementation
from rarefy.registry import discover
from rarefy.task import Task
from rarefy.testing.require import require
from rarefy.testing.subjects import small_model, small_task


class NounConformance:
    """Rules that configs of every kind keep; the test methods are run by pytest or by `rarefy.testing.check_*`."""

    config: Any
    """The options to try it with."""
    parent: type[Any] = object
    """What the class behind the config must subclass."""

    def model(self) -> nn.Module:
        """Return the network to try it on, the same at every call."""
        return small_model()

    def task(self) -> Task:
        """Return the task to try it with, the same at every call."""
        return small_task()

    def test_it_has_a_name(self) -> None:
        """Check the discriminator."""
        name = type(self._noun()).registered_name()
        require(
            name == name.strip().lower() and " " not in name,
            f"The name {name!r} is not lower-case without spaces",
            "write it like 'pruning/my-method'",
        )

    def test_its_code_is_found(self) -> None:
        """Check `implementation`."""
        found = implementation(type(self._noun()))
        require(
            issubclass(found, self.parent),
            f"{found.__name__} is not a subclass of {self.parent.__name__}",
            f"derive it from rarefy.{self.parent.__name__}, or let `implementation` name the right class",
        )

    def test_it_is_documented(self) -> None:
        """Check the summary that `rarefy techniques` shows."""
        cls = type(self._noun())
        require(
            cls.summary().endswith("."),
            f"The summary of {cls.__name__} is {cls.summary()!r}, not a sentence",
            "start its docstring with one that says what it does, with a full stop",
        )

    def test_every_option_is_described(self) -> None:
        """Check that no option lacks its meaning."""
        config = type(self._noun())
        bare = [n for n, field in config.model_fields.items() if n != config.noun and not field.description]
        require(
            not bare,
            f"The options {', '.join(bare)} of {config.__name__} are not described",
            "write a docstring, with the unit, under each",
        )

    def test_unknown_options_are_refused(self) -> None:
        """Check that a misspelt option is an error."""
        config, unknown = self._noun(), "no_such_option"
        try:
            type(config).model_validate({**config.model_dump(), unknown: 1})
        except ValidationError as error:
            refused = any(e["type"] == "extra_forbidden" and e["loc"] == (unknown,) for e in error.errors())
        else:
            refused = False
        require(
            refused,
            f"{type(config).__name__} accepts the unknown option {unknown!r}",
            "do not set `extra` in its model_config; the parent forbids unknown options",
        )

    def test_its_options_survive_json(self) -> None:
        """Check that a recipe can be written and read back."""
        config = self._noun()
        self._same_options(type(config).model_validate_json(config.model_dump_json()))

    def test_importing_its_package_is_light(self) -> None:
        """Check that listing the plugin does not load torch; a method outside a plugin's package is not listed."""
        module = type(self._noun()).__module__
        package = module.partition(".")[0]
        if package not in {plugin.module.partition(":")[0].partition(".")[0] for plugin in discover()}:
            return
        failed = _import_failure(package, module)
        require(
            failed is None,
            f"Importing {package} and {module} in a fresh process fails or loads torch:\n{failed}",
            "keep the config in a module of its own that imports rarefy_schemas and pydantic only, and name the code "
            "in `implementation` instead of importing it",
        )

    def _noun(self) -> Noun:
        config = getattr(self, "config", None)
        require(
            isinstance(config, Noun),
            f"{type(self).__name__}.config is {config!r}",
            "set it to an instance of your config, such as `config = MyConfig(amount=0.5)`",
        )
        return config  # type: ignore[return-value]

    def _same_options(self, read: Noun) -> None:
        before, after = self._noun().model_dump(mode="json"), read.model_dump(mode="json")
        lost = [name for name in before if before[name] != after.get(name)]
        require(
            not lost,
            f"The options {', '.join(lost)} change when they are written as JSON and read back",
            "use plain types for them: numbers, strings, booleans, tuples and mappings of these",
        )


@lru_cache
def _import_failure(package: str, module: str) -> str | None:
    code = f"import sys, {package}, {module}; sys.exit('torch' in sys.modules and 'torch is imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None
