"""Speed of the optimizers on small transformers, beside SGD, AdamW and second-order peers.

``python -m benchmarks.transformers [seconds] [gpt|vit]`` prints a Markdown table for each, or one, on random data.
One process, one thread; a round on the GPT takes minutes.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import peak_allocated
from benchmarks.peers import PEERS, SGD_OPTIONS, Maker, Task, available
from benchmarks.timing import interleave, machine, markdown_table
from kfac2 import KFAC, TwoLevelKFAC

DEPTH, HEADS, CLASSES = 4, 4, 10
WORDS, TOKENS, SEQUENCES, GPT_WIDTH = 256, 128, 16, 256
SIDE, PATCH, IMAGES, VIT_WIDTH = 32, 4, 32, 128
KINDS = ("ordinary", "factor", "inverse")


class Block(nn.Module):
    """Attention and a network of two layers, each behind a norm and beside a skip."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            self.queries_keys_values(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(*heads.unbind(), is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.network(self.norms[1](x))


class GPT(nn.Module):
    """Tokens ``(B, T)`` to the next ones' logits ``(B, T, words)``."""

    def __init__(self, width: int = GPT_WIDTH):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Parameter(torch.zeros(TOKENS, width))
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Images ``(B, 3, H, W)`` to logits ``(B, classes)``, from the mean over patches."""

    def __init__(self, width: int = VIT_WIDTH):
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.positions = nn.Parameter(torch.zeros((SIDE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Over samples and positions; the classes stand last."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def tasks() -> dict[str, tuple[Task, str]]:
    """The networks, and what they are in words."""
    rows = partial(torch.flatten, start_dim=0, end_dim=-2)
    intervals: dict[str, Any] = {"factor_interval": 2, "inverse_interval": 4}
    tokens = torch.randint(WORDS, (SEQUENCES, TOKENS + 1))
    gpt = Task(
        GPT,
        [(tokens[:, :-1], tokens[:, 1:])],
        cross_entropy,
        rows,
        loss_average="batch+sequence",
        **intervals,
    )
    images = torch.randn(IMAGES, 3, SIDE, SIDE), torch.randint(CLASSES, (IMAGES,))
    vit = Task(ViT, [images], cross_entropy, rows, **intervals)
    return {
        "gpt": (gpt, f"GPT, {DEPTH} layers of width {GPT_WIDTH}, batch {SEQUENCES} × {TOKENS} tokens"),
        "vit": (
            vit,
            f"ViT, {DEPTH} layers of width {VIT_WIDTH}, batch {IMAGES} × {(SIDE // PATCH) ** 2} patches",
        ),
    }


def makers(task: Task) -> dict[str, Maker]:
    """SGD and AdamW first, K-FAC with the settings that a refresh's cost depends on, and the peers."""
    intervals: dict[str, Any] = {
        "factor_interval": task.factor_interval,
        "inverse_interval": task.inverse_interval,
    }
    first: dict[str, Callable[[nn.Module], Any]] = {
        "SGD": lambda model: torch.optim.SGD(model.parameters(), fused=True, **SGD_OPTIONS),
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    }
    options = SGD_OPTIONS | intervals | {"class_dim": -1}
    second: dict[str, Callable[[nn.Module], KFAC]] = {
        "KFAC, eigen": partial(KFAC, **options),
        "KFAC, tikhonov": partial(KFAC, inverse="tikhonov", **options),
        "TwoLevelKFAC, eigen": partial(TwoLevelKFAC, **options),
    }
    return {
        **{name: partial(task.contender, name, of) for name, of in first.items()},
        **{name: partial(task.contender, name, of, **intervals) for name, of in second.items()},
        **{name: partial(of, task) for name, of in PEERS.items()},
    }


def peak_memory(make: Maker, task: Task) -> float:
    """MiB at the peak from the making of the network until all has been refreshed twice, all that persists included."""
    return peak_allocated(lambda: make().run(task.inverse_interval))


def main(seconds: str = "600", *names: str) -> None:
    torch.set_num_threads(1)
    for name, (task, words) in tasks().items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        found = available(makers(task), task.inverse_interval)
        rounds = interleave([row for _, row in found], float(seconds), steps=task.inverse_interval)
        load = os.getloadavg()[0]
        print(f"{words}; {machine()}, load {load:.0f}; medians of {rounds} rounds\n")
        peaks = [peak_memory(make, task) for make, _ in found]
        adam = found[1][1].amortised
        columns = (
            "ordinary",
            "factor refresh",
            "inverse refresh",
            "amortised",
            "/ AdamW",
            "peak memory / SGD's",
        )
        table = [
            [
                row.name,
                *(row.median(kind) for kind in KINDS),
                row.amortised,
                row.amortised / adam,
                peak / peaks[0],
            ]
            for (_, row), peak in zip(found, peaks, strict=True)
        ]
        print(markdown_table(("ms per step", *columns), table) + "\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
