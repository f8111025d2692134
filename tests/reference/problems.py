"""Tiny networks, plain or replicated, and batches, shared by twins and real optimizers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac2 import KFAC
from kfac2.nn import ReplicatedBatchNorm, ReplicatedLinear
from tests.reference.fisher import negative_log_likelihood

INPUTS = 4


@dataclass(frozen=True)
class Case:
    """A likelihood and a sample's output shape: ``(outputs,)``, or ``()`` where that is None."""

    likelihood: str
    outputs: int | None

    def labels(self, size: int) -> Tensor:
        if self.likelihood == "categorical":
            assert self.outputs is not None
            return torch.randint(self.outputs, (size,))
        shape = (size,) if self.outputs is None else (size, self.outputs)
        if self.likelihood == "bernoulli":
            return torch.randint(2, shape).double()
        return torch.randn(shape)

    def network(self, bias: bool, batch_norm: bool = True) -> nn.Sequential:
        """Four linear layers, two of one shape; maps ``(B, 4)`` to the case's output."""
        return nn.Sequential(
            nn.Linear(INPUTS, 5, bias=bias),
            nn.BatchNorm1d(5) if batch_norm else nn.Tanh(),
            nn.Linear(5, 3, bias=bias),
            nn.Tanh(),
            nn.Linear(3, 3, bias=bias),
            nn.Linear(3, self.outputs or 1, bias=bias),
            nn.Flatten(start_dim=0 if self.outputs is None else 1),
        )

    def batches(self, steps: int, size: int = 7, sample: tuple[int, ...] = (INPUTS,)) -> list["Batch"]:
        """Random; every other gradient is four times larger, so that a KL clip comes and goes."""
        return [
            Batch(
                inputs=torch.randn(size, *sample),
                labels=self.labels(size),
                targets=self.labels(size),
                scale=4.0 if step % 2 else 1.0,
                likelihood=self.likelihood,
            )
            for step in range(steps)
        ]


GAUSSIAN = Case("gaussian", 2)
BERNOULLI = Case("bernoulli", None)
CATEGORICAL = Case("categorical", 3)
CASES = [GAUSSIAN, BERNOULLI, CATEGORICAL]


@dataclass(frozen=True)
class Batch:
    """One step's data: ``labels`` for the curvature, ``targets`` for the training loss."""

    inputs: Tensor
    labels: Tensor
    targets: Tensor
    scale: float
    likelihood: str

    def loss(self, output: Tensor) -> Tensor:
        losses = negative_log_likelihood(output, self.targets, self.likelihood)
        return self.scale * losses.mean()

    def part(self, part: slice) -> "Batch":
        """Some of the samples, with a loss that counts them as part of the whole batch's mean."""
        inputs = self.inputs[part]
        return Batch(
            inputs=inputs,
            labels=self.labels[part],
            targets=self.targets[part],
            scale=self.scale * len(inputs) / len(self.inputs),
            likelihood=self.likelihood,
        )


class Replicated(nn.Sequential):
    """Networks side by side, under one network's parameter names: ``(R, B, 4) -> (R, B, ...)``."""

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__(*[replicated_module(module, len(networks)) for module in networks[0]])
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                values: list[Tensor] = [network.get_parameter(name) for network in networks]
                parameter.copy_(torch.stack(values).reshape(parameter.shape))

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input.transpose(1, 2))
        return output.transpose(1, 2) if output.dim() == 3 else output


def replicated_module(module: nn.Module, replicas: int) -> nn.Module:
    if isinstance(module, nn.Linear):
        bias = module.bias is not None
        return ReplicatedLinear(replicas, module.in_features, module.out_features, bias=bias)
    if isinstance(module, nn.BatchNorm1d):
        return ReplicatedBatchNorm(replicas, module.num_features)
    if isinstance(module, nn.Flatten):  # (R, 1, B) -> (R, B) where one network gives (B,)
        return nn.Flatten(start_dim=1) if module.start_dim == 0 else nn.Identity()
    return module


def forward(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, labels and summed training loss; one batch per replica (a plain model has one)."""
    if isinstance(model, Replicated):
        output = model(torch.stack([batch.inputs for batch in batches]))
        losses = [batch.loss(one) for batch, one in zip(batches, output, strict=True)]
        return output, torch.stack([batch.labels for batch in batches]), torch.stack(losses).sum()
    (batch,) = batches
    output = model(batch.inputs)
    return output, batch.labels, batch.loss(output)


def real_step(optimizer: KFAC, model: nn.Module, batches: Sequence[Batch]) -> None:
    """One step of the real optimizer as its users write it, the curvature's labels given."""
    optimizer.zero_grad()
    output, labels, loss = forward(model, batches)
    optimizer.update_curvature(output, labels=labels)
    loss.backward()
    optimizer.step()
