"""A run's identity is its resolved configuration; its directory says how that differs from the paper's."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from experiments.records.files import PAPER, flatten

IDENTITY = ("problem", "optimizer", "training", "seeds", "device", "threads")
BOOKKEEPING = ("label", "data")  # what is said of the images and where they lie
LATER = {"coarse_damping": "identity", "coarse_max_ratio": None, "compile": False, "adaptive_damping": False}
"""Settings that the first records do not name, with the value that those were made with: it goes unsaid."""
LATER_OF = {"deep_linear_mlp": {"layer_norm": False}}
"""The same for one problem's own."""
LONGEST_NAME = 150


def identity(config: DictConfig) -> dict[str, Any]:
    """The resolved settings that determine the curves, without Hydra's bookkeeping."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    kept = {str(key): resolved[key] for key in IDENTITY}
    later = LATER | LATER_OF.get(resolved["problem"]["name"], {})
    return {key: _without_bookkeeping(value, later) for key, value in kept.items()}


def one_record_per_seed(config: DictConfig) -> bool:
    """Whether the problem trains each seed alone, rather than all side by side."""
    return get_class(config.problem._target_).one_record_per_seed  # pyright: ignore


def run_path(config: DictConfig, seeds_apart: bool | None = None) -> Path:
    """``<runs>/<problem>/<optimizer>/<variant>``; the variant is ``paper`` or what differs from it.

    What machine it runs on is no such difference, although the record says it; nor are the seeds where each has a
    record of its own, ``seeds_apart``, by default as the problem trains them.
    """
    own = identity(config)
    problem, optimizer = own["problem"]["name"], own["optimizer"]["name"]
    base = _paper_identity(problem, optimizer, config.device, config.threads)
    if one_record_per_seed(config) if seeds_apart is None else seeds_apart:
        own, base = own | {"seeds": None}, base | {"seeds": None}
    return Path(config.runs) / problem / optimizer / variant_name(own, base)


@cache
def _paper_identity(problem: str, optimizer: str, device: str, threads: int) -> dict[str, Any]:
    choices = {"problem": problem, "optimizer": optimizer, "device": device, "threads": threads}
    return identity(compose("train", overrides=[f"{key}={value}" for key, value in choices.items()]))


def variant_name(own: dict[str, Any], base: dict[str, Any]) -> str:
    """``"paper"``, or ``key=value`` for each setting that differs, in one order however it was written."""
    flat, flat_base = flatten(own), flatten(base)
    differing = {key: value for key, value in flat.items() if flat_base.get(key) != value}
    if not differing:
        return PAPER
    short = [key.rpartition(".")[2] for key in differing]
    names = short if len(set(short)) == len(short) else list(differing)
    name = ",".join(
        f"{key}={_text(value)}" for key, value in sorted(zip(names, differing.values(), strict=True))
    )
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}…{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _without_bookkeeping(value: Any, later: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not str(k).startswith("_") and k not in BOOKKEEPING}
        return {k: _without_bookkeeping(v, later) for k, v in kept.items() if k not in later or v != later[k]}
    return value


def _text(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("/", "_")
