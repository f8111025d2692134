"""One file per experiment, ``configs/experiment/<problem>.yaml``: the problem, and what each optimizer is trained with.

Its keys: ``problem``, as Hydra's; ``recipe``, the values by section; ``base``, the experiment it changes, if any.
The section ``all`` is every optimizer's; another one is that of the optimizer it names and of all whose settings
extend that optimizer's (``experiments.schema``): two levels share what one level has. Hydra gets them as the options
``problem=<problem>`` and ``recipe=<problem>/<optimizer>``. A sweep's grid, ``configs/grid/<sweep>.yaml``, has such
sections too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHARED_ALONE = "paper"  # a recipe of the section ``all`` and no other


def register_recipes(lineages: Mapping[str, Sequence[str]]) -> None:
    """Store the options of all files for these optimizers, each with the sections that are its own."""
    store = ConfigStore.instance()
    experiments = read(CONFIGS / "experiment")
    for problem, experiment in experiments.items():
        check_keys(f"configs/experiment/{problem}.yaml", experiment, ("base", "problem", "recipe"))
        check_keys(f"configs/experiment/{problem}.yaml, recipe", experiment.recipe, ("all", *lineages))
        store.store(group="problem", name=problem, node=problem_config(experiment))
        for optimizer, lineage in {**lineages, SHARED_ALONE: ()}.items():
            values = recipe(experiments, problem, lineage)
            store.store(group=f"recipe/{problem}", name=optimizer, node=values, package="_global_")
    for sweep, grid in read(CONFIGS / "grid").items():
        check_keys(f"configs/grid/{sweep}.yaml", grid, ("all", *lineages))
        for optimizer, lineage in lineages.items():
            params = {"hydra": {"sweeper": {"params": merged(grid, lineage)}}}
            store.store(group=f"sweep/{sweep}", name=optimizer, node=params, package="_global_")


def read(folder: Path) -> dict[str, DictConfig]:
    """The files of a folder by their stems."""
    return {path.stem: OmegaConf.load(path) for path in sorted(folder.glob("*.yaml"))}  # pyright: ignore


def check_keys(place: str, node: DictConfig, known: Sequence[str]) -> None:
    """Raises ``ValueError`` for a key that nothing would read."""
    for key in node:
        if key not in known:
            raise ValueError(f"{place}: unknown {key!r}; there is: {', '.join(known)}")


def problem_config(experiment: DictConfig) -> dict[str, Any]:
    """The problem's node; that of a derived experiment changes its base's."""
    own = OmegaConf.to_container(experiment.problem)
    assert isinstance(own, dict)
    return {"defaults": [experiment.base, "_self_"], **own} if "base" in experiment else own  # pyright: ignore


def recipe(experiments: Mapping[str, DictConfig], problem: str, lineage: Sequence[str]) -> DictConfig:
    """The values for an optimizer: the base's, then the problem's own, from the general to the particular."""
    own = experiments[problem]
    base = recipe(experiments, own.base, lineage) if "base" in own else {}
    return OmegaConf.merge(base, merged(own.recipe, lineage))  # pyright: ignore


def merged(sections: DictConfig, lineage: Sequence[str]) -> DictConfig:
    return OmegaConf.merge(*(sections.get(name, {}) for name in ("all", *lineage)))  # pyright: ignore
