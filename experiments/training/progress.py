"""How far the trainings of one command are, whichever processes they run in.

Each training notes its state in a file of its own, in a directory that the processes of the command find by an
environment variable. A thread of the first process draws them all: on a terminal one line for the whole and a bar for
each training under way, elsewhere one plain line at intervals. Where there is no such directory (a cluster's job, a
notebook) a training prints plain lines of its own.
"""

import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TextIO

VARIABLE = "KFAC2_COMMAND"
BEGAN = "began"
SECONDS_BETWEEN_LINES = 60
BAR = 20  # characters


class State(NamedTuple):
    """Of one training; ``first``, the epochs that an earlier command had trained."""

    name: str
    first: int
    epoch: int
    epochs: int
    note: str
    ended: bool

    def __str__(self) -> str:
        return f"{self.name} {self.epoch}/{self.epochs} {self.note}".rstrip()


class Report:
    """Tells how far one training is, as a context: ``report(epoch, epochs, note)``, first where it begins."""

    def __init__(self, name: str):
        home = _home()
        self._state = State(name, 0, 0, 0, "", ended=False)
        self._file = home / f"{uuid.uuid4().hex}.json" if home else None
        self._printed = time.monotonic()

    def __enter__(self) -> "Report":
        return self

    def __call__(self, epoch: int, epochs: int, note: str = "") -> None:
        first = self._state.first if self._state.epochs else epoch
        self._state = self._state._replace(first=first, epoch=epoch, epochs=epochs, note=note)
        self._tell()

    @property
    def note(self) -> str:
        """What was told last, such as the losses."""
        return self._state.note

    def __exit__(self, error: object, *_: object) -> None:
        self._state = self._state._replace(ended=True)
        if error is None or self._state.epochs:  # what fails before it begins has nothing to say
            self._tell()

    def _tell(self) -> None:
        if self._file and self._file.parent.is_dir():
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._state))
            temporary.replace(self._file)
        elif time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(self._state, file=sys.stderr, flush=True)


def command_began() -> float:
    """When the command began that this training belongs to, as ``time.time``; now, where it stands alone."""
    home = _home()
    return (home / BEGAN).stat().st_mtime if home else time.time()


@contextmanager
def shown(trainings: int, stream: TextIO = sys.stderr) -> Iterator[None]:
    """Show the progress of so many trainings while the context lasts."""
    with TemporaryDirectory(prefix="kfac2-", ignore_cleanup_errors=True) as folder:
        home, over = Path(folder), threading.Event()
        (home / BEGAN).touch()
        os.environ[VARIABLE] = folder
        draw = _draw_on_terminal if stream.isatty() else _print_lines
        began = time.monotonic()
        thread = threading.Thread(target=draw, args=(home, trainings, over, stream), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            del os.environ[VARIABLE]
        print(summary(_states(home), trainings, time.monotonic() - began), file=stream, flush=True)


def summary(states: Sequence[State], trainings: int, seconds: float) -> str:
    """``n of 20 trainings, 0:10:00 left``; ``seconds`` since the command began."""
    complete = sum(state.ended and state.epoch == state.epochs for state in states)
    known = [state for state in states if state.epochs]
    trained = sum((state.epoch - state.first) / state.epochs for state in known)
    ahead = trainings - sum(1 if state.ended else state.epoch / max(1, state.epochs) for state in states)
    left = f", about {_clock(seconds * ahead / trained)} left" if trained and ahead else ""
    return f"{complete} of {trainings} trainings, {_clock(seconds)}{left}"


def _home() -> Path | None:
    """The directory of the command's states, if there is one on this machine."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder and (Path(folder) / BEGAN).exists() else None


def _states(home: Path) -> list[State]:
    return [State(*json.loads(file.read_text())) for file in sorted(home.glob("*.json"))]


def _under_way(states: Sequence[State]) -> list[State]:
    return sorted(state for state in states if state.epochs and not state.ended)


def _print_lines(home: Path, trainings: int, over: threading.Event, stream: TextIO) -> None:
    began = time.monotonic()
    while not over.wait(SECONDS_BETWEEN_LINES):
        states = _states(home)
        line = summary(states, trainings, time.monotonic() - began)
        print("; ".join([line, *map(str, _under_way(states))]), file=stream, flush=True)


def _draw_on_terminal(home: Path, trainings: int, over: threading.Event, stream: TextIO) -> None:
    """The cursor rests on an empty line above the drawing, where what others print finds room."""
    began = time.monotonic()
    while not over.wait(1):
        states = _states(home)
        lines = [_bar(state) for state in _under_way(states)]
        if trainings > 1:
            lines = [summary(states, trainings, time.monotonic() - began), *lines]
        width, height = shutil.get_terminal_size()
        shown = ["", *(line[: width - 1] for line in lines[: height - 2])]
        stream.write("\r\x1b[J" + "\n".join(shown) + f"\x1b[{len(shown) - 1}A\r" * (len(shown) > 1))
        stream.flush()
    stream.write("\r\x1b[J")
    stream.flush()


def _bar(state: State) -> str:
    full = BAR * state.epoch // state.epochs
    return f"{'█' * full}{'·' * (BAR - full)} {state}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
