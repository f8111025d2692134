"""Speed and memory of the optimizers on a CIFAR ResNet: one process, one thread, random images of CIFAR's size.

``python -m benchmarks.resnet [seconds] [depth]`` prints Markdown tables; a round at depth 110 takes minutes.
"""

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_allocated
from benchmarks.timing import Contender, interleave, machine, markdown_table
from experiments.problems import cifar_resnet
from kfac2 import KFAC, TwoLevelKFAC
from kfac2.optim.first_order import SGD

BATCH_SIZE = 128
FACTOR_INTERVAL, INVERSE_INTERVAL = 2, 4
OPTIONS: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-3}
KFAC_OPTIONS = OPTIONS | {
    "damping": 1e-3,
    "kl_clip": 1e-2,
    "inverse": "tikhonov",
    "factor_interval": FACTOR_INTERVAL,
    "inverse_interval": INVERSE_INTERVAL,
}
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SGD": (SGD, OPTIONS),
    "KFAC": (KFAC, KFAC_OPTIONS),
    "TwoLevelKFAC": (TwoLevelKFAC, KFAC_OPTIONS),
}
KINDS = ("ordinary", "factor", "inverse")


class Loop:
    """One optimizer's training loop; ``inverse_seconds`` times the refreshes of the inverses alone."""

    def __init__(self, name: str, depth: int, batch: tuple[Tensor, Tensor]):
        build, options = OPTIMIZERS[name]
        self.model = cifar_resnet(depth, torch.Generator().manual_seed(0))
        self.optimizer, self.batch = build(self.model, **options), batch
        self.inverse_seconds: list[float] = []
        if isinstance(self.optimizer, KFAC):
            self._time_inverses(self.optimizer)

    def _time_inverses(self, optimizer: KFAC) -> None:
        refresh = optimizer.preconditioner.refresh_inverses

        def timed(damping: float | Tensor) -> None:
            start = time.thread_time()
            refresh(damping)
            self.inverse_seconds.append(time.thread_time() - start)

        optimizer.preconditioner.refresh_inverses = timed

    def step(self, t: int = 0) -> None:
        x, y = self.batch
        self.optimizer.zero_grad()
        output = self.model(x)
        self.optimizer.update_curvature(output)
        F.cross_entropy(output, y).backward()
        self.optimizer.step()

    def contender(self, name: str) -> Contender:
        if isinstance(self.optimizer, KFAC):
            return Contender(name, self.step, 1, FACTOR_INTERVAL, INVERSE_INTERVAL)
        return Contender(name, self.step)


def peak_memory(name: str, depth: int, batch: tuple[Tensor, Tensor]) -> float:
    """MiB that tensors occupy at the peak of a step that refreshes everything, all that persists included."""
    loop = Loop(name, depth, batch)
    loop.step()
    for group in loop.optimizer.param_groups:
        group.update({key: 1 for key in ("factor_interval", "inverse_interval") if key in group})
    loop.optimizer.zero_grad()
    persistent = storage_bytes([loop.model.state_dict(), loop.optimizer.state_dict(), batch])
    return persistent / 2**20 + peak_allocated(loop.step)


def storage_bytes(state: Any) -> int:
    """Of all tensors in a nest of containers, each storage once."""
    sizes: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            sizes[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        elif isinstance(node, dict):
            visit(list(node.values()))
        elif isinstance(node, list | tuple):
            for child in node:
                visit(child)

    visit(state)
    return sum(sizes.values())


def ratios(
    loops: dict[str, Loop], rows: dict[str, Contender], memory: dict[str, float]
) -> list[Sequence[str | float]]:
    sgd, one, two = (rows[name] for name in OPTIMIZERS)
    inverse = max(median(loops[name].inverse_seconds) for name in ("KFAC", "TwoLevelKFAC"))
    measured = [
        ("ordinary step, KFAC / SGD", one.median("ordinary") / sgd.median("ordinary"), 1.03),
        ("ordinary step, TwoLevelKFAC / KFAC", two.median("ordinary") / one.median("ordinary"), 1.01),
        ("factor refresh, KFAC / SGD step", one.median("factor") / sgd.median("ordinary"), 4.0),
        ("factor refresh, TwoLevelKFAC / KFAC", two.median("factor") / one.median("factor"), 1.1),
        ("refresh of the inverses, seconds, the slower of the two", inverse, 0.5),
        ("peak memory of a refresh, KFAC / SGD step", memory["KFAC"] / memory["SGD"], 1.25),
        ("peak memory of a refresh, TwoLevelKFAC / SGD step", memory["TwoLevelKFAC"] / memory["SGD"], 1.25),
    ]
    return [
        [name, f"≤ {bound:.2f}", ratio, "reached" if ratio <= bound else "not reached"]
        for name, ratio, bound in measured
    ]


def main(seconds: float = 600, depth: float = 110) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = torch.randn(BATCH_SIZE, 3, 32, 32), torch.randint(10, (BATCH_SIZE,))
    loops = {name: Loop(name, int(depth), batch) for name in OPTIMIZERS}
    rows = {name: loop.contender(name) for name, loop in loops.items()}
    rounds = interleave(list(rows.values()), seconds, steps=INVERSE_INTERVAL)
    memory = {name: peak_memory(name, int(depth), batch) for name in OPTIMIZERS}
    print(
        f"ResNet{int(depth)}, batch {BATCH_SIZE}; {machine()}; medians of {rounds} rounds of {INVERSE_INTERVAL} steps\n"
    )
    header = ("seconds per step", "ordinary", "factor refresh", "inverse refresh", "peak MiB of a refresh")
    table = [[name, *(row.median(kind) / 1e3 for kind in KINDS), memory[name]] for name, row in rows.items()]
    print(markdown_table(header, table))
    print("\n" + markdown_table(("ratio", "target", "measured", ""), ratios(loops, rows, memory)))


if __name__ == "__main__":
    main(*(float(argument) for argument in sys.argv[1:]))
