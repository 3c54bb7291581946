"""Whether a model is fit to go on with: finite weights, a forward that runs, a checkpoint that gives it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rarefy.errors import StageError
from rarefy.task import Task

_WRAPPERS = {
    "DistributedDataParallel": "pass its `.module`",
    "DataParallel": "pass its `.module`",
    "FullyShardedDataParallel": "unshard it and pass the model within",
    "OptimizedModule": "pass the model given to torch.compile, its `._orig_mod`, and compile the result",
    "RecursiveScriptModule": "pass the Python model it was scripted from",
    "TopLevelTracedModule": "pass the Python model it was traced from",
}


def refuse_wrapped(model: Any) -> None:
    """Raise `StageError` for what is no module, and for a module that stands for another one."""
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise StageError(f"a {kind} is a wrapper: {_WRAPPERS[kind]}")
    if not isinstance(model, nn.Module):
        raise StageError(
            f"the model has to be a torch.nn.Module, not a {kind}; call the function that builds it, and load a state "
            "dict into the network first"
        )


def refuse_broken_weights(model: nn.Module) -> None:
    """Raise `StageError` when a parameter is NaN or infinite."""
    broken = [name for name, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if broken:
        raise StageError(
            f"the model has weights that are NaN or infinite: {', '.join(broken[:5])}"
            f"{' and others' if len(broken) > 5 else ''}; lower the learning rate, or mend the file they come from"
        )


@torch.no_grad()
def one_zero_(model: nn.Module) -> None:
    """Turn -0.0, which `weight * mask` leaves, into 0.0: it computes the same, and telling them apart costs bytes."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(0.0)


def _example(task: Task, device: torch.device | str) -> list[Any]:
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in task.example_inputs(2)]


def refuse_unfit_inputs(model: nn.Module, task: Task, device: torch.device | str) -> None:
    """Raise `StageError` when the model, in evaluation mode, does not run on the task's inputs."""
    try:
        with torch.no_grad():
            model(*_example(task, device))
    except Exception as error:  # the model's forward is the user's code
        raise StageError(
            f"the model does not run on the inputs that were given: {type(error).__name__}: {error}. There has to be "
            "one tensor per positional argument of its forward, first dimension samples"
        ) from error


def try_out(model: nn.Module, task: Task, device: torch.device | str, name: str) -> None:
    """Run the model once after the technique `name`; raise `StageError` when it no longer runs."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(*_example(task, device))
    except Exception as error:  # the model's forward is the user's code
        raise StageError(
            f"after {name!r} the model no longer runs: {type(error).__name__}: {error}. Its forward may read an "
            "attribute of a layer that was replaced; name that layer in `targets.exclude`"
        ) from error
    model.train(was_training)


def refuse_other_outputs(before: nn.Module, after: nn.Module, task: Task, device: torch.device | str) -> None:
    """Raise `StageError` when a model read back from its checkpoint computes something else."""
    inputs = _example(task, device)
    with torch.no_grad():
        pairs = zip(_flat(before.eval()(*inputs)), _flat(after(*inputs)), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs):
            raise StageError(
                "the model read back from its checkpoint gives other outputs: some of its state is neither a "
                "parameter, a buffer nor a plain attribute. Register such tensors as buffers, or the module's class "
                "with rarefy.modules.register_module"
            )


def _flat(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors in nested outputs of a model."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
