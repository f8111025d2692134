"""Copy finished records to where they are committed, packed: python scripts/keep_records.py runs/deep_linear_mlp

Curves, and the tables of the study's measurements, are rounded to six significant digits and gzipped. What is there
already is left alone. The study's go to --into results/study.
"""

import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.records import RecordError, load_record
from experiments.records.files import PROVENANCE, has_curves, read_provenance
from experiments.records.measurements import read_measured

PACKED = {"method": "gzip", "mtime": 0}  # the same table gives the same bytes


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="<runs>/<problem>, or <runs>/<measurement>")
    parser.add_argument("--into", type=Path, default=Path("results"), help="default: results")
    arguments = parser.parse_args(argv)
    source = arguments.source
    found = sorted(path.parent for path in source.rglob(PROVENANCE))
    if not found:
        raise SystemExit(f"error: no records in {source}")
    for path in found:
        try:
            keep(path, arguments.into / source.name / path.relative_to(source))
        except RecordError as error:
            raise SystemExit(f"error: {error}") from None


def keep(source: Path, target: Path) -> None:
    complete = read_provenance(source)["complete"]
    if target.exists() or not complete:
        print(f"{source}: {'there already' if target.exists() else 'not finished'}, not copied")
        return
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, table in tables_of(source).items():
        packed = partial / f"{name}.csv.gz"
        table.to_csv(packed, index=False, float_format="%.6g", na_rep="nan", compression=PACKED)
    shutil.copyfile(source / PROVENANCE, partial / PROVENANCE)
    partial.rename(target)
    print(f"{target}: copied")


def tables_of(source: Path) -> dict[str, pd.DataFrame]:
    if has_curves(source):
        return {"curves": load_record(source).curves}
    tables = {path.stem: read_measured(source, path.stem) for path in sorted(source.glob("*.csv"))}
    if not tables:
        raise RecordError(f"{source} is marked complete and holds no table")
    return tables


if __name__ == "__main__":
    main()
