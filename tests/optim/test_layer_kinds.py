"""Every kind of layer against the literal twin of the linear layers it stands for, in float64."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac2 import KFAC
from kfac2.optim.layers import ADAPTERS
from tests.optim.test_trajectories import (
    LEVELS,
    clip_between,
    close,
    each_inverse,
    each_level,
    name_in,
    options_for,
    parameters,
)
from tests.reference.precision import float64
from tests.reference.problems import GAUSSIAN, real_step
from tests.reference.unfolded import Convolution, Transposed, Unfoldable, Unfolded

STEPS = 6


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def follows_its_twin(level: str, network: nn.Sequential, sample: tuple[int, ...], **changes: Any) -> KFAC:
    """The optimizer on the network, the literal one on the network spelled out."""
    real_type, twin_type, extra = LEVELS[level]
    batches = GAUSSIAN.batches(STEPS, size=4, sample=sample)
    network(batches[0].inputs)  # which gives lazy layers their shapes
    model, spelled_out = deepcopy(network), Unfoldable(network)
    options = options_for(GAUSSIAN, lr=1e-3, **extra | changes)
    optimizer = real_type(model, **options)
    if level != "one":
        options["outside_coarse"] = grouped(spelled_out)
    kl_clip = clip_between(twin_type, spelled_out, batches[0], options)
    options["kl_clip"] = kl_clip
    twin = twin_type(spelled_out, **options)
    for group in optimizer.param_groups:
        group["kl_clip"] = kl_clip
    for batch in batches:
        real_step(optimizer, model, [batch])
        twin.step(batch.inputs, batch.labels, batch.loss)
        expected = spelled_out.named_values()
        for name, value in parameters(model).items():
            close(value, expected[name], msg=name_in(name))
    assert min(twin.clips) < 1 == max(twin.clips)
    assert all(line.preconditioned for line in optimizer.coverage)
    return optimizer


def grouped(model: nn.Module) -> list[str]:
    """Linear layers that are one of several groups."""
    return [
        f"{name}.groups.{group}"
        for name, module in model.named_modules()
        if isinstance(module, Unfolded) and len(module.groups) > 1
        for group in range(len(module.groups))
    ]


def convolutions() -> dict[str, tuple[list[Convolution | Transposed], tuple[int, ...]]]:
    """Layers, and the shape of a sample."""
    return {
        "1d": ([nn.Conv1d(2, 2, 3, padding=2, dilation=2), nn.Conv1d(2, 3, 3, stride=2, bias=False)], (2, 9)),
        "3d": ([nn.Conv3d(2, 2, (2, 3, 1), padding=(0, 1, 1)), nn.Conv3d(2, 3, 2, stride=2)], (2, 4, 3, 4)),
        "depthwise-1d": ([nn.Conv1d(3, 3, 3, groups=3), nn.Conv1d(3, 3, 3, groups=3)], (3, 8)),
        "depthwise-2d": (
            [nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), nn.Conv2d(3, 6, 2, stride=2, groups=3)],
            (3, 6, 4),
        ),
        "grouped-2d": ([nn.Conv2d(4, 6, (1, 3), groups=2), nn.Conv2d(6, 4, 2, dilation=2)], (4, 5, 6)),
        "transposed-1d": (
            [nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), nn.ConvTranspose1d(3, 2, 2, bias=False)],
            (2, 4),
        ),
        "transposed-2d": (
            [nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), output_padding=1), nn.Conv2d(3, 2, 3, stride=3)],
            (2, 3, 3),
        ),
        "transposed-3d": (
            [nn.ConvTranspose3d(2, 2, 2, dilation=(1, 2, 1)), nn.ConvTranspose3d(2, 2, 1, padding=1)],
            (2, 3, 2, 3),
        ),
        "transposed-grouped": (
            [nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.ConvTranspose2d(6, 3, 1, groups=3)],
            (4, 2, 3),
        ),
        "grouped-3d": ([nn.Conv3d(4, 2, 2, groups=2), nn.Conv3d(2, 2, 1)], (4, 3, 3, 3)),
    }


@each_level
@each_inverse
@pytest.mark.parametrize("kind", convolutions())
def test_convolutions_follow_the_twin(level: str, inverse: str, kind: str) -> None:
    (one, two), sample = convolutions()[kind]
    network = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    optimizer = follows_its_twin(level, network, sample, inverse=inverse)
    outside = {line.parameter for line in optimizer.coverage if "outside the coarse space" in line.reason}
    groups = {f"{name}.weight" for name, layer in (("0", one), ("2", two)) if layer.groups > 1}
    assert {name for name in outside if name.endswith("weight")} == (groups if level != "one" else set())


def test_a_transposed_convolution_may_be_told_its_output_size() -> None:
    """An output size is an output padding that comes with the call."""

    class Asking(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            layer = self[0]
            assert isinstance(layer, nn.ConvTranspose1d)
            return self[1](layer(input, output_size=[8]).flatten(1))

    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.ConvTranspose1d(2, 1, 3, stride=2, padding=1, output_padding=1), nn.Flatten(), nn.Linear(8, 2)
    )
    asking = Asking(nn.ConvTranspose1d(2, 1, 3, stride=2, padding=1), nn.Linear(8, 2))
    for one, other in zip(asking.parameters(), plain.parameters(), strict=True):
        one.data = other.data.clone()
    optimizers = [KFAC(model, **options_for(GAUSSIAN)) for model in (plain, asking)]
    for batch in GAUSSIAN.batches(STEPS, sample=(2, 4)):
        for optimizer, model in zip(optimizers, (plain, asking), strict=True):
            real_step(optimizer, model, [batch])
    for one, other in zip(asking.parameters(), plain.parameters(), strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", convolutions())
def test_diagonals_are_those_of_the_whole_factors(kind: str) -> None:
    (one, _), sample = convolutions()[kind]
    adapter = ADAPTERS[type(one)]("", one, one.bias is not None)
    x = torch.randn(4, *sample)
    gradients = torch.randn_like(one(x))
    whole = adapter.moments(x, gradients)
    adapter.diagonal = (True, True)
    for only, full in zip(adapter.moments(x, gradients)[:2], whole[:2], strict=True):
        close(only[:, 0], full.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", convolutions())
def test_totals_are_the_samples_own_sums(kind: str) -> None:
    """One sample's K-FAC-reduce moment is an outer product of sums, here from the spelled-out layer."""
    (one, _), sample = convolutions()[kind]
    adapter = ADAPTERS[type(one)]("", one, one.bias is not None)
    x, unfolded = torch.randn(3, *sample), Unfolded(one)
    gradients = torch.randn_like(one(x))
    a, g, positions = adapter.totals(x, gradients, axis=0)
    patches = unfolded.patches(x).flatten(1, -3)
    of_groups = torch.stack([part.flatten(-2).sum(1).T for part in patches.chunk(one.groups, dim=-2)])
    close(a[:, : of_groups.shape[1]], of_groups)
    assert positions == patches.shape[1] == gradients[0, 0].numel()
    assert (a[:, of_groups.shape[1] :] == positions).all()
    close(g.flatten(0, 1).T, gradients.flatten(2).sum(-1))


def test_a_group_that_is_not_finite_counts_as_its_layer_and_leaves_the_others_alone() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 3, 1, groups=3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    optimizer = KFAC(model, **options_for(GAUSSIAN, factor_interval=1))
    good, bad = GAUSSIAN.batches(2, sample=(3, 4))
    real_step(optimizer, model, [good])
    (before, *_) = (stack.blocks.a.clone() for stack in optimizer.preconditioner.stacks)
    bad.inputs[:, :2] = 1e200  # whose squares are infinite
    optimizer.update_curvature(model(bad.inputs))  # drawn labels: the output gradients stay finite
    with pytest.warns(RuntimeWarning, match=r"layers 0, 3\)"):
        optimizer.step()
    after = optimizer.preconditioner.stacks[0].blocks.a
    assert torch.equal(after[0, :2], before[0, :2])
    assert not torch.equal(after[0, 2], before[0, 2])
    assert optimizer.rejected_samples == 2


WORDS = 6


class OneHot(nn.Module):
    """A row for each index: one there, zero elsewhere, and zero altogether at the padding."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.one_hot(x, WORDS).to(torch.get_default_dtype())
        return rows if self.padding is None else rows * (x != self.padding)[..., None]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh().mean(1)


@each_level
@each_inverse
@pytest.mark.parametrize("padding", [None, 2], ids=["words", "with padding"])
def test_an_embedding_follows_the_linear_layer_of_one_hot_rows(
    level: str, inverse: str, padding: int | None
) -> None:
    real_type, twin_type, extra = LEVELS[level]
    options = options_for(GAUSSIAN, lr=1e-3, inverse=inverse, **extra)
    batches = [
        replace(batch, inputs=torch.randint(WORDS, (5, 4))) for batch in GAUSSIAN.batches(STEPS, size=5)
    ]
    embedding, linear = nn.Embedding(WORDS, 3, padding_idx=padding), nn.Linear(WORDS, 3, bias=False)
    linear.weight.data = embedding.weight.detach().T.clone()
    model = nn.Sequential(embedding, Mean(), nn.Linear(3, 2))
    network = nn.Sequential(OneHot(padding), linear, Mean(), deepcopy(model[2]))
    options["kl_clip"] = clip_between(twin_type, network, batches[0], options)
    optimizer = real_type(model, **options)
    if level != "one" and padding is not None:
        options["outside_coarse"] = ["1"]
    twin = twin_type(network, **options)
    for batch in batches:
        real_step(optimizer, model, [batch])
        twin.step(batch.inputs, batch.labels, batch.loss)
        for one, other in zip(model.parameters(), network.parameters(), strict=True):
            close(one, other.mT if one is embedding.weight else other)
    assert min(twin.clips) < 1
    assert all(line.preconditioned and "diagonal" not in line.reason for line in optimizer.coverage)
    if padding is not None:
        assert not embedding.weight[padding].any()


def test_an_embedding_reduces_to_the_diagonal() -> None:
    embedding = nn.Embedding(WORDS, 3, padding_idx=0)
    adapter = ADAPTERS[nn.Embedding]("", embedding, False)
    x, gradients = torch.randint(WORDS, (4, 5)), torch.randn(4, 5, 3)
    rows = OneHot(0)(x)
    for axis in (0, 1):
        a, g, positions = adapter.totals(x, gradients, axis)
        close(a, rows.sum(1 - axis).T[None])
        close(g, gradients.sum(1 - axis).T[None])
        assert positions == x.shape[1 - axis]
    optimizer = KFAC(nn.Sequential(embedding, Mean(), nn.Linear(3, 2)), weight_sharing="reduce")
    assert "only the diagonal of its input factor" in optimizer.coverage[0].reason


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=["norm", "freq", "sparse"],
)
def test_an_embedding_that_is_no_linear_layer_is_left_plain(options: dict[str, Any]) -> None:
    optimizer = KFAC(nn.Sequential(nn.Embedding(WORDS, 3, **options), nn.Linear(3, 2)))
    first, *_ = optimizer.coverage
    assert not first.preconditioned
    assert next(iter(options)) in first.reason
