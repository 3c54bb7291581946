"""Registration of the classes of torch.nn."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rarefy.modules.kinds import Kind, recover, register_kind

_MOST_LAYERS = 1024
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
# Their constructors take modules or make many of them; a model that has them is described against its base.
_LEFT_OUT = ("Module", "Container", "Transformer", "Lazy", "Parameter", "DataParallel", "AdaptiveLogSoftmax")


def _recurrent(module: nn.RNNBase) -> dict[str, Any]:
    names = [*_RECURRENT, "nonlinearity"] if isinstance(module, nn.RNN) else list(_RECURRENT)
    if isinstance(module, nn.LSTM):
        names.append("proj_size")
    return {name: getattr(module, name) for name in names}


def _attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    arguments = {name: getattr(module, name) for name in names}
    return {**arguments, "bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}


def _none(module: nn.Identity) -> dict[str, Any]:
    return {}


def _register(cls: type[nn.Module]) -> None:
    def make(arguments: dict[str, Any]) -> nn.Module:
        # the one argument of torch.nn that makes a constructor loop
        if (layers := arguments.get("num_layers", 1)) > _MOST_LAYERS:
            raise ValueError(f"{layers} layers are more than {_MOST_LAYERS}")
        return cls(**arguments)

    to_spec: Any = recover
    if cls is nn.Identity:  # it takes any arguments and keeps none
        to_spec = _none
    elif issubclass(cls, nn.RNNBase):
        to_spec = _recurrent
    elif issubclass(cls, nn.MultiheadAttention):
        to_spec = _attention
    register_kind(Kind(f"torch.nn.{cls.__name__}", cls, to_spec, make))


def _container(cls: type[nn.Module]) -> None:
    def make(arguments: dict[str, Any]) -> nn.Module:
        module = cls()
        for name, child in arguments["children"].items():
            module.add_module(name, child)
        return module

    register_kind(Kind(f"torch.nn.{cls.__name__}", cls, recover, make, container=True))


def _register_all() -> None:
    classes = [cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    for cls in (*classes, NonDynamicallyQuantizableLinear):
        if cls in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            _container(cls)
        elif cls is not nn.RNNBase and not cls.__name__.startswith(_LEFT_OUT):
            _register(cls)


_register_all()
