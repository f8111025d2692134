"""What make runs, with a stand-in for python that writes down its arguments."""

import os
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NO_CIFAR10 = 3
STAND_IN = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
-c*) echo preview ;;
scripts/get_cifar10.py) exit {status} ;;
esac
"""


class Make:
    """Runs targets in this repository, in an environment that is a stand-in."""

    def __init__(self, directory: Path, cifar10_status: int = 0):
        self.directory, self.log = directory, directory / "log"
        python = directory / "python"
        python.write_text(STAND_IN.format(log=self.log, status=cifar10_status))
        python.chmod(0o755)
        (directory / "ready").touch()

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "SCALE")}
        command = ["make", "-C", str(ROOT), f"BIN={self.directory}", f"READY={self.directory / 'ready'}"]
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    @property
    def commands(self) -> list[str]:
        """What python ran, without finding out the scale."""
        return [line for line in self.log.read_text().splitlines() if not line.startswith("-c")]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


def starts(commands: list[str]) -> list[str]:
    return [command.split(" ")[0] + command.partition("--scale")[2][:8] for command in commands]


def test_reproduce_figure1(make: Make) -> None:
    done = make("reproduce-figure1")
    assert done.returncode == 0, done.stderr
    assert starts(make.commands) == [
        "-m",
        "scripts/get_cifar10.py",
        "scripts/train_resnet.py=preview",
        "scripts/plot_figure1.py=preview",
    ]
    assert "problem=deep_linear_mlp" in make.commands[0]
    assert make.commands[2].endswith("optimizer=two_level_kfac,kfac,adam,sgd")


def test_without_cifar10_the_figures_are_drawn_all_the_same(tmp_path: Path) -> None:
    make = Make(tmp_path, NO_CIFAR10)
    for figure in ("figure1", "figure3"):
        make.log.write_text("")
        done = make(f"reproduce-{figure}", "SCALE=reduced")
        assert done.returncode == 0, done.stderr
        assert "no CIFAR-10: the ResNet is not trained" in done.stdout
        assert starts(make.commands)[-2:] == ["scripts/get_cifar10.py", f"scripts/plot_{figure}.py=reduced"]


def test_damaged_images_are_not_taken_for_absent_ones(tmp_path: Path) -> None:
    make = Make(tmp_path, cifar10_status=1)
    assert make("reproduce-figure3").returncode != 0
    assert make.commands == ["scripts/get_cifar10.py"]


@pytest.mark.parametrize("target", ["runs-resnet", "runs-resnet-control"])
def test_training_without_cifar10_fails(tmp_path: Path, target: str) -> None:
    make = Make(tmp_path, NO_CIFAR10)
    assert make(target).returncode != 0
    assert make.commands == ["scripts/get_cifar10.py"]


def test_control(make: Make) -> None:
    done = make("runs-resnet-control", "SCALE=full", "SEEDS=3,4", "TRACKING=none")
    assert done.returncode == 0, done.stderr
    expected = "--scale=full --seeds=3,4 tracking=none optimizer=sgd,adam training.batch_size=128"
    assert make.commands[-1] == f"scripts/train_resnet.py {expected}"


def test_committed_figures_have_the_scale_that_is_there(make: Make) -> None:
    assert make("figure1", "figure3").returncode == 0
    assert all("--scale" not in command for command in make.commands)
    assert make("figure3", "SCALE=reduced").returncode == 0
    assert make.commands[-1].endswith("--scale=reduced")


@pytest.mark.parametrize("scale", ["huge", "", "full reduced"])
def test_an_unknown_scale_is_refused_before_anything_runs(make: Make, scale: str) -> None:
    done = make("reproduce-figure1", f"SCALE={scale}")
    assert done.returncode != 0
    assert f"SCALE={scale}: choose preview, reduced or full" in done.stderr
    assert not make.log.exists()


@pytest.fixture
def train_resnet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's ``main``, which returns what would be run and with which status it then exits."""
    commands = []

    def record(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=3)

    main = runpy.run_path(str(ROOT / "scripts" / "train_resnet.py"))["main"]
    monkeypatch.setattr(subprocess, "run", record)

    def run(*arguments: str) -> tuple[list[str], Any]:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        return commands[-1][1:], exit_.value.code

    return run


@pytest.mark.parametrize(
    ("scale", "problem", "seeds"),
    [
        ("full", "resnet110_cifar10", "[0],[1],[2],[3],[4]"),
        ("reduced", "resnet110_cifar10_reduced", "[0],[1],[2]"),
        ("preview", "resnet20_cifar10_preview", "[0],[1],[2],[3],[4]"),
    ],
)
def test_what_is_trained_on_a_cpu(
    train_resnet: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scale: str,
    problem: str,
    seeds: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command, status = train_resnet(f"--scale={scale}", "optimizer=sgd,adam")
    expected = [
        "-m",
        f"problem={problem}",
        f"seeds={seeds}",
        "hydra/launcher=processes",
        "optimizer=sgd,adam",
    ]
    assert command == ["-m", "experiments.train", *expected]
    assert status == 3
    assert f"at {scale} scale on the CPU" in capsys.readouterr().out


def test_what_is_trained_on_a_gpu(train_resnet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command, _ = train_resnet("--scale=full", "--seeds=3,4")
    assert command[3:] == ["problem=resnet110_cifar10", "seeds=[3],[4]", "device=cuda"]


def test_sweep_mlp_goes_on_after_a_failure_and_says_it_at_the_end(tmp_path: Path) -> None:
    make = Make(tmp_path)
    python = tmp_path / "python"
    python.write_text(python.read_text() + "case $* in *optimizer=kfac) exit 1 ;; esac\n")
    done = make("sweep-mlp")
    assert done.returncode != 0
    swept = [line.rpartition("optimizer=")[2] for line in make.commands if "experiments.train -m" in line]
    assert swept == ["two_level_kfac", "kfac", "adam", "sgd"]
    assert all("sweep=paper_grid" in line for line in make.commands[:4])
    assert [line.split(" ")[:2] for line in make.commands[4:]] == [
        ["-m", "experiments.select"],
        ["scripts/plot_sweep.py", "--records"],
    ]


def test_sweep_figures_come_from_the_committed_records(make: Make) -> None:
    assert make("sweep-figures").returncode == 0
    assert [line for line in make.commands if "experiments.train" in line] == []
    assert "runs=results" in make.commands[0]
    assert "--records results --output results/figures" in make.commands[1]
