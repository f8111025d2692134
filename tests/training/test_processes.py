"""Several processes train as one does, on shares of its batches, and leave one record."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training import processes
from experiments.training.trainer import Training, TrainingSettings
from kfac2.optim.first_order import SGD
from tests.problems.cifar_files import write_parquet

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent


class Problem(SimpleNamespace):
    """A network without normalisation, whose last batch is smaller and odd."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        super().__init__(model=model, likelihood="categorical", label_generators=[], seeds=[0])
        self.x, self.y = torch.randn(21, 4).double(), torch.randint(3, (21,))

    def train_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(batch_size), self.y.split(batch_size), strict=True)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.x, self.y

    def full_batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def batch_size(self, targets: Tensor) -> int:
        return len(targets)

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets)[None]

    def accuracies(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) == targets).double().mean()[None]


def rows(epochs: int = 3) -> list[dict[str, Any]]:
    problem: Any = Problem()
    training = Training(problem, partial(SGD, lr=0.1, momentum=0.9), TrainingSettings(epochs, 8))
    return [row for _ in range(epochs) for row in training.train_epoch()]


def train_in_one(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    Path(folder, f"{rank}.json").write_text(json.dumps(rows()))
    with pytest.raises(ValueError, match="1 samples cannot be shared by 2 processes"):
        processes.share(torch.zeros(1))
    dist.destroy_process_group()


def test_rows_are_those_of_one_process(tmp_path: Path) -> None:
    mp.spawn(train_in_one, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    expected = pd.DataFrame(rows()).drop(columns="seconds")
    for rank in range(2):
        own = pd.DataFrame(json.loads((tmp_path / f"{rank}.json").read_text())).drop(columns="seconds")
        pd.testing.assert_frame_equal(own, expected, rtol=1e-10)


def torchrun(*overrides: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "experiments.train",
    ]
    command = [sys.executable, *launcher, "tracking=none", *overrides]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_torchrun_leaves_one_record_that_says_so(tmp_path: Path) -> None:
    environment = {"KFAC2_CIFAR10": str(write_parquet(tmp_path / "images"))}
    sizes = [
        "problem.depth=8",
        "problem.train_samples=24",
        "problem.test_samples=10",
        "training.batch_size=8",
    ]
    problem = ["problem=resnet20_cifar10_preview", "optimizer=two_level_kfac", "seeds=[3]", *sizes]
    whole = [*problem, f"runs={tmp_path / 'whole'}", "training.epochs=2"]
    first = torchrun(*whole, environment=environment)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(": complete") == 1
    (record,) = (path.parent for path in (tmp_path / "whole").rglob("provenance.json"))
    provenance = json.loads((record / "provenance.json").read_text())
    assert (provenance["processes"], provenance["complete"]) == (2, True)
    curves = pd.read_csv(record / "curves.csv")
    assert curves["epoch"].tolist() == [1, 2]
    assert curves["train_loss"].between(0, 10).all()
    again = torchrun(*whole, environment=environment)
    assert again.stdout.count("not trained again") == 1, again.stderr


def test_seeds_that_train_side_by_side_are_refused(tmp_path: Path) -> None:
    refused = torchrun(f"runs={tmp_path}", environment={})
    assert refused.returncode != 0
    assert "torchrun is for the ResNets" in refused.stderr
