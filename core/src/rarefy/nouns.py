"""From the config of a noun to its code."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from rarefy.errors import PluginError

if TYPE_CHECKING:
    from rarefy_schemas import Noun


def implementation(config: type[Noun]) -> type[Any]:
    """Import the class that `config.implementation` names (`"package.module:Class"`)."""
    module_name, _, class_name = config.implementation.partition(":")
    if not module_name or not class_name:
        raise PluginError(
            f"{config.__name__}.implementation is {config.implementation!r}; write 'package.module:Class' there"
        )
    try:
        module = sys.modules.get(module_name) or importlib.import_module(module_name)
        found = getattr(module, class_name)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{config.registered_name()!r} cannot load its code from {config.implementation!r}: {error}"
        ) from error
    assert isinstance(found, type)
    return found


def implement(config: Noun) -> Any:
    """Return an instance of the class behind `config`, made with `config`."""
    return implementation(type(config))(config)
