"""Records as they are committed: curves rounded and gzipped."""

import gzip
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from experiments.records import RecordError, load_measurement, load_record, load_runs
from tests.figures.conftest import write_files

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]
main = runpy.run_path(str(ROOT / "scripts" / "keep_records.py"))["main"]


def keep(tmp_path: Path, problem: str = "deep_linear_mlp") -> Path:
    main([str(tmp_path / "runs" / problem), "--into", str(tmp_path / "results")])
    return tmp_path / "results" / problem


def test_packed_curves_are_the_same_to_six_digits(write_record: Write, tmp_path: Path) -> None:
    def edit(curves: pd.DataFrame) -> None:
        curves.loc[3, "train_loss"] = float("nan")
        curves.loc[4, "test_loss"] = float("inf")

    plain = load_record(write_record("sgd", epochs=4, edit=edit))
    kept = keep(tmp_path)
    packed = load_record(kept / "sgd" / "paper")
    pd.testing.assert_frame_equal(packed.curves, plain.curves, rtol=1e-5)
    assert packed.provenance == plain.provenance
    before = (kept / "sgd" / "paper" / "curves.csv.gz").read_bytes()
    again = tmp_path / "again"
    main([str(tmp_path / "runs" / "deep_linear_mlp"), "--into", str(again)])
    assert (again / "deep_linear_mlp" / "sgd" / "paper" / "curves.csv.gz").read_bytes() == before


def test_what_is_there_or_unfinished_is_left_alone(
    write_record: Write, write_resnet: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record("sgd", epochs=2)
    write_record("adam", epochs=2, complete=False)
    old = write_record("sgd", root="results", epochs=5)
    kept = keep(tmp_path)
    assert {path.name for path in old.iterdir()} == {"curves.csv", "provenance.json"}
    assert not (kept / "adam").exists()
    out = capsys.readouterr().out
    assert "there already, not copied" in out
    assert "not finished, not copied" in out
    write_resnet("sgd", seeds=[0, 2])
    resnets = keep(tmp_path, "resnet20_cifar10_preview")
    assert load_runs(resnets.parent, resnets.name)["sgd"].seeds == [0, 2]


def test_plain_curves_come_before_packed_ones(write_record: Write, tmp_path: Path) -> None:
    path = write_record("sgd", epochs=2)
    (path / "curves.csv.gz").write_bytes(b"not gzip")
    assert len(load_record(path).curves) == 10


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"x" + data, lambda data: b""])
def test_damaged_packed_curves(write_record: Write, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_record("sgd", epochs=2)
    path = keep(tmp_path) / "sgd" / "paper" / "curves.csv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordError, match=r"curves\.csv\.gz is damaged"):
        load_record(path.parent)


def test_packed_curves_that_were_cut_off_before_packing(write_record: Write, tmp_path: Path) -> None:
    write_record("sgd", epochs=2)
    path = keep(tmp_path) / "sgd" / "paper" / "curves.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-2]))
    with pytest.raises(RecordError, match="last line is cut off"):
        load_record(path.parent)


def test_no_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no records in"):
        keep(tmp_path)


def test_a_measurement_s_tables_are_packed(tmp_path: Path) -> None:
    source = tmp_path / "runs" / "microscope" / "kfac" / "paper" / "seed=1"
    write_files(source, pd.DataFrame(), {"complete": True, "label": None})
    (source / "curves.csv").unlink()
    pd.DataFrame({"seed": [1], "distance": [1 / 3]}).to_csv(source / "coarse.csv", index=False)
    pd.DataFrame({"seed": [1], "eigenvalue": [float("nan")]}).to_csv(source / "spectrum.csv", index=False)
    keep(tmp_path, "microscope")
    coarse = load_measurement(tmp_path / "results", "microscope", "kfac/paper", "coarse")
    assert coarse["distance"].tolist() == [0.333333]
    spectrum = load_measurement(tmp_path / "results", "microscope", "kfac/paper", "spectrum")
    assert math.isnan(spectrum["eigenvalue"].item())


def test_a_finished_record_without_a_table_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "runs" / "microscope" / "kfac" / "paper" / "seed=1"
    write_files(source, pd.DataFrame(), {"complete": True})
    (source / "curves.csv").unlink()
    with pytest.raises(SystemExit, match="is marked complete and holds no table"):
        keep(tmp_path, "microscope")
