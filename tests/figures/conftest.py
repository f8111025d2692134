import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.figures.style import RC
from experiments.records import Record, Run

WriteRecord = Callable[..., Path]
PREVIEW = "resnet20_cifar10_preview"
PREVIEW_LABEL = "preview: ResNet20, 5,000 images, 6 epochs; CIFAR-10 (JPEG copy)"
FLOORS = {"sgd": 0.08, "adam": 0.06, "kfac": 0.054, "two_level_kfac": 0.035}


def synthetic_curves(optimizer: str, seeds: Sequence[int], epochs: int) -> pd.DataFrame:
    """Losses that fall from about 0.7 to the optimizer's floor, the seeds a little apart."""
    floor = FLOORS.get(optimizer, 0.1)
    rate = {"sgd": 0.12, "adam": 0.15, "kfac": 0.25, "two_level_kfac": 0.5}.get(optimizer, 0.1)
    epoch = np.arange(1, epochs + 1)
    frames = []
    for number, seed in enumerate(seeds):
        factor = 1.05 ** (number - (len(seeds) - 1) / 2)
        loss = factor * (floor + 0.7 * np.exp(-rate * epoch))
        frame = {
            "seed": seed,
            "epoch": epoch,
            "train_loss": loss,
            "train_accuracy": 1 - 0.4 * loss,
            "test_loss": 1.1 * loss,
            "test_accuracy": 1 - 0.45 * loss,
            "learning_rate": 1e-3,
            "seconds": 0.5 * epoch / rate**0.5,
        }
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(autouse=True)
def coarse_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving is most of the time of these tests."""
    monkeypatch.setitem(RC, "savefig.dpi", 50)


def write_files(path: Path, curves: pd.DataFrame, provenance: dict[str, Any]) -> None:
    path.mkdir(parents=True)
    curves.to_csv(path / "curves.csv", index=False, na_rep="nan")
    (path / "provenance.json").write_text(json.dumps(provenance))


def run_of(curves: pd.DataFrame, variant: str = "paper", **provenance: Any) -> Run:
    """A run of one record that is on no disk."""
    written = {"complete": True, "label": None, "device": "cpu", "threads": 1} | provenance
    return Run([Record(Path("kfac") / variant, curves, written)])


def edited(run: Run, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Run:
    """The run with other curves."""
    return Run([replace(record, curves=edit(record.curves)) for record in run.records])


@pytest.fixture
def write_record(tmp_path: Path) -> WriteRecord:
    """Write a synthetic record under ``tmp_path / root`` and return its directory.

    ``one_record_per_seed``: it holds a directory ``seed=<s>`` for each, as the ResNet's do.
    """

    def write(
        optimizer: str = "kfac",
        *,
        root: str = "runs",
        problem: str = "deep_linear_mlp",
        variant: str = "paper",
        seeds: Sequence[int] = (0, 1, 2, 3, 4),
        epochs: int = 100,
        one_record_per_seed: bool = False,
        edit: Callable[[pd.DataFrame], Any] | None = None,
        **provenance: Any,
    ) -> Path:
        path = tmp_path / root / problem / optimizer / variant
        curves = synthetic_curves(optimizer, seeds, epochs)
        if edit is not None:
            edit(curves)
        config = {
            "problem": {"name": problem},
            "optimizer": {"name": optimizer},
            "training": {"epochs": epochs},
            "seeds": list(seeds),
        }
        written = {"config": config, "complete": True, "label": None, "device": "cpu", "threads": 1}
        written |= provenance
        if not one_record_per_seed:
            write_files(path, curves, written)
        for seed, of_seed in curves.groupby("seed") if one_record_per_seed else ():
            own = written | {"config": config | {"seeds": [seed]}}
            write_files(path / f"seed={seed}", of_seed, own)
        return path

    return write


@pytest.fixture
def write_all(write_record: WriteRecord) -> Callable[..., None]:
    """Write the records of the paper's four optimizers."""

    def write(**options: Any) -> None:
        for optimizer in FLOORS:
            write_record(optimizer, **options)

    return write


@pytest.fixture
def write_resnet(write_record: WriteRecord) -> WriteRecord:
    """Write one record per seed of the ResNet at preview scale, of one optimizer."""

    def write(optimizer: str = "kfac", **options: Any) -> Path:
        defaults = {"problem": PREVIEW, "epochs": 6, "label": PREVIEW_LABEL}
        return write_record(optimizer, one_record_per_seed=True, **(defaults | options))

    return write


@pytest.fixture
def write_all_resnets(write_resnet: WriteRecord) -> Callable[..., None]:
    """The same of the paper's four optimizers."""

    def write(**options: Any) -> None:
        for optimizer in FLOORS:
            write_resnet(optimizer, **options)

    return write
