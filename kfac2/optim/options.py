"""Checks of what a user passes to an optimizer; each error names the thing and what to do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class SharedOptions(NamedTuple):
    """The K-FAC options that stand in the parameter groups, so that they can be scheduled and saved."""

    damping: float
    kl_clip: float | None
    factor_interval: int
    inverse_interval: int


def shared_options(param_groups: Sequence[dict[str, Any]]) -> SharedOptions:
    """Read and check them; raises ``ValueError`` where groups disagree or a value is out of its range."""
    first = param_groups[0]
    for group in param_groups[1:]:
        for key in SharedOptions._fields:
            if group[key] != first[key]:
                raise ValueError(f"{key} must agree in all parameter groups: {first[key]} and {group[key]}")
    options = SharedOptions(*(first[key] for key in SharedOptions._fields))
    if not 0 <= options.damping < float("inf"):
        raise ValueError(f"damping must be finite and not negative, got {options.damping}")
    if options.kl_clip is not None and not options.kl_clip > 0:
        raise ValueError(f"kl_clip must be positive (None turns clipping off), got {options.kl_clip}")
    for key in ("factor_interval", "inverse_interval"):
        if not (isinstance(first[key], int) and first[key] >= 1):
            raise ValueError(f"{key} must be a positive integer, got {first[key]!r}")
    return options


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {option} {value!r}: choose from {', '.join(choices)}")


def by_layer(option: str, given: Any, names: Sequence[str], default: Any) -> list[Any]:
    """An option for each of the layers ``names``: one value for all, or a mapping from module names.

    A module's name stands for all layers in it, unless a longer one is given too.
    """
    if not isinstance(given, Mapping):
        return [given] * len(names)
    inside = {key: [name for name in names if name == key or name.startswith(f"{key}.")] for key in given}
    unknown = [key for key, layers in inside.items() if not layers]
    if unknown:
        raise ValueError(f"{option} names {unknown}, but the preconditioned layers are: {', '.join(names)}")
    values = {name: given[key] for key in sorted(given, key=len) for name in inside[key]}
    return [values.get(name, default) for name in names]


def as_generators(
    given: torch.Generator | Sequence[torch.Generator] | None, replicas: int
) -> list[torch.Generator]:
    """One generator, or one per replica; None makes one, seeded from torch's, which stays where it is."""
    if given is None:
        fork = torch.Generator()
        fork.set_state(torch.get_rng_state())
        return [torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=fork)))]
    generators = [given] if isinstance(given, torch.Generator) else list(given)
    if len(generators) not in (1, replicas):
        raise ValueError(f"{len(generators)} generators for {replicas} replicas: give one, or one for each")
    return generators
