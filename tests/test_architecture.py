"""Imports go down only: entry points → training, problems, study, figures → records; experiments → kfac2."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "kfac2.curvature": set(),
    "kfac2.nn": set(),
    "kfac2.optim": {"kfac2.curvature", "kfac2.nn"},
    "experiments.problems": {"kfac2.nn"},
    "experiments.paper": set(),
    "experiments.records": set(),
    "experiments.training": {"experiments.records"},
    # Of the study its arms: no torch.
    "experiments.figures": {"experiments.paper", "experiments.records", "experiments.study"},
    "experiments.study": {"experiments.records", "kfac2.curvature", "kfac2.nn", "kfac2.optim"},
}
ENTRY_POINTS = sorted(
    f"experiments/{path.name}"
    for path in (ROOT / "experiments").glob("*.py")
    if f"experiments.{path.stem}" not in ALLOWED
)
LIBRARIES = {
    "experiments.records": {"numpy", "pandas"},
    "experiments.figures": {"matplotlib", "numpy", "pandas", "scipy"},
}
HOMES = {
    "hydra": ENTRY_POINTS,
    "omegaconf": ENTRY_POINTS,
    "wandb": ["experiments/training/tracking.py"],
}


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


def files_of(room: str) -> list[Path]:
    path = room.replace(".", "/")
    module = ROOT / f"{path}.py"
    return [module] if module.exists() else sources(path)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below(room: str) -> None:
    files = files_of(room)
    assert files
    for path in files:
        ours = {
            ".".join(name.split(".")[:2])
            for name in imports_of(path)
            if name.startswith(("kfac2.", "experiments."))
        }
        assert ours & set(ALLOWED) <= ALLOWED[room] | {room}, path


def test_a_room_is_named_for_each_folder() -> None:
    folders = {
        f"{package}.{path.name}"
        for package in ("kfac2", "experiments")
        for path in (ROOT / package).iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert folders <= set(ALLOWED)


def test_nothing_imports_the_entry_points() -> None:
    entries = {f"experiments.{Path(path).stem}" for path in ENTRY_POINTS} - {"experiments.__init__"}
    for path in sources(
        "kfac2", *(room.replace(".", "/") for room in ALLOWED if room.startswith("experiments"))
    ):
        names = imports_of(path)
        assert not names & entries, path
        assert not {name.split(".")[0] for name in names} & {"scripts", "notebooks", "benchmarks", "tests"}, (
            path
        )


def test_the_optimizer_knows_no_experiment() -> None:
    for path in sources("kfac2"):
        assert "experiments" not in {name.split(".")[0] for name in imports_of(path)}, path


@pytest.mark.parametrize("room", LIBRARIES)
def test_records_and_figures_do_without_torch(room: str) -> None:
    known = LIBRARIES[room] | {"experiments"} | set(sys.stdlib_module_names)
    for path in files_of(room):
        assert {name.split(".")[0] for name in imports_of(path)} <= known, path
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files_of(room)]
    command = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("library", HOMES)
def test_a_framework_stays_in_its_place(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources("kfac2", "experiments", "scripts")
        if library in {name.split(".")[0] for name in imports_of(path)}
    }
    assert users
    assert all(any(user.startswith(home) for home in HOMES[library]) for user in users)
