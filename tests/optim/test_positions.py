"""Outputs with positions: tokens and pixels, of which some may not count."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kfac2 import KFAC
from tests.optim import loop
from tests.optim.loop import CLASSES, INPUTS, build, each_optimizer, network


class Positions(nn.Module):
    """A network on every position; outputs as the optimizer is told they are."""

    def __init__(self, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.arrange = network(), arrange
        self.net[1] = nn.Identity()  # a batch norm would want rows

    def forward(self, x: Tensor) -> Tensor:
        return self.arrange(self.net(x))


def positions_trained(arrange: Callable[[Tensor], Tensor], data: Tensor, **options: Any) -> Positions:
    model = Positions(arrange)
    optimizer = build(KFAC, model, **options)
    for step in range(4):
        y = torch.randint(CLASSES, (24,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        output = model(data)
        optimizer.update_curvature(output)
        rows = output.flatten(2).mT if output.dim() == 4 else output
        F.cross_entropy(rows.reshape(24, CLASSES), y).backward()
        optimizer.step()
    return model


def test_one_level_on_tokens_or_pixels_is_one_level_on_their_rows() -> None:
    data = torch.randn(4, 6, INPUTS, generator=torch.Generator().manual_seed(0)).double()
    rows = positions_trained(lambda x: x, data.flatten(0, 1))
    tokens = positions_trained(lambda x: x, data, class_dim=-1)
    pixels = positions_trained(lambda x: x.mT.unflatten(-1, (2, 3)), data, class_dim=1)
    loop.assert_close(tokens, rows)
    loop.assert_close(pixels, rows)


def factors_of(optimizer: KFAC) -> list[Tensor]:
    return [
        factor for stack in optimizer.preconditioner.stacks for factor in (stack.blocks.g, stack.blocks.a)
    ]


def test_positions_that_do_not_count_leave_the_factors_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(4, 6, INPUTS, generator=generator).double()
    mask = torch.rand(4, 6, generator=generator) < 0.6
    factors = []
    for inputs, counts in ((data, mask), (data.masked_fill(~mask[..., None], 7.0), mask), (data[mask], None)):
        model = Positions(lambda x: x)
        optimizer = build(KFAC, model, class_dim=-1)
        output = model(inputs)
        labels = torch.zeros(data.shape[:-1], dtype=torch.int64)  # not drawn: the draws differ in number
        labels = labels if counts is not None else labels[mask]
        optimizer.update_curvature(output, labels=labels, mask=counts)
        output.sum().backward()
        optimizer.step()
        factors.append(factors_of(optimizer))
    for other in factors[1:]:
        assert_close(other, factors[0], rtol=1e-12, atol=1e-14)


class LanguageModel(nn.Module):
    """A causal transformer of one block, ``(B, T) -> (B, T, words)``."""

    def __init__(self, words: int = 11, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(words, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        split = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norms[1](x)))


class UNet(nn.Module):
    """Two resolutions and a skip connection, ``(B, 3, H, W) -> (B, classes, H, W)``."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(16, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x).relu()
        deep = self.deep(F.max_pool2d(fine, 2)).relu()
        return self.up(torch.cat([fine, F.interpolate(deep, scale_factor=2)], dim=1))


def next_words() -> tuple[Tensor, Tensor]:
    """Sequences that count up, of different lengths; what follows a sequence's end is ignored."""
    tokens = (torch.arange(9) + torch.arange(8)[:, None]) % 11
    lengths = torch.arange(8)[:, None] % 4 + 5
    targets = tokens[:, 1:].masked_fill(torch.arange(8) >= lengths, -100)
    return tokens[:, :-1], targets


def test_padded_sequences_have_the_factors_of_sequences_of_their_own_lengths() -> None:
    tokens, targets = next_words()
    lengths = (targets != -100).sum(1).tolist()
    assert len(set(lengths)) > 1
    alone = [(x[None, :n], y[None, :n]) for x, y, n in zip(tokens, targets, lengths, strict=True)]
    factors = []
    for batches in ([(tokens, targets)], alone):
        torch.manual_seed(0)
        model, criterion = LanguageModel().double(), nn.CrossEntropyLoss(reduction="sum")
        optimizer = build(KFAC, model, likelihood=criterion, class_dim=-1, factor_dtype=torch.float64)
        for x, y in batches:
            output = model(x)
            optimizer.update_curvature(output, labels=y)
            criterion(output.flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        factors.append(factors_of(optimizer))
    # Batches that add up are those of the mean of their losses, here of sums.
    factors[1][::2] = [len(alone) * g for g in factors[1][::2]]
    assert_close(*factors, rtol=1e-12, atol=1e-14)


def test_whoever_says_nothing_of_ignored_positions_is_told_once() -> None:
    (x, y), model = next_words(), LanguageModel()
    for told in ({"targets": y}, {"labels": y}, {"mask": y != -100}):
        with warnings.catch_warnings(action="error"):
            build(KFAC, model, class_dim=-1).update_curvature(model(x), **told)
    optimizer = build(KFAC, model, class_dim=-1, factor_interval=1)
    with pytest.warns(RuntimeWarning, match="labels of -100 are ignored.*targets=y.*mask="):
        optimizer.update_curvature(model(x))
    with warnings.catch_warnings(action="error"):
        model(x).sum().backward()
        optimizer.step()
        optimizer.update_curvature(model(x))


def brightest_channel() -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, x.argmax(1)


@each_optimizer
@pytest.mark.parametrize(
    ("make", "data", "class_dim"),
    [(LanguageModel, next_words, -1), (UNet, brightest_channel, 1)],
    ids=["language model", "u-net"],
)
def test_tokens_and_pixels_train(
    kind: type[KFAC], make: type[nn.Module], data: Callable[[], tuple[Tensor, Tensor]], class_dim: int
) -> None:
    torch.manual_seed(0)
    model, criterion = make(), nn.CrossEntropyLoss()
    optimizer = build(kind, model, likelihood=criterion, class_dim=class_dim, kl_clip=1e-3)
    (x, targets), losses = data(), []
    for _ in range(20):
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output, targets=targets)
        loss = criterion(output.movedim(class_dim, 1), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
