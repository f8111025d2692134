from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments.figures import NoRecordsError, load_runs
from experiments.figures.scales import SCALES, find_resnet

Place = tuple[str, str]
ALL = ("sgd", "adam", "kfac", "two_level_kfac")
ONE = ("sgd",)


@pytest.mark.parametrize(
    ("there", "scale", "expected"),
    [
        pytest.param(
            {("runs", "preview"): ONE, ("results", "preview"): ALL, ("runs", "full"): ALL},
            "preview",
            ("runs", "preview"),
            id="own records of the wanted scale, few as they are",
        ),
        pytest.param(
            {("runs", "full"): ALL, ("results", "preview"): ONE, ("results", "reduced"): ALL},
            "preview",
            ("results", "preview"),
            id="committed records of the wanted scale",
        ),
        pytest.param(
            {("results", "full"): ONE, ("results", "reduced"): ALL, ("results", "preview"): ALL},
            "preview",
            ("results", "preview"),
            id="the wanted scale, not the largest",
        ),
        pytest.param(
            {("results", "full"): ONE, ("results", "reduced"): ALL, ("runs", "full"): ALL},
            "preview",
            ("results", "reduced"),
            id="the largest committed scale with all optimizers",
        ),
        pytest.param(
            {("results", "reduced"): ONE, ("results", "preview"): ONE},
            "full",
            ("results", "reduced"),
            id="whatever is committed",
        ),
        pytest.param({("runs", "preview"): ONE}, "full", ("runs", "preview"), id="whatever there is"),
        pytest.param(
            {("runs", "preview"): ALL, ("runs", "reduced"): ALL, ("runs", "full"): ONE},
            None,
            ("runs", "reduced"),
            id="no scale wanted: the largest with all optimizers",
        ),
        pytest.param(
            {("runs", "full"): ONE, ("results", "preview"): ALL},
            None,
            ("results", "preview"),
            id="no scale wanted: committed records with all optimizers",
        ),
    ],
)
def test_what_is_drawn(
    write_resnet: Callable[..., Path],
    tmp_path: Path,
    there: dict[Place, tuple[str, ...]],
    scale: str | None,
    expected: Place,
) -> None:
    for (root, name), optimizers in there.items():
        for optimizer in optimizers:
            write_resnet(optimizer, root=root, problem=SCALES[name].problem, seeds=[0], epochs=2)
    found = find_resnet(load_runs, tmp_path / "runs", tmp_path / "results", scale)
    root, name = expected
    assert (found.root, found.scale) == (tmp_path / root, SCALES[name])
    assert {run.records[0].problem for run in found.runs.values()} == {SCALES[name].problem}


@pytest.mark.parametrize("scale", ["reduced", None])
def test_nothing_anywhere(tmp_path: Path, scale: str | None) -> None:
    find: Callable[..., Any] = partial(find_resnet, load_runs, tmp_path / "runs", tmp_path / "results")
    with pytest.raises(NoRecordsError, match=SCALES[scale or "preview"].problem) as caught:
        find(scale)
    assert str(tmp_path / "runs") in str(caught.value)
