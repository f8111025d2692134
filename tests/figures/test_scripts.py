import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_main(script: str, *arguments: str | Path) -> None:
    runpy.run_path(str(ROOT / "scripts" / script))["main"]([str(each) for each in arguments])


def run_process(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plot_figure1(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all()
    write_all(root="results")
    places = ("--records", tmp_path / "runs", "--reference", tmp_path / "results")
    output = tmp_path / "figures"
    done = run_process("plot_figure1.py", *places, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "Verdict: reproduced" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        "figure1.pdf",
        "figure1.png",
        "figure1_seconds.pdf",
        "figure1_seconds.png",
        "figure1.md",
    }
    assert (output / "figure1.md").read_text() in done.stdout


def test_a_failed_reproduction_is_said_plainly(
    write_record: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record("kfac")
    write_record("two_level_kfac", edit=lambda curves: curves.update(curves[["train_loss"]] * 5))
    places = ("--records", tmp_path / "runs", "--reference", tmp_path / "absent")
    run_main("plot_figure1.py", *places, "--output", tmp_path / "figures")
    assert "Verdict: not reproduced" in capsys.readouterr().out


def test_committed_records_are_not_compared_with_themselves(
    write_all: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(root="results")
    places = ("--records", tmp_path / "results", "--reference", tmp_path / "results")
    run_main("plot_figure1.py", *places, "--output", tmp_path / "figures")
    out = capsys.readouterr().out
    assert "These are the committed records themselves." in out
    assert "committed median" not in out
    assert "two-level median at epoch 100 at most 0.8" in out


def test_plot_figure2(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all(variant="training.epochs=5", epochs=5)
    places = ("--records", tmp_path / "runs", "--output", tmp_path / "figures")
    run_main("plot_figure2.py", *places, "--variant", "training.epochs=5")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"figure2.pdf", "figure2.png"}


def test_no_records_fails_with_the_command(tmp_path: Path) -> None:
    # A SystemExit with a message prints it to stderr and exits with status 1.
    for script in ("plot_figure1.py", "plot_figure2.py"):
        with pytest.raises(SystemExit, match=r"^error: no records .*python -m experiments\.train"):
            run_main(script, "--records", tmp_path, "--output", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_damaged_reference_is_an_error(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("kfac")
    (write_record("kfac", root="results") / "curves.csv").write_text("")
    places = ("--records", tmp_path / "runs", "--reference", tmp_path / "results")
    with pytest.raises(SystemExit, match="is damaged"):
        run_main("plot_figure1.py", *places, "--output", tmp_path / "figures")


def test_figures_need_only_records_and_plotting_libraries() -> None:
    allowed = {"kfac2.figures", "matplotlib", "numpy", "pandas", "scipy"}
    for source in (ROOT / "kfac2" / "figures").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "."]
            for module in modules:
                top = ".".join(module.split(".")[: 2 if module.startswith("kfac2") else 1])
                assert top in allowed | sys.stdlib_module_names, f"{source.name}: {module}"
