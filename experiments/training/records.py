"""A run's record: ``curves.csv``, ``provenance.json`` and, while it runs, ``checkpoint.pt``.

Every file is replaced atomically. The checkpoint is the one commit point: it carries the rows so far,
and the curves are rewritten from it, so a kill at any moment loses at most the epoch under way.
"""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import kfac2

Row = dict[str, float | int]


class RecordInUseError(RuntimeError):
    """Another process is writing the record."""


class OtherRecordError(ValueError):
    """The directory holds the record of another configuration."""


class RunDirectory:
    """The files of one run; ``config`` is its identity.

    Raises:
        OtherRecordError: the directory holds the record of another configuration.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config
        self.checkpoint = path / "checkpoint.pt"
        self.curves = path / "curves.csv"
        self.provenance = path / "provenance.json"
        self.failure = path / "failure.json"
        if self.provenance.exists() and (other := self._read()["config"]) != config:
            raise OtherRecordError(
                f"{path} holds the record of another configuration ({', '.join(_differences(other, config))}):"
                " move it away, or set runs=..."
            )

    def check_label(self, label: str | None) -> None:
        """Raises ``ValueError`` if the record was begun under another label, hence on other data."""
        if self.provenance.exists() and self.label != label:
            raise ValueError(
                f"{self.path} was begun as {self.label!r} and cannot go on as {label!r}: give it the data that it "
                "was begun with, or rerun=true"
            )

    @property
    def label(self) -> str | None:
        """What the record that is there must say on its face."""
        return self._read()["label"] if self.provenance.exists() else None

    def is_complete(self) -> bool:
        return self.provenance.exists() and self._read()["complete"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time; the lock goes with the process, however that ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordInUseError(f"another process is writing {self.path}: wait for it") from None
            yield

    def clear(self) -> None:
        for file in (self.provenance, self.checkpoint, self.curves):
            file.unlink(missing_ok=True)

    def write_provenance(self, complete: bool, device: str, label: str | None = None) -> None:
        content = {
            "config": self.config,
            "complete": complete,
            "label": label,
            "replicas": len(self.config["seeds"]),
            "code_version": code_version(),
            "torch_version": torch.__version__,
            "device": device,
            "threads": torch.get_num_threads(),
            "date": _now(),
        }
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.provenance, lambda path: path.write_text(text))

    def write_curves(self, rows: list[Row]) -> None:
        frame = pd.DataFrame(rows)
        write_atomically(self.curves, lambda path: frame.to_csv(path, index=False, na_rep="nan"))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        # Only this project's runs write here, and optimizer states hold more than plain weights.
        return torch.load(self.checkpoint, map_location=device, weights_only=False)

    def finish(self, device: str, label: str | None = None) -> None:
        self.write_provenance(complete=True, device=device, label=label)
        self.checkpoint.unlink(missing_ok=True)

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """An exception inside leaves ``failure.json`` where the record would be, until training begins again."""
        try:
            yield
        except RecordInUseError:
            raise  # another process is doing it
        except Exception as error:
            with self.locked():
                self._write_failure(error)
            raise

    def _write_failure(self, error: Exception) -> None:
        content = {
            "error": " ".join(f"{type(error).__name__}: {error}".split()),
            "config": self.config,
            "code_version": code_version(),
            "date": _now(),
        }
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.failure, lambda path: path.write_text(text))

    def _read(self) -> dict[str, Any]:
        return json.loads(self.provenance.read_text())


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new or (key in there) != (key in here):
            yield f"{prefix}{key}={old} there, {new} here"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, flush to disk, then replace: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")  # one writer at a time: see RunDirectory.locked
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def code_version() -> str:
    """``git describe`` of the source tree, or the package version outside a checkout."""
    root = Path(kfac2.__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return kfac2.__version__
