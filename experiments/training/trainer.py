"""The one trainer, blind to the optimizer."""

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from experiments.records import FULL_BATCH_LOSS, Row
from experiments.training import processes
from experiments.training.problem import Problem
from experiments.training.records import RunDirectory
from experiments.training.tracking import Tracker

OptimizerFactory = Callable[..., Any]
"""``factory(model, likelihood=..., generator=...)``."""
FULL_BATCH_EVERY = 5  # epochs between evaluations on all training samples as one batch
OVER = "over"  # in place of a checkpoint: nothing is to be trained


@dataclass  # not frozen: Hydra would take it for read-only
class TrainingSettings:
    """How long and in what batches a problem is trained; raises ``ValueError`` for what cannot be meant."""

    epochs: int
    batch_size: int
    """Of all processes together."""
    milestones: list[float] = field(default_factory=list)
    """Fractions of the run after which the learning rate is multiplied by ``lr_decay``."""
    lr_decay: float = 0.1
    channels_last: bool = False
    """Images and convolutions with the channels innermost in memory: faster, same numbers up to rounding."""
    autocast: bool = False
    """The forward pass in bfloat16 where torch deems it safe; parameters and losses stay float32."""
    compile: bool = False
    """The model compiled by ``torch.compile``, but for K-FAC's refreshes."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be positive, got {getattr(self, name)}")
        if any(not 0 < fraction < 1 for fraction in self.milestones):
            raise ValueError(f"training.milestones are fractions of the run, got {self.milestones}")
        if sorted(set(self.milestones)) != list(self.milestones):
            raise ValueError(f"training.milestones must increase, got {self.milestones}")
        if not 0 < self.lr_decay < math.inf:
            raise ValueError(f"training.lr_decay must be positive and finite, got {self.lr_decay}")


class Averages:
    """Means of per-seed numbers over an epoch and all processes, weighted by batch size."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0

    def add(self, weight: int, **values: Tensor) -> None:
        for name, value in values.items():
            weighted = value.double() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._weight += weight

    def means(self) -> dict[str, list[float]]:
        weight = processes.added_up(torch.tensor(float(self._weight)))
        return {
            name: (processes.added_up(total) / float(weight)).tolist() for name, total in self._sums.items()
        }


class Training:
    """One run of a problem with an optimizer, resumable at every epoch."""

    def __init__(self, problem: Problem, factory: OptimizerFactory, settings: TrainingSettings):
        self.problem, self.settings = problem, settings
        if settings.channels_last:  # before the optimizer sees the parameters
            problem.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model: Any = torch.compile(problem.model) if settings.compile else problem.model
        self.optimizer = factory(
            self.model, likelihood=problem.likelihood, generator=problem.label_generators
        )
        if processes.number() > 1:
            self.model = DistributedDataParallel(self.model)
        milestones = [max(1, round(fraction * settings.epochs)) for fraction in settings.milestones]
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, milestones, gamma=settings.lr_decay
        )
        self.rows: list[Row] = []
        self.epoch, self.seconds = 0, 0.0
        self.epoch_seconds = 0.0  # of the latest epoch with its evaluation
        self.identifier = uuid.uuid4().hex[:8]  # kept when it is resumed, another when it begins anew

    def run(
        self,
        directory: RunDirectory,
        tracker: Tracker,
        report: Callable[[int, int, str], None] = lambda *_: None,
        rerun: bool = False,
        deadline: float = math.inf,
    ) -> list[Row]:
        """Train what is missing and return all rows; leaves a complete record in ``directory``.

        A record that another process has completed meanwhile is left alone, unless ``rerun``.

        Args:
            report: ``report(epoch, epochs, note)``, after each epoch and where it begins.
            deadline: as ``time.time``. No epoch begins that would not end by then, if it takes as long as the one
                before; the record is left incomplete and can be resumed.
        """
        device = device_name(self._device)
        with directory.locked():
            if rerun:
                directory.clear()
            if directory.is_complete():
                processes.agreed(OVER)
                return self.rows
            self._resume(directory)
            directory.failure.unlink(missing_ok=True)
            directory.write_provenance(False, device, self.problem.label)
            tracker.start(directory.config, self.epoch + 1, self.identifier)
            report(self.epoch, self.settings.epochs, "")
            while processes.agreed(self._goes_on(deadline)):
                rows = self._advance()
                directory.save_checkpoint(self.state_dict())
                directory.write_curves(self.rows)
                tracker.log(rows)
                losses = " ".join(f"{row['train_loss']:.3g}" for row in rows)
                report(self.epoch, self.settings.epochs, f"loss {losses}")
            if self.epoch == self.settings.epochs:
                directory.write_curves(self.rows)
                directory.finish(device, self.problem.label)
            tracker.finish(self.rows)
        return self.rows

    def follow(self) -> None:
        """``run`` in a process that leaves the record to the first one."""
        checkpoint = processes.agreed(None)
        if checkpoint == OVER:
            return
        if checkpoint is not None:
            self.load_state_dict(checkpoint)
        while processes.agreed(None):
            self._advance()

    def _goes_on(self, deadline: float) -> bool:
        return self.epoch < self.settings.epochs and time.time() + self.epoch_seconds <= deadline

    def _advance(self) -> list[Row]:
        start = time.perf_counter()
        rows = self.skip_epoch() if self.has_diverged() else self.train_epoch()
        self.epoch_seconds = time.perf_counter() - start
        return rows

    def _resume(self, directory: RunDirectory) -> None:
        """Go on from the record's checkpoint, if there is one."""
        checkpoint = processes.agreed(directory.load_checkpoint(torch.device("cpu")))
        if checkpoint is None:
            return
        directory.check_label(self.problem.label)
        try:
            self.load_state_dict(checkpoint)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{directory.checkpoint} is of another training or code ({error!r}): rerun=true trains from the start"
            ) from error

    def train_epoch(self) -> list[Row]:
        """One epoch and its evaluation; returns its rows, one per seed."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        start = time.perf_counter()
        train = self._pass_over_training_data()
        self.seconds += time.perf_counter() - start
        test = self.evaluate()
        self.scheduler.step()
        self.epoch += 1
        losses = {"train_loss": train.pop("loss"), "train_accuracy": train.pop("accuracy")}
        losses |= {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
        losses |= self._full_batch_loss()
        rows = [
            {"seed": seed, "epoch": self.epoch}
            | {name: values[r] for name, values in losses.items()}
            | {"learning_rate": float(learning_rate), "seconds": self.seconds}
            | {name: values[r] for name, values in train.items()}
            | {name: int(counts[r]) for name, counts in self.optimizer.failures.items()}
            for r, seed in enumerate(self.problem.seeds)
        ]
        self.rows += rows
        return rows

    def has_diverged(self) -> bool:
        """Whether no seed's latest training loss is finite: such parameters never come back."""
        latest = self._latest_rows()
        return bool(latest) and not any(math.isfinite(row["train_loss"]) for row in latest)

    def skip_epoch(self) -> list[Row]:
        """Rows of NaN for an epoch that would train nothing."""
        self.epoch += 1
        kept = ("seed", "learning_rate", "seconds")
        rows = [
            {name: value if name in kept else math.nan for name, value in row.items()} | {"epoch": self.epoch}
            for row in self._latest_rows()
        ]
        self.rows += rows
        return rows

    @property
    def _device(self) -> torch.device:
        return next(self.problem.model.parameters()).device

    def _latest_rows(self) -> list[Row]:
        return self.rows[-len(self.problem.seeds) :]

    def _pass_over_training_data(self) -> dict[str, list[float]]:
        problem, optimizer = self.problem, self.optimizer
        problem.model.train()
        averages = Averages()
        for inputs, targets in problem.train_batches(self.settings.batch_size):
            whole = problem.batch_size(targets)
            inputs, targets = processes.share(inputs), processes.share(targets)
            optimizer.zero_grad()
            output = self._forward(inputs)
            optimizer.update_curvature(output)
            losses = problem.losses(output, targets)
            losses.sum().backward(processes.weight(problem.batch_size(targets), whole))
            stopped = not self._step(losses)
            optimizer.adapt_damping(partial(self.model, inputs), partial(problem.losses, targets=targets))
            averages.add(
                problem.batch_size(targets),
                loss=losses.detach(),
                accuracy=problem.accuracies(output.detach(), targets),
                **optimizer.diagnostics,
            )
            if stopped:
                break
        return averages.means()

    def _step(self, losses: Tensor) -> bool:
        """Step; False if the optimizer cannot because no seed's loss is finite any more."""
        try:
            self.optimizer.step()
        except RuntimeError:
            if losses.isfinite().any():
                raise
            return False
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Loss and accuracy on the test data, with running statistics in the normalisation layers."""
        self.problem.model.eval()
        averages = Averages()
        for inputs, targets in self.problem.test_batches():
            output = self._forward(inputs)
            averages.add(
                self.problem.batch_size(targets),
                loss=self.problem.losses(output, targets),
                accuracy=self.problem.accuracies(output, targets),
            )
        return averages.means()

    @torch.no_grad()
    def _full_batch_loss(self) -> dict[str, list[float]]:
        """The loss of all training samples as one batch under its own statistics, which are not kept: the
        minibatches' loss without the noise of theirs. Not in every epoch."""
        batch = self.problem.full_batch()
        if batch is None or (self.epoch % FULL_BATCH_EVERY and self.epoch < self.settings.epochs):
            return {}
        inputs, targets = batch
        self.problem.model.train()
        buffers = {name: buffer.clone() for name, buffer in self.problem.model.named_buffers()}
        output = functional_call(self.problem.model, buffers, inputs)
        return {FULL_BATCH_LOSS: self.problem.losses(output, targets).tolist()}

    def _forward(self, inputs: Tensor) -> Tensor:
        if self.settings.channels_last and inputs.dim() == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.settings.autocast):
            return self.model(inputs)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "epoch_seconds": (device_name(self._device), self.epoch_seconds),
            "identifier": self.identifier,
            "rows": self.rows,
            "model": self.problem.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "problem": self.problem.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.seconds, self.rows = state["epoch"], state["seconds"], list(state["rows"])
        self.identifier = state.get("identifier", self.identifier)  # checkpoints had none
        where, seconds = state.get("epoch_seconds", (None, 0.0))
        self.epoch_seconds = seconds if where == device_name(self._device) else 0.0
        self.problem.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.problem.load_state_dict(state["problem"])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def prefer_deterministic_kernels() -> None:
    """On a GPU the fastest convolutions add up in any order."""
    torch.backends.cudnn.deterministic = True
