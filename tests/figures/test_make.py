"""What make runs, and what scripts/reproduce.py then runs, with a stand-in for python that notes its arguments."""

import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NO_CIFAR10 = 3
STAND_IN = """#!/bin/sh
echo "$*" >> {log}
"""


class Make:
    """Runs targets in this repository, in an environment that is a stand-in."""

    def __init__(self, directory: Path):
        self.directory, self.log = directory, directory / "log"
        python = directory / "python"
        python.write_text(STAND_IN.format(log=self.log))
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
        return self.log.read_text().splitlines()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


def test_make_lists_ten_commands(make: Make) -> None:
    names = [line.split()[1] for line in make("help").stdout.splitlines() if line.startswith("  make ")]
    figures = [f"reproduce-figure{number}" for number in (1, 2, 3)]
    assert names == ["setup", "test", "lint", *figures, "sweep", "study", "figures", "benchmark"]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["reproduce-figure1"], "figure1 tracking=wandb"),
        (
            ["reproduce-figure3", "SCALE=reduced", "SEEDS=3,4"],
            "figure3 --scale=reduced --seeds=3,4 tracking=wandb",
        ),
        (["runs-resnet-control", "TRACKING=none"], "resnet-control tracking=none"),
        (["sweep"], "sweep tracking=wandb"),
        (["sweep-mlp"], "sweep tracking=wandb"),
        (["study"], "study tracking=wandb"),
        (["figures"], "figures --committed"),
        (["figure1"], "figure1 --committed"),
        (["figure3", "SCALE=short"], "figure3 --committed --scale=short"),
        (["sweep-figures"], "sweep --committed"),
        (["study-figures"], "study --committed"),
        (["reproduce-figure1", "SCALE="], "figure1 --scale= tracking=wandb"),  # refused there
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_target_is_one_command(make: Make, arguments: list[str], command: str) -> None:
    done = make(*arguments)
    assert done.returncode == 0, done.stderr
    assert make.commands == [f"scripts/reproduce.py {command}"]


Reproduce = Callable[..., list[str]]
REPRODUCE = runpy.run_path(str(ROOT / "scripts" / "reproduce.py"))


@pytest.fixture
def statuses() -> dict[str, int]:
    """What commands end with, by a part of them; 0 otherwise."""
    return {}


@pytest.fixture
def commands() -> list[str]:
    """What the script ran."""
    return []


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch, statuses: dict[str, int], commands: list[str]) -> Reproduce:
    """The script's ``main``, which returns the commands that it runs; without a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def note(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(" ".join(command[1:]))
        status = next((code for part, code in statuses.items() if part in commands[-1]), 0)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", note)

    def main(*arguments: str) -> list[str]:
        commands.clear()
        REPRODUCE["main"](list(arguments))
        return commands

    return main


MLP = "-m experiments.train -m problem=deep_linear_mlp optimizer=two_level_kfac,kfac,adam,sgd hydra/launcher=processes"
FOUR = "optimizer=two_level_kfac,kfac,adam,sgd"
DRAWN = "--records runs --output runs/figures --reference results"


def test_figure1_is_trained_and_drawn(reproduce: Reproduce) -> None:
    assert reproduce("figure1", "tracking=none", "--seeds=3,4") == [
        f"{MLP} tracking=none",
        "scripts/get_cifar10.py",
        f"scripts/train_resnet.py --scale=preview --seeds=3,4 {FOUR} tracking=none",
        f"scripts/plot_figure1.py {DRAWN} --scale=preview",
    ]


def test_a_gpu_trains_the_full_scale(reproduce: Reproduce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "--scale=full" in reproduce("figure3")[1]
    assert "--scale=short" in reproduce("figure3", "--scale=short")[1]


@pytest.mark.parametrize("figure", ["figure1", "figure3"])
def test_without_cifar10_the_figures_are_drawn_all_the_same(
    figure: str, reproduce: Reproduce, statuses: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    statuses["get_cifar10"] = NO_CIFAR10
    last = f"scripts/plot_{figure}.py {DRAWN} --scale=reduced"
    assert reproduce(figure, "--scale=reduced")[-2:] == ["scripts/get_cifar10.py", last]
    assert "no CIFAR-10: the ResNet is not trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "part", "status"),
    [
        ("figure3", "get_cifar10", 1),  # damaged images are not taken for absent ones
        ("resnet", "get_cifar10", NO_CIFAR10),
        ("resnet-control", "get_cifar10", NO_CIFAR10),
        ("figure3", "train_resnet", NO_CIFAR10),
        ("figure2", "experiments.train", 2),
    ],
)
def test_nothing_is_drawn_after_a_failure(
    target: str, part: str, status: int, reproduce: Reproduce, statuses: dict[str, int]
) -> None:
    statuses |= {part: status, "plot": 9}
    with pytest.raises(SystemExit) as exit_:
        reproduce(target)
    assert exit_.value.code == status


def test_control(reproduce: Reproduce) -> None:
    expected = "--scale=full --seeds=3,4 optimizer=sgd,adam training.batch_size=128 tracking=none"
    commands = reproduce("resnet-control", "--scale=full", "--seeds=3,4", "tracking=none")
    assert commands[-1] == f"scripts/train_resnet.py {expected}"


def test_the_sweep_goes_on_after_a_failure_and_says_it_at_the_end(
    reproduce: Reproduce, commands: list[str], statuses: dict[str, int]
) -> None:
    statuses["optimizer=kfac"] = 1
    with pytest.raises(SystemExit) as exit_:
        reproduce("sweep", "tracking=none")
    assert exit_.value.code == 1
    assert [line.partition("optimizer=")[2].split()[0] for line in commands[:4]] == FOUR[10:].split(",")
    assert all("-m problem=deep_linear_mlp sweep=paper_grid" in line for line in commands[:4])
    assert commands[4:] == [
        "-m experiments.select sweep=paper_grid runs=runs",
        "scripts/plot_sweep.py --records runs --output runs/figures",
    ]


def test_the_study_is_drawn_after_a_failure_too(reproduce: Reproduce, statuses: dict[str, int]) -> None:
    assert reproduce("study", "tracking=none") == [
        "scripts/run_study.py tracking=none",
        "scripts/run_decision.py tracking=none",
        "scripts/plot_study.py --records runs --output runs/study",
    ]
    statuses |= {"run_study": 1, "plot_study": 2}
    with pytest.raises(SystemExit) as exit_:
        reproduce("study")
    assert exit_.value.code == 2


def test_committed_figures_are_drawn_and_nothing_is_trained(reproduce: Reproduce) -> None:
    places = "--records results --output results/figures"
    assert reproduce("figures", "--committed", "--scale=reduced") == [
        f"scripts/plot_figure1.py {places} --reference results --scale=reduced",
        f"scripts/plot_figure2.py {places}",
        f"scripts/plot_figure3.py {places} --reference results --scale=reduced",
        "-m experiments.select sweep=paper_grid runs=results",
        f"scripts/plot_sweep.py {places}",
        "scripts/plot_study.py --records results/study --output results/study",
    ]
    assert "--scale" not in reproduce("figure1", "--committed")[0]  # the one that is there


@pytest.mark.parametrize("arguments", [["--scale=huge"], ["--scale="], ["--scael=full"]])
def test_an_unknown_option_is_refused_before_anything_runs(
    reproduce: Reproduce, statuses: dict[str, int], arguments: list[str]
) -> None:
    statuses[""] = 9
    with pytest.raises(SystemExit) as exit_:
        reproduce("figure1", *arguments)
    assert exit_.value.code == 2


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
        ("short", "resnet110_cifar10_short", "[0],[1],[2]"),
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
