"""A run that is killed goes on from its last finished epoch, and gives the curve of one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.problems.cifar_files import write_parquet

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {
    "deep_linear_mlp": ("problem.depth=6", "problem.train_samples=2000", "problem.test_samples=100"),
    "resnet20_cifar10_preview": (
        "problem.depth=8",
        "problem.train_samples=24",
        "problem.test_samples=10",
        "training.batch_size=8",
    ),
}


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC2_CIFAR10", str(write_parquet(tmp_path / "images")))


def command(runs: Path, optimizer: str, epochs: int, problem: str = "deep_linear_mlp") -> list[str]:
    overrides = [f"problem={problem}", f"optimizer={optimizer}", f"training.epochs={epochs}", f"runs={runs}"]
    settings = [*overrides, "seeds=[0,1]", "tracking=none", *SMALL[problem]]
    return [sys.executable, "-m", "experiments.train", *settings]


def records(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.rglob("provenance.json"))


def curves(record: Path) -> pd.DataFrame:
    return pd.read_csv(record / "curves.csv").drop(columns="seconds")


def last_epoch(frame: pd.DataFrame) -> int:
    return int(frame["epoch"].to_numpy().max())


def kill_after_epochs(process: subprocess.Popen, runs: Path, epochs: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        written = list(runs.rglob("curves.csv"))
        if written and last_epoch(pd.read_csv(written[0])) >= epochs:
            break
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("problem", "optimizer", "epochs"),
    [
        ("deep_linear_mlp", "adam", 40),
        ("deep_linear_mlp", "two_level_kfac", 40),
        ("resnet20_cifar10_preview", "two_level_kfac", 8),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    problem: str, optimizer: str, epochs: int, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, optimizer, epochs, problem), cwd=ROOT, check=True, capture_output=True)
    to_be_killed = command(killed, optimizer, epochs, problem)
    process = subprocess.Popen(to_be_killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_after_epochs(process, killed, epochs=3)
    (record,) = records(killed)
    before = curves(record)
    assert 3 <= last_epoch(before) < epochs
    subprocess.run(to_be_killed, cwd=ROOT, check=True, capture_output=True)
    kept = curves(record).head(len(before)).filter(before.columns)
    pd.testing.assert_frame_equal(kept, before, check_exact=True)
    assert [r.relative_to(killed) for r in records(killed)] == [r.relative_to(whole) for r in records(whole)]
    for ours, theirs in zip(records(killed), records(whole), strict=True):
        pd.testing.assert_frame_equal(curves(ours), curves(theirs), check_exact=True)
        assert len(curves(ours)) >= epochs
        assert not (ours / "checkpoint.pt").exists()
