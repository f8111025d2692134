"""The table of a sweep's records and each optimizer's winner, as a recipe that can be trained.

python -m experiments.select sweep=paper_grid
python -m experiments.select sweep=paper_grid problem=resnet110_cifar10 --list
python -m experiments.select optimizer=sgd,adam optimizer.lr=1e-2,3e-3,1e-3

Takes the arguments of experiments.train (problem, sweep, optimizer, runs, any setting), and trains nothing.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from experiments.identity import run_path
from experiments.overrides import GROUPS, check_overrides
from experiments.train import CONFIGS, run_directories
from kfac2.figures import RecordError
from kfac2.figures.grid import Point, Winner, grid_markdown, grid_table, is_decided, winners, winners_frame
from kfac2.figures.style import OPTIMIZERS

OWN = ("sweep", "problem", "optimizer", "runs")  # with no others, the sweep is whole


class Grid(NamedTuple):
    """The configurations of a sweep; ``configs`` and ``keys``, the swept settings, one entry per point."""

    points: list[Point]
    configs: list[DictConfig]
    keys: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    arguments, overrides = _parse(argv)
    check_overrides(["-m", *(o for o in overrides if not o.startswith("optimizer="))], CONFIGS)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        grid = expand(overrides)
        config = grid.configs[0]
        if arguments.list:
            print(listing(grid))
            return
        problem, runs = config.problem.name, Path(config.runs)
        name = config.sweep.name if config.sweep else "sweep"
        try:
            table = grid_table(runs, problem, grid.points)
            best = winners_frame(runs, problem, table) if winners(table) else None
        except RecordError as error:
            raise SystemExit(f"error: {error}") from None
        text = grid_markdown(f"{name}: {problem}", table, best)
        print(text)
        for path in write_tables(arguments.output or runs / problem, name, table, text):
            print(f"wrote {path}")
        write_recipes(arguments.recipes, grid, table, overrides)


def expand(overrides: Sequence[str]) -> Grid:
    """All configurations of the sweep, in the order in which it trains them, without training any."""
    parsed = {o.key_or_group: o for o in _parsed(overrides)}
    chosen = parsed.pop("optimizer", None)
    names = (
        [str(v) for v in chosen.sweep_string_iterator()] if chosen and chosen.is_sweep_override() else None
    )
    if names is None:
        names = [chosen.get_value_element_as_str()] if chosen else list(OPTIMIZERS)
    others = [o for o in overrides if not o.startswith("optimizer=")]
    points, configs, keys = [], [], []
    for name in names:
        for choice, swept in _configurations([f"optimizer={name}", *others]):
            config = compose("train", overrides=choice)
            points.append(_point(config, swept))
            configs.append(config)
            keys += [key for key in swept if key not in keys]
    return Grid(points, configs, keys)


def listing(grid: Grid) -> str:
    """Every run of the sweep, and how many records they leave."""
    records = [directory for config in grid.configs for directory in run_directories(config)]
    seeds = sum(len(point.seeds) for point in grid.points)
    done = sum(directory.is_complete() for directory in records)
    lines = [str(run_path(config)) for config in grid.configs]
    return "\n".join(
        [
            *lines,
            f"{len(grid.points)} configurations, {seeds} trainings, {done} of {len(records)} records complete",
        ]
    )


def write_tables(directory: Path, name: str, table: Any, text: str) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    csv, markdown = directory / f"{name}.csv", directory / f"{name}.md"
    table.to_csv(csv, index=False, float_format="%.6g")
    markdown.write_text(text, encoding="utf-8")
    return [csv, markdown]


def write_recipes(directory: Path, grid: Grid, table: Any, overrides: Sequence[str]) -> None:
    """``<directory>/<problem>/<optimizer>_best.yaml`` for each optimizer whose grid is decided."""
    config = grid.configs[0]
    foreign = sorted({o.key_or_group for o in _parsed(overrides)} - set(OWN))
    if not config.sweep or foreign:
        print(f"no recipes written: they are a named sweep's, with no other settings ({', '.join(foreign)})")
        return
    for name, winner in winners(table).items():
        path = directory / config.problem.name / f"{name}_best.yaml"
        if is_decided(table, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(recipe(config, name, winner, grid.keys), encoding="utf-8")
            print(f"wrote {path}")
        else:
            print(f"{path}: not written, the grid of {name} is not finished")


def recipe(config: DictConfig, optimizer: str, winner: Winner, keys: Sequence[str]) -> str:
    """The winner's settings on top of the paper's, as a file of the group ``recipe``."""
    settings = OmegaConf.create()
    for key in keys:
        value = winner.row[_short(key)]
        if value == value:  # an optimizer without that setting has NaN
            OmegaConf.update(settings, key, float(value))
    row = winner.row
    return (
        "# @package _global_\n"
        f"# The winner of sweep={config.sweep.name}, written by experiments.select: median final training loss\n"
        f"# {row['median']:.4g} over {row['seeds']} seeds, {row['diverged']:.0f} diverged.\n"
        f"defaults: [/recipe/{config.problem.name}/{optimizer}]\n" + OmegaConf.to_yaml(settings)
    )


def _configurations(overrides: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """As Hydra's sweeper forms them: the overrides of each configuration, and the swept settings."""
    base = [o for o in _parsed(overrides) if not o.is_sweep_override() or o.key_or_group in GROUPS]
    whole = compose("train", overrides=[str(o.input_line) for o in base], return_hydra_config=True)
    params = [f"{key}={value}" for key, value in (whole.hydra.sweeper.params or {}).items()]
    parsed = _parsed([*params, *overrides])
    swept = list(dict.fromkeys(o.key_or_group for o in parsed if o.is_sweep_override()))
    for choice in BasicSweeper.split_arguments(parsed, None)[0]:
        yield choice, swept


def _point(config: DictConfig, swept: Sequence[str]) -> Point:
    settings = {_short(key): OmegaConf.select(config, key) for key in swept}
    return Point(config.optimizer.name, run_path(config).name, list(config.seeds), settings)


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the runs instead, with their number")
    parser.add_argument("--output", type=Path, help="directory of the tables (default: <runs>/<problem>)")
    parser.add_argument("--recipes", type=Path, default=Path(CONFIGS) / "recipe", help="of the winners")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    main()
