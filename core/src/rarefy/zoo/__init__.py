"""Small standard networks, of plain `torch.nn`, that the demo, the tests and the benchmarks share.

The names need no torch; each builder is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from rarefy.zoo.gpt import gpt_tiny as gpt_tiny
    from rarefy.zoo.lenet import lenet5 as lenet5
    from rarefy.zoo.lenet import lenet300 as lenet300
    from rarefy.zoo.mobilenet import mobilenet_small as mobilenet_small
    from rarefy.zoo.resnet import resnet20 as resnet20
    from rarefy.zoo.resnet import resnet32 as resnet32
    from rarefy.zoo.resnet import resnet56 as resnet56
    from rarefy.zoo.small import digits_cnn as digits_cnn
    from rarefy.zoo.small import mlp as mlp
    from rarefy.zoo.vgg import vgg_small as vgg_small
    from rarefy.zoo.vit import vit_tiny as vit_tiny

    ZOO: dict[str, Callable[..., nn.Module]]

_HOMES = {
    "digits_cnn": "small",
    "gpt_tiny": "gpt",
    "lenet300": "lenet",
    "lenet5": "lenet",
    "mlp": "small",
    "mobilenet_small": "mobilenet",
    "resnet20": "resnet",
    "resnet32": "resnet",
    "resnet56": "resnet",
    "vgg_small": "vgg",
    "vit_tiny": "vit",
}
NAMES = tuple(_HOMES)
__all__ = ["NAMES", "ZOO", *NAMES]


def __getattr__(name: str) -> Any:
    if name == "ZOO":
        return {known: __getattr__(known) for known in NAMES}
    if name in _HOMES:
        return getattr(import_module(f"rarefy.zoo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rarefy.zoo' has no attribute {name!r}")
