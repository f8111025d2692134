"""Training loss of small transformers at equal steps and at equal seconds, each optimizer at the best of a grid.

``python -m benchmarks.losses [steps] [gpt|vit]`` prints a Markdown table for each, or one, in a quarter of an hour. The
GPT reads the bytes of the documentation that comes with Python, the ViT sees CIFAR-10. One process, one thread.

The grid is one of rates; of K-FAC one of κ at the rate of 0.1, because clipping sets the length of its steps.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from math import inf, isfinite
from pydoc_data import topics
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers import Task
from benchmarks.timing import machine, markdown_table
from benchmarks.transformers import GPT, IMAGES, SEQUENCES, TOKENS, ViT, cross_entropy
from experiments.problems.cifar10 import Cifar10
from kfac2 import KFAC, TwoLevelKFAC

WIDTH = 64
RATES = 0.01, 0.03, 0.1, 0.3
ADAM_RATES = 3e-4, 1e-3, 3e-3, 1e-2
KL_CLIPS = 1e-6, 1e-5, 1e-4, 1e-3
SMOOTHED = 20
"""The loss of so many steps is averaged: each batch is new to the network, so that their noise is what is left."""
INTERVALS = {"factor_interval": 10, "inverse_interval": 100}


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)


def soap(model: nn.Module, lr: float) -> Any:
    from pytorch_optimizer import SOAP  # pyright: ignore[reportMissingImports]

    return SOAP(model.parameters(), lr=lr, precondition_frequency=INTERVALS["factor_interval"])


def kfac(model: nn.Module, kl_clip: float, kind: Callable[..., KFAC] = KFAC) -> KFAC:
    """What has no block is AdamW's."""
    rest = partial(torch.optim.AdamW, lr=1e-3)
    return kind(model, 0.1, kl_clip=kl_clip, weight_decay=0.0, class_dim=-1, rest=rest, **INTERVALS)


ADVISED = partial(TwoLevelKFAC, coarse_damping="consistent", coarse_max_ratio=1.0)
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module, float], Any], tuple[float, ...], dict[str, int]]] = {
    "SGD": (sgd, RATES, {}),
    "AdamW": (adam, ADAM_RATES, {}),
    "KFAC, eigen": (kfac, KL_CLIPS, INTERVALS),
    "KFAC, tikhonov": (partial(kfac, kind=partial(KFAC, inverse="tikhonov")), KL_CLIPS, INTERVALS),
    "TwoLevelKFAC as advised": (partial(kfac, kind=ADVISED), KL_CLIPS, INTERVALS),
    "SOAP": (soap, ADAM_RATES, {"factor_interval": INTERVALS["factor_interval"]}),
}


class Training(NamedTuple):
    setting: float
    losses: list[float]
    """Of each step's batch."""
    seconds: float
    """Per step, from the medians of its kinds, amortised at the intervals."""

    def loss_at(self, seconds: float | None = None, steps: int | None = None) -> float:
        """The mean of the latest steps at that time, or after so many steps."""
        end = steps if steps is not None else int((seconds or 0) / self.seconds)
        return mean(self.losses[max(0, end - SMOOTHED) : end])


def text(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of runs of bytes and of the bytes that follow."""
    data = torch.tensor(list("\n".join(topics.topics.values()).encode()))
    starts = torch.randint(len(data) - TOKENS, (steps, SEQUENCES, 1))
    runs = data[starts + torch.arange(TOKENS + 1)]
    return [(run[:, :-1], run[:, 1:]) for run in runs]


def images(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of images of about unit variance, each image once."""
    split, _ = Cifar10().load(train_samples=steps * IMAGES, test_samples=1)
    x = split.images.float().div(64).sub(2)
    return list(zip(x.split(IMAGES), split.labels.split(IMAGES), strict=True))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[tuple[Tensor, Tensor]]], str]] = {
    "gpt": (partial(GPT, WIDTH), text, f"GPT of width {WIDTH}, {SEQUENCES} × {TOKENS} bytes a step"),
    "vit": (partial(ViT, WIDTH), images, f"ViT of width {WIDTH}, {IMAGES} images of CIFAR-10 a step"),
}


def train(name: str, setting: float, build: Callable[[], nn.Module], batches: list[Any]) -> Training:
    """One training; not a number once it is."""
    optimizer_of, _, intervals = OPTIMIZERS[name]
    losses: list[float] = []

    def recorded(output: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(output, labels)
        losses.append(loss.item())
        return loss

    torch.manual_seed(0)
    task = Task(build, batches, recorded, class_logits=torch.flatten)
    loop = task.contender(name, lambda model: optimizer_of(model, setting), **intervals)
    loop.run(len(batches) - 1)  # and one before that it does not time
    return Training(setting, losses, loop.amortised / 1e3)


def best(trainings: list[Training], **at: Any) -> Training:
    losses = [training.loss_at(**at) for training in trainings]
    return min(zip(losses, trainings, strict=True), key=lambda pair: pair[0] if isfinite(pair[0]) else inf)[1]


def table(trainings: dict[str, list[Training]], steps: int) -> str:
    """The settings that are best at the last step, and at the time at which SGD has made it."""
    seconds = steps * median(training.seconds for training in trainings["SGD"])
    header = ["loss", "best of grid"]
    header += [f"{steps // 3} steps", f"{steps} steps"]
    header += ["best of grid", f"{seconds / 3:.1f} s", f"{seconds:.1f} s", "ms per step"]
    rows = []
    for name, own in trainings.items():
        by_steps, by_time = best(own, steps=steps), best(own, seconds=seconds)
        row = [by_steps.loss_at(steps=steps // 3), by_steps.loss_at(steps=steps), f"{by_time.setting:g}"]
        row += [by_time.loss_at(seconds=seconds / 3), by_time.loss_at(seconds=seconds)]
        rows.append([name, f"{by_steps.setting:g}", *row, 1e3 * median(training.seconds for training in own)])
    return markdown_table(header, rows)


def main(steps: str = "200", *names: str) -> None:
    torch.set_num_threads(1)
    for network in names or NETWORKS:
        build, batches_of, words = NETWORKS[network]
        torch.manual_seed(0)
        batches = batches_of(int(steps))
        trainings: dict[str, list[Training]] = {}
        for name, (_, grid, _) in OPTIMIZERS.items():
            try:
                trainings[name] = [train(name, setting, build, batches) for setting in grid]
            except ImportError as error:
                print(f"{name} skipped: {error!r}\n")
        print(f"{words}; {machine()}, load {os.getloadavg()[0]:.0f}\n")
        print(table(trainings, int(steps)) + "\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
