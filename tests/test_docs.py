"""The pages are short where they must be, their links and commands lead somewhere, and the site builds."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.overrides import check_overrides
from experiments.train import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)#:\s]+)[)#]")
TRAINING = re.compile(r"^    python -m experiments\.(train|select) ((?:.*\\\n)*.*)", re.MULTILINE)
TARGETS = re.compile(r"(?:`|^    )make ((?:[a-z][a-z0-9-]*[ `\n])+)", re.MULTILINE)


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).is_file()]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}\n" in navigation for page in (ROOT / "docs").glob("*.md"))


def commands() -> list[str]:
    """Of the entry points, in the form in which a training takes them."""
    found = [command for page in PAGES for command in TRAINING.findall(page.read_text())]
    plain = {(entry, rest.partition(" #")[0].replace("\\\n", " ").strip()) for entry, rest in found}
    return sorted(f"-m {rest.removesuffix('--list')}" if entry == "select" else rest for entry, rest in plain)


@pytest.mark.parametrize("command", commands())
def test_commands_name_settings_that_exist(command: str) -> None:
    check_overrides(shlex.split(command), CONFIGS)


def test_make_knows_the_targets() -> None:
    found = " ".join(" ".join(TARGETS.findall(page.read_text())) for page in PAGES)
    targets = sorted(set(found.replace("`", " ").split()))
    assert "test" in targets
    command = ["make", "--dry-run", "--old-file=.venv/.ready", *targets]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", ["README.md", "docs/optimizer.md"])
def test_the_first_example_trains(page: str) -> None:
    match = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert match
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    loader = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    exec(match.group(1), {"nn": nn, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()})
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "index.html").exists()
