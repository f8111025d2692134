"""Copy finished records to where they are committed, packed: python scripts/keep_records.py runs/deep_linear_mlp

Curves are rounded to six significant digits and gzipped. What is there already is left alone.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from kfac2.figures import RecordError, load_record


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="directory of one problem's records, <runs>/<problem>")
    parser.add_argument("--into", type=Path, default=Path("results"), help="default: results")
    arguments = parser.parse_args(argv)
    source = arguments.source
    found = sorted(path.parent for path in source.rglob("provenance.json"))
    if not found:
        raise SystemExit(f"error: no records in {source}")
    for path in found:
        try:
            keep(path, arguments.into / source.name / path.relative_to(source))
        except RecordError as error:
            raise SystemExit(f"error: {error}") from None


def keep(source: Path, target: Path) -> None:
    record = load_record(source)
    if target.exists() or not record.complete:
        print(f"{source}: {'there already' if target.exists() else 'not finished'}, not copied")
        return
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    packed = {"method": "gzip", "mtime": 0}  # the same curves give the same bytes
    record.curves.to_csv(
        partial / "curves.csv.gz", index=False, float_format="%.6g", na_rep="nan", compression=packed
    )
    shutil.copyfile(source / "provenance.json", partial / "provenance.json")
    partial.rename(target)
    print(f"{target}: copied")


if __name__ == "__main__":
    main()
