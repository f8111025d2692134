"""What is shown of several trainings: on a terminal, in a log, and by a training that stands alone."""

import io
import os
import time
from pathlib import Path

import pytest

from experiments.training import progress
from experiments.training.progress import Report, State, command_began, shown, summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_left_counts_what_this_command_trained() -> None:
    ended = State("a", 0, 10, 10, "", ended=True)
    skipped = State("b", 0, 0, 0, "", ended=True)
    resumed = State("c", 5, 10, 20, "loss 1", ended=False)  # a quarter of a training in this command
    assert summary([], 20, 30) == "0 of 20 trainings, 0:00:30"
    # 1.25 trainings in 100 seconds, 17.5 ahead.
    assert summary([ended, skipped, resumed], 20, 100) == "2 of 20 trainings, 0:01:40, about 0:23:20 left"
    assert summary([ended], 1, 100) == "1 of 1 trainings, 0:01:40"
    assert summary([ended, resumed._replace(ended=True)], 2, 100) == "1 of 2 trainings, 0:01:40"


def train_two() -> None:
    with Report("first") as report:
        report(0, 4)
        report(4, 4, "loss 0.1")
    with Report("second") as report:
        report(2, 4)
        report(3, 4, "loss 0.2")
        time.sleep(1.5)
        report(4, 4, "loss 0.2")


def test_a_terminal_shows_the_whole_and_those_under_way() -> None:
    stream = Terminal()
    with shown(20, stream):
        train_two()
    drawn = stream.getvalue()
    assert "1 of 20 trainings, 0:00:01, about " in drawn
    assert f"{'█' * 15}{'·' * 5} second 3/4 loss 0.2" in drawn
    assert "first" not in drawn
    assert "\r\x1b[J2 of 20 trainings, 0:00:02, about " in drawn
    assert drawn.endswith("left\n")


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.6)
    stream = io.StringIO()
    with shown(3, stream):
        train_two()
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= 4
    assert lines[0].startswith("1 of 3 trainings, 0:00:01, about ")
    assert lines[0].endswith("; second 3/4 loss 0.2")
    assert lines[-1].startswith("2 of 3 trainings, ")
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_failure_has_no_summary() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), shown(1, stream), Report("it"):
        raise ValueError("broken")
    assert stream.getvalue() == ""
    assert progress.VARIABLE not in os.environ


def test_a_training_alone_prints_its_own_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "on another machine"))
    with Report("alone") as report:
        report(3, 9, "loss 2")
    assert capsys.readouterr().err.splitlines()[0] == "alone 3/9 loss 2"


def test_all_trainings_of_a_command_began_with_it() -> None:
    with shown(1, io.StringIO()):
        began = command_began()
        time.sleep(0.05)
        assert command_began() == began
    assert command_began() > began
