"""Interleaved timing of training loops, split by what a step refreshes.

One thread computes and nothing waits, so a step's time is its processor time, ``time.thread_time``: on an
idle machine that is the wall clock's, and on a shared one it leaves out what other processes take.
"""

import platform
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

FACTOR_INTERVAL, INVERSE_INTERVAL = 4, 8
"""Intervals while sampling. A step's work does not depend on them, and at the paper's 10 and 100 a step
that refreshes the inverses would be too rare to take the median of."""
MINIMUM_ROUNDS = 3


@dataclass
class Contender:
    """A training loop. ``step(t)`` makes iteration ``t`` (from 0), of ``replicas`` seeds at once."""

    name: str
    step: Callable[[int], None]
    replicas: int = 1
    factor_interval: int | None = None
    inverse_interval: int | None = None
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    iteration: int = 0

    def run(self, steps: int) -> None:
        """Make ``steps`` iterations after one that is not timed: it finds another loop's data in the caches."""
        self._advance()
        for _ in range(steps):
            kind = self._kind()
            start = time.thread_time()
            self._advance()
            self.times[kind].append(1e3 * (time.thread_time() - start) / self.replicas)

    def forget(self) -> None:
        self.times.clear()

    def median(self, kind: str) -> float:
        """Milliseconds per replica-step; NaN for a kind that this loop does not have."""
        return median(self.times[kind]) if self.times.get(kind) else float("nan")

    @property
    def amortised(self) -> float:
        """Per step at the paper's intervals: in 100 steps 9 refresh the factors alone and 1 also the inverses."""
        ordinary = self.median("ordinary")
        factor = self.median("factor") if "factor" in self.times else ordinary
        inverse = self.median("inverse") if "inverse" in self.times else factor
        return (90 * ordinary + 9 * factor + inverse) / 100

    def _advance(self) -> None:
        self.step(self.iteration)
        self.iteration += 1

    def _kind(self) -> str:
        if self.inverse_interval and self.iteration % self.inverse_interval == 0:
            return "inverse"
        if self.factor_interval and self.iteration % self.factor_interval == 0:
            return "factor"
        return "ordinary"


def interleave(contenders: Sequence[Contender], seconds: float, steps: int = INVERSE_INTERVAL) -> int:
    """Let each run ``steps`` in turn, in shuffled order, until the time is up; returns the number of rounds."""
    for contender in contenders:
        contender.run(steps)
        contender.forget()
    order, shuffle = list(contenders), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MINIMUM_ROUNDS or time.perf_counter() < end:
        shuffle(order)
        for contender in order:
            contender.run(steps)
        rounds += 1
    return rounds


def machine() -> str:
    """The processor, torch's version and its threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, torch {torch.__version__}, {torch.get_num_threads()} thread"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """Numbers with two decimals, NaN as an empty cell."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[cell if isinstance(cell, str) else _number(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(x: float) -> str:
    return "" if x != x else f"{x:.2f}"
