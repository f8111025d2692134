"""Twenty steps with the optimizer's defaults, as one would try it on a model from a library."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC

CLASSES, BATCH, STEPS = 5, 8, 20
OPTIMIZERS: dict[str, Callable[..., KFAC]] = {
    "one level": KFAC,
    "two levels": TwoLevelKFAC,
    "two levels as advised": partial(TwoLevelKFAC, coarse_damping="consistent", coarse_max_ratio=1.0),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def check_training(
    optimizer: str,
    build: Callable[[], nn.Module],
    draw: Callable[[], Tensor],
    share: float,
    labels_of: Callable[[Tensor], Tensor] = lambda inputs: torch.randint(CLASSES, (BATCH,)),
    class_dim: int = 1,
    **options: Any,
) -> None:
    """Train on one batch of random inputs, and labels of their own unless said: finite, decreasing, nothing rejected.

    ``share`` is the least share of the model's parameters that must be preconditioned. The paper's two levels
    may leap outside its experiments, which their docstring says, so that only finite is asked of them.
    """
    torch.manual_seed(0)
    model, inputs = build(), draw()
    labels = labels_of(inputs)
    generator = torch.Generator().manual_seed(0)
    kfac = OPTIMIZERS[optimizer](model, generator=generator, class_dim=class_dim, **options)
    losses = []
    for _ in range(STEPS):
        kfac.zero_grad()
        output = model(inputs)
        output = getattr(output, "logits", output)
        kfac.update_curvature(output, targets=labels)
        loss = F.cross_entropy(output.movedim(class_dim, 1), labels)
        loss.backward()
        kfac.step()
        losses.append(float(loss.detach()))

    assert torch.tensor(losses).isfinite().all()
    if optimizer != "two levels":
        assert losses[-1] < 0.5 * losses[0]
    assert kfac.rejected_samples == kfac.failed_inverses == 0
    covered = {line.parameter for line in kfac.coverage if line.preconditioned}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes[name] for name in covered) >= share * sum(sizes.values())
