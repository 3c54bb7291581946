"""What layers see when calibration data passes through a model, streamed so that nothing has to be kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rarefy.errors import StageError
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.progress import track

Visit = Callable[[torch.Tensor], None]
"""Is handed one input of a layer; it must neither keep nor change it."""


class Reached(BaseException):
    """A forward pass has served its purpose; no `Exception`, so that a model's own error handling lets it pass."""


def stream_inputs(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    visits: Mapping[str, Visit],
    description: str = "calibrating",
    total: int | None = None,
) -> dict[str, int]:
    """Hand every input of the named layers to their visitors, and return how often each was called per batch.

    The model runs in evaluation mode and without gradients on `batches`, tuples of its positional arguments, such as
    `task.calibration()`; `total` is their number, for the progress bar. A layer that is called several times is
    visited each time. The calls are counted on the first batch, and the layers listed in the order in which it reaches
    them; one that it never reaches, as a forward pass may take the weight and go round the module, is absent.

    When the first batch called each layer exactly once, the forward passes of the others end at the last of them. So
    memory is bounded by the model and what the visitors gather: name one layer per pass, or a few.

    Raises `StageError` when there are no batches, or a layer is called with something else than a tensor.
    """
    calls: dict[str, int] = {}
    once, seen = False, False
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_fast_path())
        watch = _Watch(visits)
        for name in visits:
            hook = model.get_submodule(name).register_forward_pre_hook(watch.hook(name), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in track(batches, description, total):
            watch.start(stop=once)
            with contextlib.suppress(Reached):
                model(*move(batch, device_of(model)))
            if not seen:
                seen, calls = True, dict(watch.calls)
                once = bool(visits) and all(calls.get(name) == 1 for name in visits)
    if not seen:
        raise StageError(
            "the task's calibration gives no batches, and this technique measures what the layers see; give the task "
            "training data, or ask for at least one batch"
        )
    return calls


Passed = tuple[torch.Tensor, torch.Tensor]
"""What one call of a layer was given, and what it gave."""


def stream_together(
    models: Sequence[nn.Module],
    batches: Iterable[tuple[Any, ...]],
    name: str,
    description: str = "calibrating",
    total: int | None = None,
) -> Iterator[tuple[Passed, ...]]:
    """Yield what the layer `name` of each of several models is given and gives, call by call, over the same batches.

    The models run as those of `stream_inputs` do, each to the layer only once it is known to be called once per batch.
    Nothing is yielded where the layer of a model is not reached.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation(*models))
        stack.enter_context(without_fast_path())
        taps = [_Tap(name) for _ in models]
        for model, tap in zip(models, taps, strict=True):
            hook = model.get_submodule(name).register_forward_hook(tap.after, with_kwargs=True)
            stack.callback(hook.remove)
        for batch in track(batches, description, total):
            for model, tap in zip(models, taps, strict=True):
                tap.calls.clear()
                with contextlib.suppress(Reached), torch.no_grad():
                    model(*move(batch, device_of(model)))
                tap.stop = len(tap.calls) == 1
            yield from zip(*(tap.calls for tap in taps), strict=False)


class _Tap:
    """Keeps what a layer was given and gave during one forward pass."""

    def __init__(self, name: str) -> None:
        self.name, self.stop = name, False
        self.calls: list[Passed] = []

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
        """Keep a call, as copies, since later code may write into either; end the pass when this is the last one."""
        self.calls.append((given_to(self.name, args, kwargs).clone(), out.clone()))
        if self.stop:
            raise Reached


class _Watch:
    """Counts the calls of the layers during one forward pass."""

    def __init__(self, visits: Mapping[str, Visit]) -> None:
        self.visits = visits
        self.start(stop=False)

    def start(self, stop: bool) -> None:
        """Begin a forward pass; `stop` ends it once every layer was called."""
        self.calls: dict[str, int] = {}
        self.stop = stop

    def hook(self, name: str) -> Callable[..., None]:
        """Return the hook of the layer `name`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.visits[name](given_to(name, args, kwargs))
            self.calls[name] = self.calls.get(name, 0) + 1
            if self.stop and len(self.calls) == len(self.visits):
                raise Reached

        return before


def given_to(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the input that a layer is called with; raise `StageError` when it is no tensor."""
    given = args[0] if args else kwargs.get("input")
    if not isinstance(given, torch.Tensor):
        raise StageError(
            f"the layer {name!r} is called with {type(given).__name__} instead of a tensor; exclude it with "
            "`targets.exclude`"
        )
    return given


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep torch's transformer layers from computing in one fused step, which calls no inner layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
