"""The deep linear MLP with planted targets (Section 4 of the paper)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2.nn import ReplicatedBatchNorm, ReplicatedLayerNorm, ReplicatedLinear, ReplicatedSequential

ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh}
INPUTS = 10


class ReplicatedMLP(nn.Module):
    """``depth`` hidden layers of ``width`` without biases, one logit; ``(R, inputs, B)`` → ``(R, B)``."""

    def __init__(
        self,
        depth: int,
        width: int,
        norm: Callable[[int, int], nn.Module] | None,
        activation: str,
        generators: list[torch.Generator],
    ):
        super().__init__()
        replicas = len(generators)
        modules: list[nn.Module] = []
        for fan_in in [INPUTS] + [width] * (depth - 1):
            modules.append(ReplicatedLinear(replicas, fan_in, width, generators=generators))
            if norm is not None:
                modules.append(norm(replicas, width))
            if activation != "identity":
                modules.append(ACTIVATIONS[activation]())
        modules.append(ReplicatedLinear(replicas, width, 1, generators=generators))
        self.layers = ReplicatedSequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1)


class DeepLinearMLP:
    """One replica per seed, each with its own data, initialisation, batch order and label draws.

    ``x ~ N(0, I_10)``; the label is the sign of a randomly initialised one-layer linear network. All
    comes from one generator per seed, so that a replica evolves as it would alone. The defaults are the
    paper's.

    Raises:
        ValueError: no or repeated seeds, sizes that are not positive, an unknown activation, both norms.
    """

    likelihood = "bernoulli"
    one_record_per_seed = False
    label = None

    def __init__(
        self,
        seeds: Sequence[int] = (0, 1, 2, 3, 4),
        depth: int = 64,
        width: int = 10,
        batch_norm: bool = True,
        activation: str = "identity",
        train_samples: int = 25_000,
        test_samples: int = 2_500,
        device: torch.device | str = "cpu",
        layer_norm: bool = False,
    ):
        self.seeds = list(seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be distinct and not empty, got {self.seeds}")
        sizes = {"depth": depth, "width": width, "train_samples": train_samples, "test_samples": test_samples}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
        if batch_norm and layer_norm:
            raise ValueError("a network has one kind of norm: set problem.batch_norm or layer_norm to false")
        norm = ReplicatedBatchNorm if batch_norm else ReplicatedLayerNorm if layer_norm else None
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        train, test = zip(*[_planted(g, train_samples, test_samples) for g in self._generators], strict=True)
        self.train_inputs, self.train_targets = _stack(train, device)
        self.test_inputs, self.test_targets = _stack(test, device)
        self.model = ReplicatedMLP(depth, width, norm, activation, self._generators).to(device)
        self.label_generators = [
            torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=g)))
            for g in self._generators
        ]

    def train_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        replicas, samples = self.train_targets.shape
        orders = torch.stack([torch.randperm(samples, generator=g) for g in self._generators])
        rows = torch.arange(replicas, device=self.train_inputs.device)[:, None]
        for order in orders.to(self.train_inputs.device).split(batch_size, dim=1):
            x = self.train_inputs[rows, order]
            yield x.mT.contiguous(), self.train_targets[rows, order]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.test_inputs.mT.contiguous(), self.test_targets

    def full_batch(self) -> tuple[Tensor, Tensor]:
        return self.train_inputs.mT.contiguous(), self.train_targets

    def batch_size(self, targets: Tensor) -> int:
        return targets.shape[1]

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, targets, reduction="none").mean(1)

    def accuracies(self, output: Tensor, targets: Tensor) -> Tensor:
        return ((output > 0) == (targets > 0.5)).to(output.dtype).mean(1)

    def state_dict(self) -> dict[str, Any]:
        return {"generators": [g.get_state() for g in (*self._generators, *self.label_generators)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        generators = (*self._generators, *self.label_generators)
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.set_state(saved)


Split = tuple[Tensor, Tensor]


def _planted(generator: torch.Generator, train: int, test: int) -> tuple[Split, Split]:
    """Inputs ``(N, 10)`` and 0/1 targets ``(N,)`` of both splits, labelled by one planted network."""
    planted = torch.empty(INPUTS).uniform_(-1, 1, generator=generator)
    inputs = torch.randn(train + test, INPUTS, generator=generator)
    targets = (inputs @ planted > 0).float()
    return (inputs[:train], targets[:train]), (inputs[train:], targets[train:])


def _stack(splits: Sequence[Split], device: torch.device | str) -> Split:
    inputs, targets = zip(*splits, strict=True)
    return torch.stack(inputs).to(device), torch.stack(targets).to(device)
