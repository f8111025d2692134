"""The table of a sweep's records and each optimizer's winner, as a recipe that can be trained.

python -m experiments.select sweep=paper_grid
python -m experiments.select sweep=paper_grid problem=resnet110_cifar10 --list
python -m experiments.select optimizer=sgd,adam optimizer.lr=1e-2,3e-3,1e-3

Takes the arguments of experiments.train (problem, sweep, optimizer, runs, any setting), and trains nothing.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CONFIGS, USER_ERRORS, one_line, user_errors
from experiments.figures.grid import (
    Point,
    grid_markdown,
    grid_table,
    is_decided,
    winners,
    winning_runs,
)
from experiments.figures.markdown import Row
from experiments.identity import identity, run_path
from experiments.overrides import GROUPS, check_overrides, composed, members, parsed
from experiments.paper import OPTIMIZERS
from experiments.records import shared_settings
from experiments.schema import check_settings
from experiments.train import run_directories

OWN = ("sweep", "problem", "optimizer", "runs", "device", "threads")  # with no others, the sweep is whole


class Grid(NamedTuple):
    """The configurations of a sweep; ``configs`` and ``keys``, the swept settings, one entry per point."""

    points: list[Point]
    configs: list[DictConfig]
    keys: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    arguments, overrides = _parse(argv)
    try:
        for name in _optimizers(overrides):
            check_overrides(["-m", f"optimizer={name}", *_without_optimizer(overrides)], CONFIGS)
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            grid = expand(overrides)
            if arguments.list:
                print(listing(grid))
            else:
                summarize(grid, overrides, arguments)
    except USER_ERRORS as error:
        raise SystemExit(f"error: {one_line(error)}") from None


def summarize(grid: Grid, overrides: Sequence[str], arguments: Namespace) -> None:
    """Print and write the table, and write the winners' recipes."""
    config = grid.configs[0]
    problem, runs = config.problem.name, Path(config.runs)
    name = config.sweep.name if config.sweep else "sweep"
    table = grid_table(runs, problem, grid.points)
    best = winning_runs(runs, problem, table) if winners(table) else None
    text = grid_markdown(f"{name}: {problem}", table, best)
    print(text)
    directory = arguments.output or runs / problem
    directory.mkdir(parents=True, exist_ok=True)
    csv, markdown = directory / f"{name}.csv", directory / f"{name}.md"
    table.to_csv(csv, index=False, float_format="%.6g")
    markdown.write_text(text, encoding="utf-8")
    print(f"wrote {csv}\nwrote {markdown}")
    write_recipes(arguments.recipes, grid, table, overrides)


def expand(overrides: Sequence[str]) -> Grid:
    """All configurations of the sweep, in the order in which it trains them, without training any."""
    points, configs, keys = [], [], []
    for name in _optimizers(overrides):
        choices, swept = members([f"optimizer={name}", *_without_optimizer(overrides)])
        for config in composed(choices):
            check_settings(config)
            points.append(_point(config, swept))
            configs.append(config)
            keys += [key for key in swept if key not in keys]
    return Grid(points, configs, keys)


def planned(overrides: Sequence[str]) -> Grid:
    """As ``expand``, by itself; a user's error ends the program with one line."""
    with user_errors(), initialize_config_dir(CONFIGS, version_base="1.3"):
        return expand(overrides)


def listing(grid: Grid) -> str:
    """Every run of the sweep, and how many records they leave."""
    records = [directory for config in grid.configs for directory in run_directories(config)]
    seeds = sum(len(point.seeds) for point in grid.points)
    done = sum(directory.is_complete() for directory in records)
    total = f"{len(grid.points)} configurations, {seeds} trainings, {done} of {len(records)} records complete"
    return "\n".join([*(str(run_path(config)) for config in grid.configs), total])


def write_recipes(directory: Path, grid: Grid, table: pd.DataFrame, overrides: Sequence[str]) -> None:
    """``<directory>/<problem>/<optimizer>_best.yaml`` for each optimizer whose grid is decided.

    Only of a sweep that asks for it (``sweep.recipes``), as it stands: another must not overwrite them.
    """
    sweep, problem = grid.configs[0].sweep, grid.configs[0].problem.name
    foreign = sorted({o.key_or_group for o in parsed(overrides)} - set(OWN))
    if not sweep or not sweep.get("recipes") or foreign:
        print("no recipes written: only a sweep with `recipes: true` has them, and with no other settings")
        return
    for name, winner in winners(table).items():
        path = directory / problem / f"{name}_best.yaml"
        if is_decided(table, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(recipe(grid, name, winner), encoding="utf-8")
            print(f"wrote {path}")
        else:
            print(f"{path}: not written, the grid of {name} is not finished")


def recipe(grid: Grid, optimizer: str, winner: Row) -> str:
    """The winner's settings on top of the paper's, as a file of the group ``recipe``."""
    own = [
        (point, config)
        for point, config in zip(grid.points, grid.configs, strict=True)
        if point.optimizer == optimizer
    ]
    (config,) = (config for point, config in own if point.variant == winner["variant"])
    settings = OmegaConf.create()
    for key in grid.keys:
        if _short(key) in own[0][0].settings:
            OmegaConf.update(settings, key, OmegaConf.select(config, key))
    return (
        "# @package _global_\n"
        f"# The winner of the {len(own)} configurations of sweep={config.sweep.name}, written by experiments.select:\n"
        "# median final training loss {median:.4g} over {seeds} seeds, {diverged:.0f} diverged.\n".format_map(
            winner
        )
        + f"defaults: [/recipe/{config.problem.name}/{optimizer}]\n"
        + OmegaConf.to_yaml(settings)
    )


def _optimizers(overrides: Sequence[str]) -> list[str]:
    """Those asked for, all of the paper's by default."""
    chosen = {o.key_or_group: o for o in parsed(overrides) if o.key_or_group in GROUPS}
    optimizer = chosen.pop("optimizer", None)
    for name, other in chosen.items():
        if other.is_sweep_override():
            raise SystemExit(f"error: one {name} at a time, got {other.input_line}")
    if optimizer is None:
        return list(OPTIMIZERS)
    if optimizer.is_sweep_override():
        return [str(value) for value in optimizer.sweep_string_iterator()]
    return [optimizer.get_value_element_as_str()]


def _without_optimizer(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not override.startswith("optimizer=")]


def _point(config: DictConfig, swept: Sequence[str]) -> Point:
    settings = {_short(key): OmegaConf.select(config, key) for key in swept}
    own = shared_settings(identity(config))
    return Point(config.optimizer.name, run_path(config).name, list(config.seeds), settings, own)


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _parse(argv: Sequence[str] | None) -> tuple[Namespace, list[str]]:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the runs instead, with their number")
    parser.add_argument("--output", type=Path, help="directory of the tables (default: <runs>/<problem>)")
    parser.add_argument("--recipes", type=Path, default=Path(CONFIGS) / "recipe", help="of the winners")
    parser.add_argument("-m", "--multirun", action="store_true", help="accepted as experiments.train's")
    arguments, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if override.startswith("-"):
            parser.error(f"unknown option {override}")
    return arguments, overrides


if __name__ == "__main__":
    main()
