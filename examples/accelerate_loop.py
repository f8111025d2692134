"""Accelerate: build the optimizer from the plain module, and reach through the wrapper for the curvature."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac2 import KFAC


def main() -> list[float]:
    """Train on three linearly separable classes, two micro-batches a step; returns the loss of each."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = KFAC(model, lr=0.1)  # before prepare, which may wrap the model

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                output = model(inputs)
                optimizer.optimizer.update_curvature(output)  # Accelerate's wrapper hides the call
                loss = F.cross_entropy(output, labels)
                accelerator.backward(loss)
                optimizer.step()  # Accelerate skips it, and zero_grad, between micro-batches
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
