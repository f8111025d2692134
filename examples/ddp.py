"""Several processes: build the optimizer from the plain module, and call the model through the wrapper.

``torchrun --nproc-per-node 2 examples/ddp.py``; without torchrun it is one process.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac2 import KFAC


def train(rank: int, processes: int) -> list[float]:
    """Train on three linearly separable classes, each process on its share; returns the loss of each step."""
    torch.manual_seed(0)  # the same data, weights and state of the label draws in all processes
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = KFAC(model, lr=0.1)  # of the plain module

    ddp = DistributedDataParallel(model)
    losses = []
    for _ in range(3):
        for inputs, labels in zip(x.split(32), y.split(32), strict=True):
            optimizer.zero_grad()
            output = ddp(inputs[rank::processes])
            optimizer.update_curvature(output)  # the curvature is that of all processes' samples
            loss = F.cross_entropy(output, labels[rank::processes])
            loss.backward()
            optimizer.step()
            losses.append(mean_over_processes(loss))
    return losses


def mean_over_processes(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def main() -> list[float]:
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return train(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    losses = main()
    if os.environ.get("RANK", "0") == "0":
        print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
