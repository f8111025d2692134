"""What a command line asks for: unknown settings, refused with a list of what there is, and a sweep's members.

Hydra refuses unknown settings too, but names only the offender.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from experiments.schema import NOT_SETTINGS

NEEDED = ("problem", "optimizer", "recipe", "tracking")
GROUPS = (*NEEDED, "sweep", "arm")


def check_overrides(arguments: Sequence[str], config_dir: str) -> None:
    """Raises ``SystemExit`` with a message for a setting that no chosen configuration has, or a sweep
    that would not be the one asked for."""
    try:
        overrides = parsed([a for a in arguments if not a.startswith("-")])
        settings = [o for o in overrides if not _is_foreign(o)]
        _check_groups(overrides)
        _check_sweep(overrides, is_plain_run=not any(a.startswith("-") for a in arguments))
        with initialize_config_dir(config_dir, version_base="1.3"):
            configs = [compose("train", overrides=choice) for choice in _choices(overrides)]
    except HydraException:
        return  # Hydra's own message, with the options of a group, is the better one.
    known = sorted({name for config in configs for name in _keys(OmegaConf.to_container(config))})
    for override in settings:
        if override.key_or_group not in known:
            raise SystemExit(_message(override.key_or_group, known))


def parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def members(overrides: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """As Hydra's sweeper forms them: the overrides of each configuration, and the swept settings.

    Hydra must be initialised, as for ``compose``.
    """
    base = [o for o in parsed(late_settings(overrides)) if not o.is_sweep_override()]
    whole = compose("train", overrides=[str(o.input_line) for o in base], return_hydra_config=True)
    params = [f"{key}={value}" for key, value in (whole.hydra.sweeper.params or {}).items()]
    every = parsed([*params, *overrides])
    swept = list(dict.fromkeys(o.key_or_group for o in every if o.is_sweep_override()))
    return BasicSweeper.split_arguments(every, None)[0], swept


def composed(choices: Iterable[Sequence[str]]) -> Iterator[DictConfig]:
    """As ``compose`` for each list of overrides, where files are read only once for each choice of groups.

    Raises:
        ValueError: a setting that the choice of groups does not have.
    """
    bases: dict[tuple[str, ...], DictConfig] = {}
    for overrides in map(parsed, choices):
        groups = tuple(str(o.input_line) for o in overrides if _is_foreign(o))
        if groups not in bases:
            bases[groups] = compose("train", overrides=list(groups))
        config = deepcopy(bases[groups])
        for override in overrides:
            if not _is_foreign(override):
                _apply(override, config, groups)
        yield config


def _apply(override: Override, config: DictConfig, groups: Sequence[str]) -> None:
    try:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (ConfigKeyError, ConfigAttributeError):
        raise ValueError(f"{' '.join(groups)} has no setting {override.key_or_group!r}") from None


def late_settings(overrides: Sequence[str]) -> list[str]:
    """The same sweep, where a setting of a swept group waits for the choice of the group.

    Before it forms the members Hydra composes what is not swept, with the group's default, which may not know the
    setting: a sweep over one value is left to the members.
    """
    swept = [o.key_or_group for o in parsed(overrides) if o.key_or_group in GROUPS and o.is_sweep_override()]
    swept += ["problem", "optimizer"] if "arm" in swept else []  # which an arm chooses
    late = tuple(f"{group}." for group in swept)
    return [
        f"{o.get_key_element()}=choice({o.get_value_string()})"
        if o.key_or_group.startswith(late) and not (o.is_sweep_override() or o.is_delete())
        else str(o.input_line)
        for o in parsed(overrides)
    ]


def _check_groups(overrides: Sequence[Override]) -> None:
    for override in overrides:
        key = override.key_or_group
        if key in NEEDED and (override.is_delete() or override.value() is None):
            off = " (tracking=none turns it off)" if key == "tracking" else ""
            raise SystemExit(f"{override.input_line}: a training needs a choice of {key}={off}")
        if key.rpartition(".")[2] in NOT_SETTINGS and key.partition(".")[0] in NEEDED:
            raise SystemExit(
                f"unknown setting {key!r}: it belongs to the {key.partition('.')[0]} that is chosen"
            )


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
            f"sweep={name} has a grid for each optimizer: one optimizer at a time, or all with make sweep"
        )


def _is_foreign(override: Override) -> bool:
    """Additions, deletions, choices of a group and Hydra's own settings."""
    key = override.key_or_group
    return override.is_add() or override.is_delete() or key in GROUPS or key.startswith("hydra")


def _choices(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of the groups' options, one list of overrides each."""
    groups = [o for o in overrides if o.key_or_group in GROUPS]
    return BasicSweeper.split_arguments(groups, None)[0]


def _keys(node: Any) -> list[str]:
    """Of a nested dictionary, dotted; groups and settings."""
    names = []
    for key, child in node.items() if isinstance(node, dict) else ():
        if not str(key).startswith("_") and key not in NOT_SETTINGS:
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
