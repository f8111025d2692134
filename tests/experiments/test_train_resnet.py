"""What ``scripts/train_resnet.py --list`` says is trained, and how long the rest takes."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from scripts import train_resnet
from scripts.train_resnet import Planned, main, remaining

ROOT = Path(__file__).resolve().parent.parent.parent
REDUCED = "resnet110_cifar10_reduced"


def test_the_rest_takes_as_long_as_what_is_there() -> None:
    plan = [
        Planned(Path("a"), "sgd", 100, 100, 3600, "cpu, 1 thread"),
        Planned(Path("b"), "sgd", 100, 50, 2700, "cpu, 1 thread"),  # the slower one: 54 seconds an epoch
        Planned(Path("c"), "kfac", 100, 0),
    ]
    assert remaining(plan[:1]) == "nothing is missing"
    assert remaining(plan[2:]) == "how long the rest takes is known once an epoch is trained"
    hours = 54 * (50 + 100) / 3600
    expected = f"the rest takes about {hours:.1f} hours of training, one after another, as on cpu, 1 thread"
    assert remaining(plan) == expected


def test_list_reads_runs_before_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_resnet, "ROOT", tmp_path)
    for seed in (0, 1):
        path = f"{REDUCED}/sgd/paper/seed={seed}"
        shutil.copytree(ROOT / "results" / path, tmp_path / "results" / path)
    begun = tmp_path / "runs" / REDUCED / "sgd/paper/seed=1"
    shutil.copytree(tmp_path / "results" / REDUCED / "sgd/paper/seed=1", begun)
    provenance = json.loads((begun / "provenance.json").read_text())
    (begun / "provenance.json").write_text(json.dumps(provenance | {"complete": False}))
    (curves,) = begun.glob("curves.csv*")
    frame = pd.read_csv(curves).query("epoch <= 6")
    frame.to_csv(begun / "curves.csv", index=False)
    main(["--scale=reduced", "--list", "optimizer=sgd"])
    *lines, total = capsys.readouterr().out.splitlines()
    assert lines == [
        f"results/{REDUCED}/sgd/paper/seed=0: complete",
        f"runs/{REDUCED}/sgd/paper/seed=1: 6 of 15 epochs",
        f"runs/{REDUCED}/sgd/paper/seed=2: 0 of 15 epochs",
    ]
    assert total.startswith("1 of 3 trainings complete; the rest takes about ")


def test_hours_are_the_whole_command_s(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command) or Done())
    with pytest.raises(SystemExit) as ended:
        main(["--scale=preview", "--hours=0.4", "optimizer=sgd"])
    assert ended.value.code == 0
    assert commands[0][-2:] == ["hours=0.4", "optimizer=sgd"]
