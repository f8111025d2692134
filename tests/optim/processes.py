"""Training loops in several processes, each on its share of the batch, and the same in one process.

One process that adds up the shares as micro-batches is the oracle: it sees the same samples, layer calls and
losses, and adds them in another order.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac2 import KFAC, TwoLevelKFAC

KINDS: dict[str, type[KFAC]] = {"one level": KFAC, "two levels": TwoLevelKFAC}
STEPS, BATCH = 6, 12


class Network(nn.Module):
    """A convolution, and a linear layer that some calls leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.side = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor, with_side: bool = True) -> Tensor:
        h = self.conv(x).tanh().mean((2, 3))
        return self.head(self.side(h) if with_side else h)


def make(kind: str, model: nn.Module, **options: Any) -> KFAC:
    common = {"lr": 0.05, "likelihood": "gaussian", "factor_interval": 2, "inverse_interval": 4}
    return KINDS[kind](model, **common, generator=torch.Generator().manual_seed(7), **options)


def share(step: int, rank: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one process; together they are one batch, whoever shares it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(sum(sizes), 2, generator=generator, dtype=torch.float64)
    begin = sum(sizes[:rank])
    return x[begin : begin + sizes[rank]], y[begin : begin + sizes[rank]]


Spoil = Callable[[int, int, Tensor], Tensor]
Sides = Callable[[int, int], bool]


class Case:
    """A training of ``sum(sizes)`` samples a step, ``micro`` of the shares on each process.

    ``spoil(step, share, labels)`` changes the Fisher's labels, ``sides(step, share)`` says whether the forward
    pass uses all layers.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        micro: int = 1,
        spoil: Spoil = lambda step, rank, y: y,
        sides: Sides = lambda step, rank: True,
        **ddp: Any,
    ):
        self.sizes, self.micro, self.spoil, self.sides, self.ddp = sizes, micro, spoil, sides, ddp

    def train(
        self, model: nn.Module, optimizer: KFAC, shares: Sequence[int], steps: range, call: Any = None
    ) -> None:
        """All ``shares``, one after the other, before each step.

        The loss is the mean over the whole batch, whatever the sizes: what DDP averages is scaled to that.
        """
        call = model if call is None else call
        averaged = len(self.sizes) // len(shares)  # by DDP, over as many processes
        for step in steps:
            optimizer.zero_grad()
            for i in shares:
                x, y = share(step, i, self.sizes)
                waits = i != shares[-1] and isinstance(call, DistributedDataParallel)
                with call.no_sync() if waits else nullcontext():
                    output = call(x, self.sides(step, i))
                    optimizer.update_curvature(output, labels=self.spoil(step, i, y))
                    (averaged * (output - y).square().sum() / sum(self.sizes)).backward()
            optimizer.step()

    def alone(self, kind: str, steps: int = STEPS) -> tuple[nn.Module, KFAC]:
        model = Network()
        optimizer = make(kind, model)
        self.train(model, optimizer, range(len(self.sizes)), range(steps))
        return model, optimizer

    def in_process(self, kind: str, rank: int, steps: int = STEPS) -> tuple[nn.Module, KFAC]:
        model = Network()
        optimizer = make(kind, model)
        shares = range(self.micro * rank, self.micro * (rank + 1))
        ddp = DistributedDataParallel(model, **self.ddp)
        self.train(model, optimizer, shares, range(steps), ddp)
        return model, optimizer


def nan_on_second(step: int, rank: int, y: Tensor) -> Tensor:
    return torch.full_like(y, torch.nan) if (step, rank) == (2, 1) else y


def nowhere_then_first(step: int, rank: int) -> bool:
    return step >= 1 and rank == 0


CASES = {
    "equal": Case([6, 6]),
    "unequal": Case([3, 9], gradient_as_bucket_view=True),
    "static graph": Case([6, 6], static_graph=True),
    "micro-batches": Case([2, 4, 3, 3], micro=2),
    "not finite": Case([6, 6], spoil=nan_on_second),
    "not finite anywhere": Case([6, 6], spoil=lambda step, rank, y: y * (torch.nan if step == 2 else 1)),
    "unseen on one": Case([4, 8], sides=nowhere_then_first, find_unused_parameters=True),
    "empty": Case([12, 0]),
}
FOUR = {"four": Case([3, 3, 3, 3]), "four unequal": Case([1, 2, 3, 6])}


def run(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returns in each of ``world`` processes; it must be a function of a module."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (world, folder, work), nprocs=world)  # pyright: ignore
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


def _process(rank: int, world: int, folder: str, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(work(rank), Path(folder, str(rank)))
    dist.destroy_process_group()
