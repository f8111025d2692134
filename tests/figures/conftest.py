import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

WriteRecord = Callable[..., Path]
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


@pytest.fixture
def write_record(tmp_path: Path) -> WriteRecord:
    """Write a synthetic record under ``tmp_path / root`` and return its directory."""

    def write(
        optimizer: str = "kfac",
        *,
        root: str = "runs",
        variant: str = "paper",
        seeds: Sequence[int] = (0, 1, 2, 3, 4),
        epochs: int = 100,
        edit: Callable[[pd.DataFrame], Any] | None = None,
        **provenance: Any,
    ) -> Path:
        path = tmp_path / root / "deep_linear_mlp" / optimizer / variant
        path.mkdir(parents=True)
        curves = synthetic_curves(optimizer, seeds, epochs)
        if edit is not None:
            edit(curves)
        curves.to_csv(path / "curves.csv", index=False, na_rep="nan")
        config = {
            "problem": {"name": "deep_linear_mlp"},
            "optimizer": {"name": optimizer},
            "training": {"epochs": epochs},
            "seeds": list(seeds),
        }
        written = {"config": config, "complete": True, "label": None, "device": "cpu", "threads": 1}
        (path / "provenance.json").write_text(json.dumps(written | provenance))
        return path

    return write


@pytest.fixture
def write_all(write_record: WriteRecord) -> Callable[..., None]:
    """Write the records of the paper's four optimizers."""

    def write(**options: Any) -> None:
        for optimizer in FLOORS:
            write_record(optimizer, **options)

    return write
