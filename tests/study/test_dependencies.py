"""Blocks beside the whole in function space, against dense matrices."""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.study.dependencies import dependencies


def test_blocks_and_whole_are_their_dense_definitions() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)
    model = nn.Sequential(first, nn.Tanh(), nn.LayerNorm(4), last).double()
    images, targets = torch.randn(5, 3).double(), torch.tensor([0, 2, 1, 1, 0])
    parameters = [first.weight, first.bias, last.weight]
    logits = model(images)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, parameters, retain_graph=True)])
        for z in logits.flatten()
    ]
    J, p = torch.stack(rows), logits.softmax(-1).detach()
    S = torch.block_diag(*[q.diag() - torch.outer(q, q) for q in p]) / len(p)
    loss = F.cross_entropy(logits, targets)
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)])
    fisher = J.T @ S @ J
    own = torch.block_diag(*[fisher[:16, :16], fisher[16:, 16:]])
    dampings = (1e-3, 1.0)
    for row, damping in zip(dependencies(model, images, targets, dampings), dampings, strict=True):
        eye = damping * torch.eye(28).double()
        whole, block = (J @ torch.linalg.solve(matrix + eye, g) for matrix in (fisher, own))
        assert row["damping"] == damping
        assert abs(row["cosine"] - F.cosine_similarity(block, whole, dim=0).item()) < 1e-9
        assert abs(row["ratio"] - (block.norm() / whole.norm()).item()) < 1e-9
        assert abs(row["loss"] - loss.item()) < 1e-12


def test_one_layer_is_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    (row,) = dependencies(model, torch.randn(5, 3).double(), torch.tensor([0, 2, 1, 1, 3]), (1e-2,))
    assert abs(row["cosine"] - 1) < 1e-12
    assert abs(row["ratio"] - 1) < 1e-12
