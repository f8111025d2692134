"""The small ViT, whole and without each of its parts."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.problems import Cifar10, CifarViT
from experiments.problems.vit import HEADS, TOKENS, FixedMixing, ViT
from kfac2 import TwoLevelKFAC
from tests.problems.cifar_files import write_parquet

WHOLE = {"residual": True, "layer_norm": True, "attention": True}


def vit(seed: int = 0, **parts: bool) -> ViT:
    return ViT(**(WHOLE | parts), generator=torch.Generator().manual_seed(seed), blocks=2)


def images(number: int = 4) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "parts", [dict(zip(WHOLE, on, strict=True)) for on in product([True, False], repeat=3)]
)
def test_two_levels_train_every_kind(parts: dict[str, bool]) -> None:
    model, x, y = vit(**parts), images(), torch.arange(4)
    options: dict[str, Any] = {"coarse_damping": "consistent", "factor_interval": 2, "inverse_interval": 4}
    optimizer = TwoLevelKFAC(model, 1e-2, damping=1e-1, **options)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        output = model(x)
        assert output.shape == (4, 10)
        optimizer.update_curvature(output)
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plain = {line.parameter for line in optimizer.coverage if not line.preconditioned}
    assert all("norm" in name or name == "places" or "parts" in name for name in plain)
    assert all(line.preconditioned for line in optimizer.coverage if "queries" in line.parameter)


def test_each_part_changes_the_function_and_its_kind() -> None:
    outputs = [vit(**{part: False})(images()) for part in WHOLE] + [vit()(images())]
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])
    assert not any(isinstance(module, nn.LayerNorm) for module in vit(layer_norm=False).modules())


def test_mixing_is_attention_with_fixed_weights() -> None:
    """Of values alone: linear in its input, each token a mean of the others."""
    mixing = next(module for module in vit(attention=False).modules() if isinstance(module, FixedMixing))
    weights = mixing.weights
    assert weights.shape == (HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(HEADS, TOKENS))
    x, y = torch.randn(2, TOKENS, 64), torch.randn(2, TOKENS, 64)
    torch.testing.assert_close(mixing(x) + mixing(y) - mixing(0 * x), mixing(x + y), atol=1e-5, rtol=1e-4)


def test_a_seed_gives_the_whole_problem(tmp_path: Path) -> None:
    write_parquet(tmp_path, train=40, test=20)
    one, same, other = (
        CifarViT([seed], train_samples=30, test_samples=10, data=Cifar10(path=str(tmp_path)))
        for seed in (0, 0, 1)
    )
    assert all(
        torch.equal(p, q) for p, q in zip(one.model.parameters(), same.model.parameters(), strict=True)
    )
    assert not torch.equal(*(problem.model.get_parameter("places") for problem in (one, other)))
    (x, y), (same_x, _) = (next(iter(problem.train_batches(8))) for problem in (one, same))
    assert torch.equal(x, same_x)
    assert one.losses(one.model(x), y).shape == (1,)
