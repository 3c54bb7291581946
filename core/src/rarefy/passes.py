"""Forward passes that stop at layers, so that one pass per batch serves all layers that are changed in turn."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rarefy.calibration import Reached, given_to, stream_inputs, stream_together, without_fast_path
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.task import Task

log = logging.getLogger(__name__)


class Passes:
    """A forward pass per calibration batch and model, all of which go from layer to layer together.

    What is written into a layer's weight between its calls and those of the next layer is what the passes go on with.
    So each batch runs once through the model, in the memory of all passes at the layer where they are. Where they
    cannot go together (a layer is called twice, a batch takes another way, the device has no room), every layer gets
    passes of its own from the start of the model, which give the same to the last bit.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        names: Iterable[str],
        task: Task,
        batches: int = 8,
        batch_size: int | None = None,
    ) -> None:
        """Begin with the layers `names` in mind, none of which shares its weight; all models have them."""
        self.models, self.task, self.count, self.size = models, task, batches, batch_size
        self.once = self._called_once(names)
        self.walks = [[walk(model, batch, self.once) for model in models] for batch in self._batches() if self.once]
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(evaluation(*models))
        self.stack.enter_context(without_fast_path())

    def calls(self, name: str) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield what each call of a layer is given, in each of the models; the layers are asked for in turn."""
        together = self._together(name) if name in self.once else None
        if together is not None:
            yield from together
            return
        calls = stream_together(self.models, self._batches(), name, f"calibrating {name}", self.count)
        yield from (tuple(given for given, _ in call) for call in calls)

    def close(self) -> None:
        """End the passes, and give the models back in the modes that they had."""
        self._leave()
        self.stack.close()

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        return self.task.calibration(self.size, self.count)

    def _called_once(self, names: Iterable[str]) -> list[str]:
        """Return the layers that the first batch calls once."""
        first = self.task.calibration(self.size, 1)
        calls = stream_inputs(self.models[-1], first, {name: lambda _: None for name in names}, "counting calls", 1)
        return [name for name, times in calls.items() if times == 1]

    def _together(self, name: str) -> list[tuple[torch.Tensor, ...]] | None:
        """Return what all passes give the layer, per batch, or None when some do not come to it next."""
        try:
            calls = [[next(one, None) for one in walks] for walks in self.walks]
        except torch.OutOfMemoryError:
            log.info("%s: the device has no room for all passes at once", name)
            calls = []
        found = [tuple(call[1] for call in batch if call is not None and call[0] == name) for batch in calls]
        if found and all(len(given) == len(self.models) for given in found):
            return found
        self._leave()
        return None

    def _leave(self) -> None:
        for walks in self.walks:
            for one in walks:
                one.close()
        self.walks, self.once = [], []


def walk(
    model: nn.Module, batch: tuple[Any, ...], names: Iterable[str]
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield the name of each named layer that a forward pass calls, with its input, before the layer computes.

    The pass goes on when the next call is asked for. So several can be under way, and what is written into a layer's
    weight in between is what it computes with. The input must neither be kept nor changed. The caller puts the model
    into evaluation mode; closing the iterator ends the pass.
    """
    walker = _Walker(lambda: model(*move(batch, device_of(model))))
    with contextlib.ExitStack() as stack:
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(walker.hook(name), with_kwargs=True)
            stack.callback(hook.remove)
        walker.start()
        stack.callback(walker.leave)
        while (call := walker.advance()) is not None:
            yield call


class _Walker(threading.Thread):
    """A forward pass in a thread of its own; it and its caller take turns."""

    def __init__(self, forward: Callable[[], object]) -> None:
        super().__init__(name="rarefy: a forward pass", daemon=True)
        self.forward, self.leaving = forward, False
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.call: tuple[str, torch.Tensor] | None = None
        self.error: BaseException | None = None
        # torch, or the libraries below it, keep these per thread
        self.threads, self.default_device = torch.get_num_threads(), torch.get_default_device()
        self.device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run(self) -> None:
        """Compute until the end, or until the caller leaves."""
        self.turn.acquire()
        try:
            torch.set_num_threads(self.threads)
            if self.device_index is not None:
                torch.accelerator.set_device_index(self.device_index)
            if self.default_device.type != "cpu":
                torch.set_default_device(self.default_device)
            if not self.leaving:
                with torch.no_grad():
                    self.forward()
        except Reached:
            pass
        except BaseException as error:  # it is the caller's
            self.error = error
        self.call = None
        self.back.release()

    def hook(self, name: str) -> Callable[..., None]:
        """Return the hook of a layer, which waits for the caller when this pass calls the layer, and no other."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.current_thread() is not self:
                return
            self.call = name, given_to(name, args, kwargs)
            self.back.release()
            self.turn.acquire()
            if self.leaving:
                raise Reached

        return before

    def advance(self) -> tuple[str, torch.Tensor] | None:
        """Go on to the next call; None at the end of the pass, whose error is raised."""
        self.call = None
        self.turn.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error
        return self.call

    def leave(self) -> None:
        """End the pass where it is."""
        self.leaving = True
        self.turn.release()
        self.join()
