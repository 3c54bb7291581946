"""Several processes of one run, launched by `python -m torch.distributed.run -m rarefy run ...`."""

from __future__ import annotations

import atexit
import os
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process is the one that measures and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def start(device: str) -> None:
    """Join the other processes, if there are any."""
    if world_size() > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        # threads of a group that is still there when the interpreter ends abort the process (pytorch/pytorch#190489)
        atexit.register(state.destroy_process_group)
        if torch.distributed.get_world_size() != world_size():
            raise RuntimeError(
                f"the launcher announced {world_size()} processes, the group has {torch.distributed.get_world_size()}"
            )


def wait() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def same_everywhere_(model: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if world_size() > 1:
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                torch.distributed.broadcast(tensor, src=0)


def from_main(value: T) -> T:
    """Return the main process's value in all of them."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
