"""Whatever happened to a file, the message names it and a way out; the way out works."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.figures.grid import read_grid_table
from experiments.records import RecordDirectory, RecordError, find_runs, load_measurement, load_record
from experiments.records.files import write_atomically
from experiments.training.records import RunDirectory

CONFIG = {
    "problem": {"name": "deep_linear_mlp"},
    "optimizer": {"name": "kfac"},
    "training": {"epochs": 2},
    "seeds": [0, 1],
}
AGAIN = r"make it again with rerun=true$"


@pytest.fixture
def record(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "deep_linear_mlp" / "kfac" / "paper", CONFIG)
    numbers = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "seconds")
    with directory.locked():
        directory.write_curves(
            [{"seed": s, "epoch": e} | dict.fromkeys(numbers, 0.5) for e in (1, 2) for s in (0, 1)]
        )
        directory.finish("cpu")
    return directory


WRONG_KINDS = {
    "[]": "lacks 'complete",
    '{"complete": "yes"}': "lacks 'complete",
    '{"complete": true, "config": [1]}': "config of the wrong kind",
    '{"complete": true, "config": {"problem": "mlp", "training": 3}}': "config.problem, config.training of",
    '{"complete": true, "config": {"seeds": "01"}}': "config.seeds of the wrong kind",
    '{"complete": true, "config": {"seeds": [0.5]}}': "config.seeds of the wrong kind",
    '{"complete": true, "label": 3, "threads": "two", "config": {}}': "label, threads of the wrong kind",
    "{": "is not valid JSON",
    "[" * 100_000: "is not valid JSON",
}


@pytest.mark.parametrize(("text", "message"), WRONG_KINDS.items(), ids=[text[:60] for text in WRONG_KINDS])
def test_a_damaged_provenance_can_be_made_again(record: RunDirectory, text: str, message: str) -> None:
    record.provenance.write_text(text)
    again = RunDirectory(record.path, CONFIG)
    for use in (again.is_complete, lambda: load_record(record.path)):
        with pytest.raises(RecordError, match=rf"provenance\.json .*{message}.*{AGAIN}"):
            use()
    again.clear()
    assert not again.is_complete()


def test_a_provenance_without_a_configuration(record: RunDirectory) -> None:
    record.provenance.write_text('{"complete": true}')
    for use in (RunDirectory(record.path, CONFIG).is_complete, lambda: load_record(record.path)):
        with pytest.raises(RecordError, match=rf"provenance\.json lacks 'config.*{AGAIN}"):
            use()


@pytest.mark.parametrize(
    ("epochs", "message"), [("2", "training.epochs is '2', not a whole number"), (3, "has 2 of 3 epochs")]
)
def test_a_wrong_number_of_epochs_is_called_that(record: RunDirectory, epochs: Any, message: str) -> None:
    provenance = json.loads(record.provenance.read_text())
    provenance["config"]["training"]["epochs"] = epochs
    record.provenance.write_text(json.dumps(provenance))
    with pytest.raises(RecordError, match=f"{message}; {AGAIN}"):
        load_record(record.path)


def test_complete_without_curves(record: RunDirectory) -> None:
    record.curves.unlink()
    with pytest.raises(RecordError, match=rf"curves\.csv does not exist, although .*{AGAIN}"):
        find_runs(record.path.parents[2], "deep_linear_mlp")


@pytest.mark.parametrize("name", ["curves.csv", "provenance.json"])
def test_a_directory_in_a_file_s_place(record: RunDirectory, name: str) -> None:
    (record.path / name).unlink()
    (record.path / name).mkdir()
    with pytest.raises(RecordError, match=rf"{name} cannot be read \(Is a directory\); move it away"):
        load_record(record.path)
    with pytest.raises(RecordError, match=rf"{name} cannot be replaced \(.*\); move it away"):
        RunDirectory(record.path, CONFIG).clear()
    (record.path / name).rmdir()
    RunDirectory(record.path, CONFIG).clear()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint(record: RunDirectory, content: bytes) -> None:
    record.checkpoint.write_bytes(content)
    with pytest.raises(RecordError, match=rf"checkpoint\.pt is damaged .*{AGAIN}"):
        record.load_checkpoint(torch.device("cpu"))
    record.clear()
    assert record.load_checkpoint(torch.device("cpu")) is None


def test_a_full_disk_is_said_to_be_one(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"No space left on device: the disk is full, .*curves\.csv could not be written; make room"
    with pytest.raises(OSError, match=message) as caught:
        write_atomically(tmp_path / "curves.csv", full)
    assert caught.value.errno == errno.ENOSPC


def test_a_failure_on_a_full_disk_is_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("experiments.records.directory.write_atomically", full)
    with pytest.raises(ValueError, match="the reason"), RecordDirectory(tmp_path, CONFIG).failure_recorded():
        raise ValueError("the reason")


GRID = "optimizer,lr,seeds,diverged,median,mean,low,high,lowest,highest,status,variant,label\n"
ROW = "sgd,0.001,5,0,0.1,0.1,0.1,0.1,0.1,0.1,complete,paper,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        (GRID, "has no rows"),
        (GRID + ROW[:-20], "its last line is cut off"),
        (GRID + ROW.replace("0.1", "low", 1), "not a number in every row of median"),
        (GRID.replace("median", "medium") + ROW, "lacks the columns median"),
        (GRID.replace("status", "state") + ROW, "lacks the columns status"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_sweep_table(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "deep_linear_mlp" / "paper_grid.csv"
    path.parent.mkdir()
    if text is not None:
        path.write_text(text)
    command = f"python -m experiments.select sweep=paper_grid problem=deep_linear_mlp runs={tmp_path}"
    with pytest.raises(RecordError, match=f"paper_grid.csv .*{message}.*; make it with: {command}$"):
        read_grid_table(path)
    path.write_text(GRID + ROW)
    assert read_grid_table(path)["label"].tolist() == [""]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("0.25", "quarter"), "not a number in every row of distance"),
        (lambda text: text[:-3], "its last line is cut off"),
        (lambda text: "", "is damaged"),
    ],
)
def test_a_damaged_measurement(tmp_path: Path, edit: Callable[[str], str], message: str) -> None:
    home = tmp_path / "microscope" / "kfac" / "paper" / "seed=1"
    home.mkdir(parents=True)
    (home / "provenance.json").write_text('{"complete": true, "label": null}')
    table = pd.DataFrame({"seed": [1, 1], "matrix": ["true", "exact"], "distance": [0.25, 0.5]})
    table.to_csv(home / "coarse.csv", index=False)
    assert len(load_measurement(tmp_path, "microscope", "kfac/paper", "coarse")) == 2
    (home / "coarse.csv").write_text(edit((home / "coarse.csv").read_text()))
    with pytest.raises(RecordError, match=rf"coarse\.csv.* {message}.*{AGAIN}"):
        load_measurement(tmp_path, "microscope", "kfac/paper", "coarse")
