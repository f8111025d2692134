"""The examples run, and what they train learns."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
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


def test_lightning_trains_alike_whoever_steps() -> None:
    assert losses("lightning_automatic") == losses("lightning_manual")
