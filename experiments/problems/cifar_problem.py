"""What the problems on CIFAR-10 share: images, batches, loss and accuracy."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.problems.augmentation import crop_and_flip, draw_crops, normalise
from experiments.problems.cifar10 import IMAGES, JPEG_COPY, Cifar10, DataError

EVALUATION_BATCH = 500


class CifarProblem:
    """A network on CIFAR-10 for one seed, which gives initialisation, batches and label draws.

    Args:
        make_model: builds the network from a generator.
        seeds: exactly one.
        train_samples, test_samples: so many images of a fixed shuffle of the split; None: all.
        label: what records made from this problem must say, if anything; the data may add to it.
        data: where CIFAR-10 comes from.
        device: where model and images live.

    Raises:
        ValueError: more than one seed, no images.
        DataError: the images cannot be had.
    """

    likelihood = "categorical"
    one_record_per_seed = True

    def __init__(
        self,
        make_model: Callable[[torch.Generator], nn.Module],
        seeds: Sequence[int] = (0,),
        train_samples: int | None = None,
        test_samples: int | None = None,
        label: str | None = None,
        data: Cifar10 | None = None,
        device: torch.device | str = "cpu",
    ):
        self.seeds = list(seeds)
        if len(self.seeds) != 1:
            raise ValueError(
                f"this network trains one seed at a time, got seeds={self.seeds}: make one problem per seed"
            )
        for name, samples in {"train_samples": train_samples, "test_samples": test_samples}.items():
            if samples is not None and samples < 1:
                raise ValueError(f"{name} must be positive, got {samples}")
        self._generator = torch.Generator().manual_seed(self.seeds[0])
        self.model = make_model(self._generator).to(device)
        self.label_generators = [
            torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
        ]
        train, test = (data or Cifar10()).load(train_samples, test_samples)
        for name, split, samples in (("train", train, train_samples), ("test", test, test_samples)):
            if samples is None and len(split.labels) != IMAGES[name]:
                raise DataError(
                    f"all of the {name} split are {IMAGES[name]:,} images, but there are {len(split.labels):,}: "
                    f"find the missing files, or set problem.{name}_samples"
                )
        self.train_images, self.train_targets = train.images.to(device), train.labels.to(device)
        self.test_images, self.test_targets = test.images.to(device), test.labels.to(device)
        notes = [label, JPEG_COPY if train.is_jpeg or test.is_jpeg else None]
        self.label = "; ".join(note for note in notes if note) or None

    def train_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images ``(B, 3, 32, 32)`` and classes ``(B,)``."""
        device = self.train_targets.device
        batches = torch.randperm(len(self.train_targets), generator=self._generator).split(batch_size)
        # All that is random of the epoch goes to the device at once, so that no step waits for a copy.
        draws = torch.cat([draw_crops(len(batch), self._generator) for batch in batches], dim=1).to(device)
        order = torch.cat(batches).to(device)
        for batch, drawn in zip(order.split(batch_size), draws.split(batch_size, dim=1), strict=True):
            yield normalise(crop_and_flip(self.train_images[batch], drawn)), self.train_targets[batch]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        splits = self.test_images.split(EVALUATION_BATCH), self.test_targets.split(EVALUATION_BATCH)
        for images, targets in zip(*splits, strict=True):
            yield normalise(images), targets

    def full_batch(self) -> None:
        return None

    def batch_size(self, targets: Tensor) -> int:
        return len(targets)

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), targets)[None]

    def accuracies(self, output: Tensor, targets: Tensor) -> Tensor:
        """NaN for an output that is not finite: its largest entry is no prediction."""
        accuracy = (output.argmax(1) == targets).float().mean()
        return torch.where(output.isfinite().all(), accuracy, torch.nan)[None]

    def state_dict(self) -> dict[str, Any]:
        return {"generators": [g.get_state() for g in (self._generator, *self.label_generators)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        generators = (self._generator, *self.label_generators)
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.set_state(saved)
