"""Training under bfloat16 autocast beside float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC

STEPS = 20
TOLERANCE = 0.01
"""Of the first training loss; bfloat16 has three digits."""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def losses(kind: type[KFAC], inverse: str, device: str, autocast: bool) -> tuple[Tensor, KFAC]:
    """Training losses; the curvature's labels are the data's, so that both see the same ones."""
    model = network().to(device)
    optimizer = kind(model, 0.05, factor_interval=2, inverse_interval=4, inverse=inverse, damping=1e-2)
    x, y = torch.randn(32, 2, 6, 6).to(device), torch.arange(32, device=device) % 3
    x += 0.5 * y[:, None, None, None]
    values = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = model(x)
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        optimizer.update_curvature(output, labels=y)
        loss = F.cross_entropy(output.float(), y)
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values).cpu(), optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inverse", ["eigen", "tikhonov"])
@pytest.mark.parametrize("kind", [KFAC, TwoLevelKFAC])
def test_autocast_follows_float32(kind: type[KFAC], inverse: str, device: str) -> None:
    single, _ = losses(kind, inverse, device, autocast=False)
    mixed, optimizer = losses(kind, inverse, device, autocast=True)
    assert single[-1] < 0.5 * single[0]
    assert not torch.equal(mixed, single)
    assert (mixed - single).abs().max() < TOLERANCE * single[0]
    remembered = optimizer.state_dict()["preconditioner"]
    assert all(dtype in (torch.float32, torch.float64) for dtype in floating_types(remembered))


def floating_types(state: object) -> set[torch.dtype]:
    if isinstance(state, Tensor):
        return {state.dtype} if state.is_floating_point() else set()
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return set().union(*map(floating_types, children))
