"""The examples run, and what they train learns."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
    "ddp": "torch",
    "frozen_body": "torch",
    "huggingface_trainer": "transformers",
    "lightning_automatic": "lightning",
    "lightning_manual": "lightning",
}
"""What each example needs beside torch."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def losses(name: str) -> list[float]:
    pytest.importorskip(NEEDS[name])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_example_learns(name: str) -> None:
    of_steps = losses(name)
    assert of_steps[-1] < 0.6 * of_steps[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_under_torchrun_learn(processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, str(EXAMPLES / "ddp.py")], capture_output=True, text=True, check=True)
    first, last = map(float, re.findall(r"\d\.\d+", done.stdout))
    assert last < 0.6 * first


def test_lightning_trains_alike_whoever_steps() -> None:
    assert losses("lightning_automatic") == losses("lightning_manual")
