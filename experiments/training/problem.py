"""What the trainer asks of a problem."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Problem(Protocol):
    """Model + data + loss + metrics for one or more seeds, trained side by side.

    Per-seed tensors have shape ``(R,)``, R the number of seeds. What the entry points ask of its class besides:
    ``one_record_per_seed``, whether each seed is trained alone.
    """

    @property
    def seeds(self) -> list[int]:
        """Those that are trained, in the order of the replicas."""
        ...

    @property
    def label(self) -> str | None:
        """What a record must say on its face: a smaller scale, other data. None: nothing."""
        ...

    @property
    def model(self) -> nn.Module:
        """The network, on its device; its output is what the loss is of."""
        ...

    @property
    def likelihood(self) -> str:
        """As the optimizers name it."""
        ...

    @property
    def label_generators(self) -> list[torch.Generator]:
        """For the Fisher's label draws: one per seed, apart from the order of the batches, so that all
        optimizers see the same batches."""
        ...

    def train_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in a fresh random order; the last batch may be smaller."""
        ...

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test split, in a fixed order."""
        ...

    def full_batch(self) -> tuple[Tensor, Tensor] | None:
        """All training samples as one batch, in a fixed order; None where they are too many for one."""
        ...

    def batch_size(self, targets: Tensor) -> int:
        """Samples of each seed in the batch with these targets: the weight of its means."""
        ...

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch, per seed."""
        ...

    def accuracies(self, output: Tensor, targets: Tensor) -> Tensor:
        """Fraction of the batch that is classified rightly, per seed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The generators' states."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from them, so that a resumed training sees the same batches."""
        ...
