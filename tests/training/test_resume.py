"""A run that is killed goes on from its last finished epoch, and gives the curve of one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "seeds=[0,1]",
    "problem.depth=6",
    "problem.train_samples=2000",
    "problem.test_samples=100",
    "tracking=none",
)


def command(runs: Path, optimizer: str, epochs: int) -> list[str]:
    overrides = [f"optimizer={optimizer}", f"training.epochs={epochs}", f"runs={runs}", *SMALL]
    return [sys.executable, "-m", "experiments.train", *overrides]


def record(runs: Path) -> Path:
    (provenance,) = runs.glob("deep_linear_mlp/*/*/provenance.json")
    return provenance.parent


def curves(runs: Path) -> pd.DataFrame:
    return pd.read_csv(record(runs) / "curves.csv").drop(columns="seconds")


def last_epoch(frame: pd.DataFrame) -> int:
    return int(frame["epoch"].to_numpy().max())


def kill_after_epochs(process: subprocess.Popen, runs: Path, epochs: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        written = list(runs.glob("deep_linear_mlp/*/*/curves.csv"))
        if written and last_epoch(pd.read_csv(written[0])) >= epochs:
            break
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("optimizer", ["adam", "two_level_kfac"])
def test_killed_and_resumed_equals_uninterrupted(optimizer: str, tmp_path: Path) -> None:
    epochs, whole, killed = 40, tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, optimizer, epochs), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(
        command(killed, optimizer, epochs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kill_after_epochs(process, killed, epochs=3)
    before = curves(killed)
    assert 3 <= last_epoch(before) < epochs
    subprocess.run(command(killed, optimizer, epochs), cwd=ROOT, check=True, capture_output=True)
    pd.testing.assert_frame_equal(curves(killed), curves(whole), check_exact=True)
    pd.testing.assert_frame_equal(curves(killed).head(len(before)), before, check_exact=True)
    assert not (record(killed) / "checkpoint.pt").exists()


def test_a_complete_record_is_not_trained_again_unless_asked(tmp_path: Path) -> None:
    run = command(tmp_path, "sgd", 1)
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    stamp = (record(tmp_path) / "curves.csv").stat().st_mtime_ns
    again = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "complete, not trained again" in again.stdout
    assert (record(tmp_path) / "curves.csv").stat().st_mtime_ns == stamp
    subprocess.run([*run, "rerun=true"], cwd=ROOT, check=True, capture_output=True)
    assert (record(tmp_path) / "curves.csv").stat().st_mtime_ns != stamp
