"""Layers too large for a full factor: only its diagonal is kept, and the rest is as ever."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC
from kfac2.curvature.diagonal import is_diagonal
from kfac2.curvature.moments import second_moment
from tests.optim.loop import (
    INVERSES,
    assert_close,
    batch,
    build,
    each_inverse,
    each_optimizer,
    grad,
    network,
    replicated,
    same,
    seeds,
    train,
    train_replicas,
)
from tests.optim.test_state import through_a_file

STEP: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "kl_clip": None}


def one_step(model: nn.Module, x: Tensor, y: Tensor, kind: type[KFAC] = KFAC, **options: Any) -> KFAC:
    optimizer = build(kind, model, **(STEP | options))
    output = model(x)
    optimizer.update_curvature(output, labels=y)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    return optimizer


def full_factors(optimizer: KFAC, limit: int | None) -> list[dict[str, Tensor]]:
    """Of each layer A and G in float64, of a large one with zeros off the diagonal; from full ones."""
    states = optimizer.state_dict()["preconditioner"]["layers"].values()
    return [
        {key: x if limit is None or x.shape[-1] <= limit else x * torch.eye(x.shape[-1]) for key, x in both}
        for both in ([(key, state[key][0]) for key in ("a", "g")] for state in states)
    ]


def dense_update(factors: dict[str, Tensor], gradient: Tensor, inverse: str, damping: float = 1e-2) -> Tensor:
    """The damped block as one matrix."""
    a, g = factors["a"], factors["g"]
    eye_a, eye_g = (torch.eye(len(x), dtype=x.dtype) for x in (a, g))
    if inverse == "eigen":
        block = torch.kron(g, a) + damping * torch.eye(len(a) * len(g), dtype=a.dtype)
    else:
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        root = damping**0.5
        block = torch.kron(g + root / pi * eye_g, a + root * pi * eye_a)
    return torch.linalg.solve(block, gradient.flatten()).view_as(gradient)


def pixels() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, bias=False)).double()
    return model, torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.arange(8) % 3


def tokens() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)).double()
    return model, torch.randn(8, 5, 4, dtype=torch.float64), torch.arange(8) % 3


@each_inverse
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("limit", [None, 8, 5, 1])
@pytest.mark.parametrize("make", [pixels, tokens], ids=["pixels", "tokens"])
def test_an_update_is_that_of_the_dense_block(
    make: Any, limit: int | None, sharing: str, inverse: str
) -> None:
    model, x, y = make()
    options: dict[str, Any] = {"weight_sharing": sharing, "inverse": inverse}
    factors = full_factors(one_step(make()[0], x, y, max_factor_dim=None, **options), limit)
    before = [p.detach().clone() for p in model.parameters()]
    one_step(model, x, y, max_factor_dim=limit, **options)
    moved = iter([old - p.detach() for old, p in zip(before, model.parameters(), strict=True)])
    for layer, own in zip((model[0], model[3]), factors, strict=True):
        columns = [p.flatten(1) if p.dim() > 1 else p[:, None] for p in map(grad, layer.parameters())]
        update = torch.cat([part.view_as(c) for c, part in zip(columns, moved, strict=False)], dim=1)
        torch.testing.assert_close(update, dense_update(own, torch.cat(columns, dim=1), inverse))


def test_an_adapter_that_knows_no_diagonal_is_cut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tokens()[0] for _ in range(2)]
    _, x, y = tokens()
    one_step(models[0], x, y, max_factor_dim=5)
    monkeypatch.setattr(
        "kfac2.optim.layers.linear.second_moment",
        lambda columns, diagonal, with_one=False: second_moment(columns, False, with_one),
    )
    optimizer = one_step(models[1], x, y, max_factor_dim=5)
    assert all(
        is_diagonal(stack.blocks.g) or stack.blocks.g.shape[-1] <= 5
        for stack in optimizer.preconditioner.stacks
    )
    assert_close(models[0], models[1])


@each_inverse
def test_the_coarse_correction_is_that_of_full_factors(inverse: str) -> None:
    updates = {}
    for limit in (None, 4):
        for kind in (KFAC, TwoLevelKFAC):
            model = network()
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            one_step(model, *batch(0), kind=kind, max_factor_dim=limit, inverse=inverse)
            updates[limit, kind] = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    corrections = [updates[limit, TwoLevelKFAC] - updates[limit, KFAC] for limit in (None, 4)]
    torch.testing.assert_close(*corrections)
    assert not torch.allclose(updates[None, KFAC], updates[4, KFAC])


@each_optimizer
def test_replicas_train_as_they_would_alone(kind: type[KFAC]) -> None:
    model = replicated()
    train_replicas(model, build(kind, model, generator=seeds(), max_factor_dim=4), 2 * INVERSES)
    alone = replicated(1)
    generator = torch.Generator().manual_seed(100)
    train_replicas(
        alone, build(kind, alone, generator=[generator], max_factor_dim=4), 2 * INVERSES, which=slice(1)
    )
    for together, one in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(together[:1], one)


@each_optimizer
@each_inverse
def test_save_load_continue_is_bit_identical(kind: type[KFAC], inverse: str) -> None:
    model, fresh = network(), network(seed=1)
    options = {"max_factor_dim": 3, "inverse": inverse}
    optimizer, other = build(kind, model, **options), build(kind, fresh, **options)
    train(model, optimizer, 3)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, its_optimizer in ((model, optimizer), (fresh, other)):
        train(one, its_optimizer, 2 * INVERSES, first=3)
    assert same(model, fresh)
    with pytest.raises(ValueError, match="its a is"):
        build(kind, network(), inverse=inverse).load_state_dict(optimizer.state_dict())


def test_coverage_names_the_sides() -> None:
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3, bias=False))
    lines = {line.parameter: line.reason for line in build(KFAC, model, max_factor_dim=10).coverage}
    block = "Kronecker-factored block of a Linear"
    assert (
        lines["0.weight"] == lines["0.bias"] == f"{block}, only the diagonal of its output factor (20 rows)"
    )
    assert lines["1.weight"] == f"{block}, only the diagonal of its input factor (20 rows)"
    assert not any("diagonal" in line.reason for line in build(KFAC, model).coverage)


@pytest.mark.parametrize("limit", [0, -1, 2.5, "8192"])
def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_factor_dim must be a positive integer"):
        build(KFAC, network(), max_factor_dim=limit)


@pytest.mark.slow
@each_inverse
@each_optimizer
def test_a_head_over_a_vocabulary_trains(kind: type[KFAC], inverse: str) -> None:
    vocabulary, width, length = 50_257, 64, 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))
    options = {"class_dim": -1, "inverse": inverse, "lr": 0.3, "kl_clip": 1e-1}
    optimizer = build(kind, model, **options)
    assert optimizer.preconditioner.memory() < 2**24
    x = torch.randint(vocabulary, (8, length))
    losses = []
    for _ in range(2 * INVERSES):
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)
        loss = F.cross_entropy(output.flatten(0, 1), x.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert any("50,257 rows" in line.reason for line in optimizer.coverage)
