"""What a record's files are called, where they lie, and how they are read and written.

A record is a directory ``<root>/<problem>/<optimizer>/<variant>/``, or ``seed=<s>/`` in it where every
seed is trained alone. A training's record holds ``curves.csv``, one row per (seed, epoch); a measurement's
its own tables. All hold ``provenance.json``, the resolved configuration and where the numbers come from.
Committed tables are gzipped (``curves.csv.gz``).
"""

import errno
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd

CURVES = "curves"
PROVENANCE = "provenance.json"
CHECKPOINT = "checkpoint.pt"
FAILURE = "failure.json"
PACKED = ".gz"
SEED_PREFIX = "seed="
PAPER = "paper"
"""The variant with the paper's settings; others are named by what differs."""

MAKE_AGAIN = "make it again with rerun=true"
DAMAGED = (
    pd.errors.EmptyDataError,
    pd.errors.ParserError,
    UnicodeDecodeError,
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
)
PARTS = ("problem", "optimizer", "training")
KINDS = {"label": str | None, "device": str, "threads": int | None, "config": dict}


class RecordError(ValueError):
    """A record that cannot be read, or contradicts itself."""


class NoRecordsError(RecordError):
    """There is nothing to read where records were expected."""


def seed_directory(variant: Path, seed: int) -> Path:
    """Where the record of a seed lies that is trained alone."""
    return variant / f"{SEED_PREFIX}{seed}"


def table_path(directory: Path, name: str) -> Path:
    """A table of a record, plain rather than packed."""
    plain = directory / f"{name}.csv"
    packed = directory / f"{name}.csv{PACKED}"
    return packed if packed.exists() and not plain.exists() else plain


def has_curves(directory: Path) -> bool:
    return table_path(directory, CURVES).exists()


def is_record(directory: Path) -> bool:
    """Whether there is a record, perhaps half a one."""
    return (directory / PROVENANCE).exists() or has_curves(directory)


def read_table(path: Path, remedy: str = MAKE_AGAIN) -> pd.DataFrame:
    """A CSV file, packed or not.

    Raises:
        NoRecordsError: there is none.
        RecordError: it is damaged; the message ends with the ``remedy``.
    """
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == PACKED else content
        table = pd.read_csv(io.BytesIO(text))
    except FileNotFoundError:
        raise NoRecordsError(f"{path} does not exist; {remedy}") from None
    except DAMAGED as error:
        raise RecordError(f"{path} is damaged ({error}); {remedy}") from error
    except OSError as error:
        raise _unreadable(path, error) from None
    if not text.endswith(b"\n"):
        raise RecordError(f"{path} is damaged: its last line is cut off; {remedy}")
    return table


def check_numbers(path: Path, table: pd.DataFrame, columns: Iterable[str], remedy: str = MAKE_AGAIN) -> None:
    """Raises ``RecordError`` if the table lacks a column, or has one with a word in it."""
    columns = list(columns)
    if missing := [column for column in columns if column not in table]:
        raise RecordError(f"{path} lacks the columns {', '.join(missing)}; {remedy}")
    words = [c for c in columns if len(table) and not pd.api.types.is_numeric_dtype(table[c])]
    if words:
        raise RecordError(
            f"{path} is damaged: not a number in every row of {', '.join(map(str, words))}; {remedy}"
        )


def read_json(path: Path, remedy: str = MAKE_AGAIN) -> Any:
    """Raises as ``read_table`` does."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoRecordsError(f"{path} does not exist: not a record, or an unfinished copy") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not valid JSON ({error}); {remedy}") from error
    except OSError as error:
        raise _unreadable(path, error) from None


def read_provenance(directory: Path) -> dict[str, Any]:
    """A record's provenance, each entry of the kind that it should be.

    Raises:
        NoRecordsError: there is none.
        RecordError: it is damaged, or of the wrong kind.
    """
    path = directory / PROVENANCE
    provenance = read_json(path)
    if not isinstance(provenance, dict) or not isinstance(provenance.get("complete"), bool):
        raise RecordError(f"{path} lacks 'complete: true' or 'complete: false'; {MAKE_AGAIN}")
    config = provenance.get("config", {})
    wrong = [
        name for name, kind in KINDS.items() if name in provenance and not isinstance(provenance[name], kind)
    ]
    if "config" not in wrong:
        wrong += [f"config.{part}" for part in PARTS if not isinstance(config.get(part, {}), dict)]
        wrong += ["config.seeds"] if not _are_whole(config.get("seeds", [])) else []
    if wrong:
        raise RecordError(f"{path} is damaged: {', '.join(wrong)} of the wrong kind; {MAKE_AGAIN}")
    return provenance


def read_failure(path: Path) -> str:
    """Why a training failed, as its ``failure.json`` says; raises ``RecordError`` if that is damaged."""
    try:
        return str(read_json(path)["error"])
    except (RecordError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is damaged ({error}): remove it") from None


def config_value(provenance: dict[str, Any], directory: Path, *keys: str) -> Any:
    """An entry of the configuration; raises ``RecordError`` if it is not there."""
    try:
        return reduce(lambda node, key: node[key], keys, provenance["config"])
    except (KeyError, TypeError):
        name = ".".join(("config", *keys))
        raise RecordError(f"{directory / PROVENANCE} lacks '{name}'; {MAKE_AGAIN}") from None


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Its entries by their dotted names."""
    flat: dict[str, Any] = {}
    for key, entry in nested.items():
        flat |= flatten(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {f"{prefix}{key}": entry}
    return flat


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, flush to disk, then replace: a reader sees the old file or the new one.

    Raises:
        OSError: it could not be written; the message says so if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one writer at a time: see RecordDirectory.locked
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"{error.strerror}: the disk is full, {path} could not be written; make room and run it again"
        )
        raise OSError(error.errno, message) from None
    finally:
        temporary.unlink(missing_ok=True)


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _unreadable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"{path} cannot be read ({error.strerror or error}); move it away")
