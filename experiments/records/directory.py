"""Writing a record: one writer at a time, every file replaced atomically, complete or marked incomplete."""

import fcntl
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.records.files import (
    CHECKPOINT,
    CURVES,
    FAILURE,
    PROVENANCE,
    RecordError,
    config_value,
    flatten,
    read_provenance,
    write_atomically,
)

Row = dict[str, Any]


class RecordInUseError(RuntimeError):
    """Another process is writing the record."""


class OtherRecordError(RecordError):
    """The directory holds the record of another configuration."""


class RecordDirectory:
    """The files of one record; ``config`` is its identity.

    A record that cannot be read is an error only where it is asked for: ``clear`` makes room for a new one.

    Raises:
        OtherRecordError: the directory holds the record of another configuration.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config
        self.checkpoint = path / CHECKPOINT
        self.curves = path / f"{CURVES}.csv"
        self.provenance = path / PROVENANCE
        self.failure = path / FAILURE
        if (other := self._config_there() or config) != config:
            raise OtherRecordError(
                f"{path} holds the record of another configuration ({', '.join(_differences(other, config))}):"
                " move it away, or set runs=..."
            )

    def is_complete(self) -> bool:
        """Raises ``RecordError`` if the provenance is damaged."""
        return self.provenance.exists() and self._read()["complete"]

    @property
    def label(self) -> str | None:
        """What the record that is there must say on its face."""
        return self._read().get("label") if self.provenance.exists() else None

    def check_label(self, label: str | None) -> None:
        """Raises ``ValueError`` if the record was begun under another label, hence on other data."""
        if self.provenance.exists() and self.label != label:
            raise ValueError(
                f"{self.path} was begun as {self.label!r} and cannot go on as {label!r}: give it the data that it "
                "was begun with, or rerun=true"
            )

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
        """Remove the record, damaged or not."""
        for file in (self.provenance, self.checkpoint, self.curves):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise RecordError(f"{file} cannot be replaced ({error.strerror}); move it away") from None

    def write_curves(self, rows: Sequence[Row]) -> None:
        self.write_table(CURVES, rows)

    def write_table(self, name: str, rows: Sequence[Row]) -> None:
        frame = pd.DataFrame(rows)
        write_atomically(
            self.path / f"{name}.csv", lambda path: frame.to_csv(path, index=False, na_rep="nan")
        )

    def origin(self, device: str) -> dict[str, Any]:
        """What computes the numbers, besides this code."""
        return {"device": device}

    def write_provenance(self, complete: bool, device: str, label: str | None = None) -> None:
        content = {
            "config": self.config,
            "complete": complete,
            "label": label,
            "replicas": len(self.config["seeds"]),
            "code_version": code_version(),
            **self.origin(device),
            "date": _now(),
        }
        _write_json(self.provenance, content)

    def finish(self, device: str, label: str | None = None) -> None:
        self.write_provenance(True, device, label)
        self.checkpoint.unlink(missing_ok=True)

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """An exception inside leaves ``failure.json`` where the record would be, until training begins again."""
        try:
            yield
        except RecordInUseError:
            raise  # another process is doing it
        except Exception as error:
            # A full disk takes no failure either: the first error counts.
            with suppress(OSError), self.locked():
                content = {
                    "error": " ".join(f"{type(error).__name__}: {error}".split()),
                    "config": self.config,
                    "code_version": code_version(),
                    "date": _now(),
                }
                _write_json(self.failure, content)
            raise

    def _config_there(self) -> dict[str, Any] | None:
        try:
            return self._read()["config"]
        except RecordError:
            return None

    def _read(self) -> dict[str, Any]:
        provenance = read_provenance(self.path)
        config_value(provenance, self.path)
        return provenance


def code_version() -> str:
    """``git describe`` of the source tree, or the package version outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("kfac2")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _differences(there: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    there, here = flatten(there), flatten(here)
    for key in sorted(there.keys() | here.keys()):
        if key not in there or key not in here or there[key] != here[key]:
            yield f"{key}={there.get(key)} there, {here.get(key)} here"
