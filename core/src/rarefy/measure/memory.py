"""How much memory a forward pass needs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rarefy.measure.mode import device_of, evaluation, move


def peak_memory(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the bytes of weights, buffers, inputs and the largest set of activations alive at one time.

    Counted as tensors between operators, so it is exact and the same on every machine; workspaces inside a kernel
    are not part of it.
    """
    inputs = move(inputs, device_of(model))
    live = _LiveTensors()
    live.add((*model.parameters(), *model.buffers(), *inputs))
    with torch.no_grad(), evaluation(model), live:
        model(*inputs)
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that exist after each operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors: Any) -> None:
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.now += size
            self.live[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        del self.live[key]
