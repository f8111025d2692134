"""The processes that torchrun has started for one training; without it there is one.

Each takes its share of every batch, and the first alone writes the record.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join torchrun's processes in one group while the context lasts."""
    if not started_by_torchrun():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Also before they have joined."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def number() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(value: Any) -> Any:
    """The first process's ``value``, in all of them."""
    if number() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def share(batch: Tensor) -> Tensor:
    """This process's samples, along the first axis; shares differ by one sample at most.

    Raises:
        ValueError: there are fewer samples than processes.
    """
    if number() == 1:
        return batch
    if len(batch) < number():
        raise ValueError(
            f"a batch of {len(batch)} samples cannot be shared by {number()} processes: choose another "
            "training.batch_size, or fewer processes"
        )
    return batch.tensor_split(number())[dist.get_rank()]


def weight(samples: int, whole: int) -> Tensor | None:
    """Of a share's mean loss, so that the gradients' mean over processes is the whole batch's; None: one."""
    return None if number() == 1 else torch.tensor(number() * samples / whole)


def added_up(x: Tensor) -> Tensor:
    """The sum over the processes."""
    if number() > 1:
        dist.all_reduce(x)
    return x
