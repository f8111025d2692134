"""The walk-throughs of docs/extending.md, done as they are written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
FILE = re.compile(r'^```(\w+) title="(.+?)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^    python (.+)$", re.MULTILINE)
OFFLINE = "tracking=none"


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_a_walk_through_works(section: str, tmp_path: Path) -> None:
    for folder in ("kfac2", "experiments", "configs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "results").symlink_to(ROOT / "results")
    for kind, name, text in FILE.findall(section):
        path = tmp_path / name
        path.write_text(patched(path.read_text(), text) if kind == "diff" else text)
    for command in COMMAND.findall(section):
        settings = [OFFLINE] if "experiments.train" in command else []
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        subprocess.run(
            [sys.executable, *shlex.split(command), *settings], cwd=tmp_path, env=environment, check=True
        )


def patched(source: str, diff: str) -> str:
    """``source`` with its lines of ``-`` and no sign, which stand there once, replaced by those of ``+`` and none."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines(keepends=True)]
    old, new = ("".join(text for sign, text in lines if sign != other) for other in "+-")
    assert source.count(old) == 1
    return source.replace(old, new)
