"""Fine-tuning: a frozen body, whose layers are not given to the optimizer and cost nothing.

A layer that is frozen only later may be given: it is skipped while its weight does not require a gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kfac2 import KFAC


def main() -> list[float]:
    """Train the head of a body that knows the task's features; returns the loss of each step."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    body = nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
    )  # as if it were pretrained
    head = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
    model = nn.Sequential(body, head)
    y = (x @ torch.randn(8, 3)).argmax(1)

    body.requires_grad_(False).eval()  # no dropout in it, and no running statistics of a batch norm
    optimizer = KFAC(model, lr=0.1, params=head.parameters())
    losses = []
    for _ in range(3):
        for inputs, labels in zip(x.split(32), y.split(32), strict=True):
            optimizer.zero_grad()
            output = model(inputs)
            optimizer.update_curvature(output)
            loss = F.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
