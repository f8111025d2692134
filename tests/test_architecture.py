"""Imports go down only: experiments → training, problems, optim → curvature."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["curvature", "nn", "optim", "problems", "training", "figures", "study"]
ALLOWED = {
    "curvature": set(),
    "nn": set(),
    "optim": {"curvature", "nn"},
    "problems": {"nn"},
    "training": set(),
    "figures": set(),
    "study": {"curvature", "nn", "optim"},
}
HOMES = {"hydra": {"experiments"}, "omegaconf": {"experiments"}, "wandb": {"kfac2/training/tracking.py"}}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def files_of(package: str) -> list[Path]:
    module = ROOT / "kfac2" / f"{package}.py"
    return [module] if module.exists() else sources(f"kfac2/{package}")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below(package: str) -> None:
    files = files_of(package)
    assert files
    for path in files:
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("kfac2.")}
        assert ours & set(PACKAGES) <= ALLOWED[package] | {package}, path


def test_nothing_imports_the_entry_points() -> None:
    for path in sources("kfac2"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"experiments", "scripts", "notebooks", "benchmarks", "tests"}, path


@pytest.mark.parametrize("library", HOMES)
def test_a_framework_stays_in_its_place(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources("kfac2", "experiments", "scripts")
        if library in {name.split(".")[0] for name in imports_of(path)}
    }
    assert users
    assert all(any(user.startswith(home) for home in HOMES[library]) for user in users)
