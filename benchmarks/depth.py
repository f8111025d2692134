"""Cost of the coarse part as the deep linear MLP gets deeper, beside a literal Algorithm 1.

``python -m benchmarks.depth [seconds]`` prints a Markdown table; ``seconds`` is for each depth.
"""

import sys
import time
from functools import partial

import torch
from torch import Tensor

from benchmarks.mlp import BATCH_SIZE, SECOND_ORDER, training
from benchmarks.peers import SGD_OPTIONS
from benchmarks.timing import interleave, machine, markdown_table

DEPTHS = (64, 256, 1024)
INTERVALS = {"factor_interval": 2, "inverse_interval": 4}
WIDTH = 10


def coarse_cost(depth: int, seconds: float) -> list[float]:
    """Milliseconds of two levels, and more than of one: factor and inverse refresh, and a step on average."""
    one, two = (
        training(name, partial(kind, **SGD_OPTIONS), replicas=1, depth=depth, intervals=INTERVALS)
        for name, kind in SECOND_ORDER.items()
    )
    interleave([one, two], seconds, steps=4)
    columns = []
    for kind in ("factor", "inverse"):
        columns += [two.median(kind), two.median(kind) - one.median(kind)]
    return [*columns, two.amortised, two.amortised - one.amortised, two.amortised / one.amortised]


def literal_cost(depth: int) -> float:
    """Milliseconds in which Algorithm 1 forms the covariances of one refresh, A_ij and G_ij of all pairs.

    Nothing else of it: no running averages, no sums of Kronecker products. Up to 2145 of the pairs (all
    at depth 64) are formed, the time is scaled to their number.
    """
    layers = depth + 1
    inputs, gradients = torch.randn(2, layers, WIDTH, BATCH_SIZE).unbind()
    a, g = list(inputs), list(gradients)
    pairs = layers * (layers + 1) // 2
    rows, columns = torch.tril_indices(layers, layers)
    chosen = torch.randperm(pairs)[:2145]
    sample = list(zip(rows[chosen].tolist(), columns[chosen].tolist(), strict=True))
    start = time.thread_time()
    for i, j in sample:
        _covariance(a[i], a[j])
        _covariance(g[i], g[j])
    return 1e3 * (time.thread_time() - start) * pairs / len(sample)


def _covariance(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.mT / BATCH_SIZE


def main(seconds: float = 25) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [[str(depth), *coarse_cost(depth, seconds), literal_cost(depth)] for depth in DEPTHS]
    print(f"{machine()}; one seed, batch {BATCH_SIZE}, medians\n")
    columns = [
        f"{what}{part}"
        for what in ("factor refresh", "inverse refresh", "amortised step")
        for part in (", two levels", ": coarse part")
    ]
    print(markdown_table(("ms, by depth", *columns, "two levels / one", "Algorithm 1's covariances"), rows))


if __name__ == "__main__":
    main(*(float(argument) for argument in sys.argv[1:]))
