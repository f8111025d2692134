"""Refuse unknown settings on the command line with a list of what there is.

Hydra refuses them too, but names only the offender.
"""

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

GROUPS = ("problem", "optimizer", "recipe", "tracking", "sweep", "arm")


def check_overrides(arguments: Sequence[str], config_dir: str) -> None:
    """Raises ``SystemExit`` with a message for a setting that no chosen configuration has, or a sweep
    that would not be the one asked for."""
    try:
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
        settings = [o for o in overrides if not _is_foreign(o)]
        _check_sweep(overrides, is_plain_run=not any(a.startswith("-") for a in arguments))
        with initialize_config_dir(config_dir, version_base="1.3"):
            configs = [compose("train", overrides=list(choice)) for choice in _choices(overrides)]
    except HydraException:
        return  # Hydra's own message, with the options of a group, is the better one.
    known = sorted({name for config in configs for name in _names(config)})
    for override in settings:
        if override.key_or_group not in known:
            raise SystemExit(_message(override.key_or_group, known))


def _check_sweep(overrides: Sequence[Override], is_plain_run: bool) -> None:
    """A sweep's grid is that of one optimizer, and Hydra would ignore it without -m."""
    chosen = {o.key_or_group: o for o in overrides}
    if "sweep" not in chosen:
        return
    name = chosen["sweep"].get_value_element_as_str()
    if is_plain_run:
        raise SystemExit(f"sweep={name} needs -m: python -m experiments.train -m sweep={name} ...")
    if "optimizer" in chosen and chosen["optimizer"].is_sweep_override():
        raise SystemExit(
            f"sweep={name} has a grid for each optimizer: one optimizer at a time, or all with make sweep-mlp"
        )


def _is_foreign(override: Override) -> bool:
    """Additions, deletions, choices of a group and Hydra's own settings."""
    key = override.key_or_group
    return override.is_add() or override.is_delete() or key in GROUPS or key.startswith("hydra")


def _choices(overrides: Sequence[Override]) -> list[tuple[str, ...]]:
    """Every combination of the groups' options, one list of overrides each."""
    groups = [o for o in overrides if o.key_or_group in GROUPS]
    values = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [f"{o.key_or_group}={o.get_value_element_as_str()}"]
        for o in groups
    ]
    return list(itertools.product(*values))


def _names(config: DictConfig) -> list[str]:
    return _keys(OmegaConf.to_container(config, resolve=False))


def _keys(node: Any) -> list[str]:
    """Of a nested dictionary, dotted; groups and settings."""
    names = []
    for key, child in node.items() if isinstance(node, dict) else ():
        if not str(key).startswith("_"):
            names += [str(key), *(f"{key}.{name}" for name in _keys(child))]
    return names


def _message(key: str, known: Sequence[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent] or list(known)
    leaves = {name.rpartition(".")[2]: name for name in siblings}
    guesses = [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1)]
    guesses += [name for name in known if name.endswith(f".{leaf}")]
    hint = f" Did you mean {guesses[0]}?" if guesses else ""
    return f"unknown setting {key!r}.{hint} There is: {', '.join(siblings)}"
