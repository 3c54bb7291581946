"""Which dimensions of a model's inputs grow with the batch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import Dim
from torch.utils._pytree import tree_map

from rarefy.task import Task

_NOISY = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")


def traced_inputs(task: Task, dynamic_batch: bool) -> tuple[tuple[Any, ...], Any]:
    """Return inputs to trace a model with, and their dynamic dimensions in the form of torch.export.

    The dimensions are those in which inputs of two samples differ from inputs of three.
    """
    if not dynamic_batch:
        return task.example_inputs(1), None
    # two samples, since torch.export takes a size of one for a constant
    two, three = task.example_inputs(2), task.example_inputs(3)
    batch = Dim("batch", min=1)

    def dimensions(one: Any, other: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return None
        return {i: batch for i, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b}

    return two, tree_map(dimensions, two, three)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporters from printing, logging and warning about their own internals."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
