"""What two processes send for a refresh of the curvature, and what it costs: gloo on one machine.

``python -m benchmarks.distributed [refreshes]`` prints a Markdown table. The inverses are computed by every process:
beside the time of that stands how much it would have to receive instead.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import machine, markdown_table
from experiments.problems import DeepLinearMLP, cifar_resnet
from kfac2 import KFAC, TwoLevelKFAC

PROCESSES, SAMPLES = 2, 64
HEADER = ("", "messages", "MiB sent", "ms", "ms of all inverses", "MiB of half of them")


def resnet() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return cifar_resnet(20), torch.randn(SAMPLES, 3, 32, 32), {"inverse": "tikhonov"}


def mlp() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    problem = DeepLinearMLP([0], train_samples=SAMPLES, test_samples=1)
    return problem.model, torch.randn(1, 10, SAMPLES), {"inverse": "eigen", "likelihood": "bernoulli"}


CASES: dict[str, tuple[type[KFAC], Callable[[], tuple[nn.Module, Tensor, dict[str, Any]]]]] = {
    "MLP, one level": (KFAC, mlp),
    "MLP, two levels": (TwoLevelKFAC, mlp),
    "ResNet20, one level": (KFAC, resnet),
    "ResNet20, two levels": (TwoLevelKFAC, resnet),
}


def measure(kind: type[KFAC], make: Callable[..., Any], refreshes: int) -> list[float]:
    """The numbers of a row of the table, medians over the refreshes."""
    model, x, options = make()
    optimizer = kind(model, factor_interval=1, inverse_interval=1, **options)
    ddp = DistributedDataParallel(model)
    sent: list[int] = []
    seconds: dict[str, list[float]] = {"send": [], "invert": []}
    preconditioner = optimizer.preconditioner
    preconditioner.processes.total = timed(preconditioner.processes.total, seconds["send"])
    preconditioner.refresh_inverses = timed(preconditioner.refresh_inverses, seconds["invert"])
    original = dist.all_reduce

    def all_reduce(message: Tensor, **rest: Any) -> Any:
        sent.append(message.nbytes)
        return original(message, **rest)

    dist.all_reduce = all_reduce
    for _ in range(refreshes + 1):
        optimizer.zero_grad()
        output = ddp(x)
        optimizer.update_curvature(output)
        output.square().mean().backward()
        optimizer.step()
    dist.all_reduce = original
    messages = len(sent) / (refreshes + 1)
    inverses = sum(part.nbytes for stack in preconditioner.stacks for part in stack.blocks.inverse)
    send, invert = (1e3 * median(times[1:]) for times in seconds.values())
    megabytes = sum(sent) / (refreshes + 1) / 2**20
    return [messages, megabytes, send, invert, inverses / PROCESSES / 2**20]


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def process(rank: int, folder: str, refreshes: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder, 'store')}"
    dist.init_process_group("gloo", store, rank=rank, world_size=PROCESSES)
    rows = [[name, *measure(kind, make, refreshes)] for name, (kind, make) in CASES.items()]
    if rank == 0:
        print(f"{machine()}, {PROCESSES} processes\n\n{markdown_table(HEADER, rows)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        refreshes = int(sys.argv[1]) if len(sys.argv) > 1 else 10
        mp.spawn(process, (folder, refreshes), nprocs=PROCESSES)  # pyright: ignore
