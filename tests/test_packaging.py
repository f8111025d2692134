"""environment.yml, the lock and pyproject.toml say the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("experiments", "dev")


def test_environment_file_installs_the_same_project() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == [f"-e .[{','.join(EXTRAS)}]"]


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_requirement_is_locked(extra: str | None) -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {normal(line.partition("==")[0]) for line in lines if "==" in line}
    required = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    names = {normal(re.split(r"[\[<>=~! ]", requirement)[0]) for requirement in required}
    assert names
    assert names <= locked


def test_every_locked_file_has_a_hash() -> None:
    text = (ROOT / "requirements.lock").read_text()
    locked = re.findall(r"^[\w.-]+==[^\n]*(?:\n {4}--hash=sha256:[0-9a-f]{64}[^\n]*)+", text, re.MULTILINE)
    assert len(locked) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)) > 50


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def test_type_information_is_shipped() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert all((ROOT / "kfac2" / name).exists() for name in tools["package-data"]["kfac2"])
    assert "py.typed" in tools["package-data"]["kfac2"]
