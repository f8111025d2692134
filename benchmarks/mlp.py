"""Speed of the optimizers on the deep linear MLP, beside plain PyTorch and K-FAC peers.

``python -m benchmarks.mlp [seconds]`` prints two Markdown tables, in about four minutes. One process, one thread.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.peers import KFAC_PEERS, SGD_OPTIONS, available, deep_linear_task, plain_sgd
from benchmarks.timing import (
    FACTOR_INTERVAL,
    INVERSE_INTERVAL,
    Contender,
    interleave,
    machine,
    markdown_table,
)
from experiments.problems.deep_linear import DeepLinearMLP
from kfac2 import KFAC, TwoLevelKFAC
from kfac2.optim.first_order import SGD, Adam

BATCH_SIZE = 512
INTERVALS = {"factor_interval": FACTOR_INTERVAL, "inverse_interval": INVERSE_INTERVAL}
FIRST_ORDER = {"SGD": SGD, "Adam": Adam}
SECOND_ORDER = {"KFAC": KFAC, "TwoLevelKFAC": TwoLevelKFAC}
KINDS = ("ordinary", "factor", "inverse")


def training(
    name: str, build: Callable[..., Any], replicas: int, depth: int = 64, intervals: Mapping[str, int] = {}
) -> Contender:
    """A training loop as the trainer's: ``build`` makes the optimizer of a model."""
    problem = DeepLinearMLP(seeds=range(replicas), depth=depth)
    batches = [batch for batch in problem.train_batches(BATCH_SIZE) if batch[1].shape[-1] == BATCH_SIZE]
    optimizer = build(
        problem.model, likelihood=problem.likelihood, generator=problem.label_generators, **intervals
    )

    def step(t: int) -> None:
        inputs, targets = batches[t % len(batches)]
        optimizer.zero_grad()
        output = problem.model(inputs)
        optimizer.update_curvature(output)
        problem.losses(output, targets).sum().backward()
        optimizer.step()

    return Contender(
        name, step, replicas, intervals.get("factor_interval"), intervals.get("inverse_interval")
    )


def optimizers(replicas: int) -> dict[str, Contender]:
    first = {
        name: training(name, partial(kind, **SGD_OPTIONS), replicas) for name, kind in FIRST_ORDER.items()
    }
    second = {
        name: training(name, partial(kind, **SGD_OPTIONS), replicas, intervals=INTERVALS)
        for name, kind in SECOND_ORDER.items()
    }
    return first | second


def targets(plain: Contender, ours: Mapping[str, Contender]) -> list[list[str | float]]:
    sgd, kfac, two_level = ours["SGD"], ours["KFAC"], ours["TwoLevelKFAC"]
    ratios = [
        ("plain nn.Sequential SGD / SGD", plain.amortised / sgd.amortised, 3.0, math.inf),
        ("KFAC amortised / SGD", kfac.amortised / sgd.amortised, 0.0, 1.20),
        ("TwoLevelKFAC amortised / KFAC amortised", two_level.amortised / kfac.amortised, 0.0, 1.05),
        (
            "factor refresh, TwoLevelKFAC / KFAC",
            two_level.median("factor") / kfac.median("factor"),
            0.0,
            1.15,
        ),
    ]
    return [
        [
            name,
            f"≥ {low:.2f}" if low else f"≤ {high:.2f}",
            ratio,
            "reached" if low <= ratio <= high else "not reached",
        ]
        for name, ratio, low, high in ratios
    ]


def main(seconds: float = 200) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = deep_linear_task(BATCH_SIZE)
    plain = plain_sgd(task)
    makers = {name: partial(of, task) for name, of in KFAC_PEERS.items()}
    peers = [peer for _, peer in available(makers, INVERSE_INTERVAL)]
    ours = {replicas: optimizers(replicas) for replicas in (1, 5)}
    baselines = [(plain, [plain, *peers])] + [(row["SGD"], list(row.values())) for row in ours.values()]
    rounds = interleave([contender for _, group in baselines for contender in group], seconds)

    print(f"{machine()}; medians of {rounds} interleaved rounds of {INVERSE_INTERVAL} steps\n")
    rows = [
        [
            contender.name,
            str(contender.replicas),
            *(contender.median(kind) for kind in KINDS),
            contender.amortised,
            contender.amortised / sgd.amortised,
        ]
        for sgd, group in baselines
        for contender in group
    ]
    columns = ("ordinary step", "factor refresh", "inverse refresh", "amortised", "/ its SGD")
    print(markdown_table(("ms per replica-step", "R", *columns), rows))
    print("\n" + markdown_table(("ratio at R = 5", "target", "measured", ""), targets(plain, ours[5])))


if __name__ == "__main__":
    main(*(float(argument) for argument in sys.argv[1:]))
