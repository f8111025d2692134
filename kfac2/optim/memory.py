"""What the curvature takes of a device's memory, before it takes it."""

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch

from kfac2.optim.layers import Layer
from kfac2.optim.stacks import blocks_for

FACTOR_DTYPES = (None, torch.float32, torch.float64)


def limit_factors(
    layers: Sequence[Layer], max_factor_dim: int | None, factor_dtype: torch.dtype | None
) -> None:
    """Tell the layers how large and of what type their factors are; raises ``ValueError`` for what cannot be."""
    if max_factor_dim is not None and not (isinstance(max_factor_dim, int) and max_factor_dim >= 1):
        raise ValueError(
            f"max_factor_dim must be a positive integer (None: no limit), got {max_factor_dim!r}"
        )
    if factor_dtype not in FACTOR_DTYPES:
        raise ValueError(
            f"factor_dtype must be torch.float32 or torch.float64, got {factor_dtype!r}: running averages "
            "in 16 bits stand still (in bfloat16 one stops at 1.03 on its way from 1 to 1.1)"
        )
    for layer in layers:
        too_large = (max_factor_dim is not None and d > max_factor_dim for d in layer.factor_sizes)
        only_g, only_a = (old or new for old, new in zip(layer.diagonal, too_large, strict=True))
        layer.diagonal, layer.factor_dtype = (only_g, only_a), factor_dtype


def diagonal_notes(layer: Layer) -> list[str]:
    """A factor that is diagonal by itself (an embedding's, unless positions go together first) is not worth one."""
    by_itself = (False, False) if layer.reduces else type(layer).diagonal
    sides = zip(("output", "input"), layer.diagonal, by_itself, layer.factor_sizes, strict=True)
    return [
        f"only the diagonal of its {side} factor ({d:,} rows)"
        for side, only, whole, d in sides
        if only and not whole
    ]


def layer_bytes(layer: Layer, inverse: str) -> int:
    """Of a layer's factors and their inverse."""
    return sum(x.nbytes for x in blocks_for(layer, 1, "meta", inverse).state(0).values())


def free_bytes(device: torch.device) -> int | None:
    """None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def warn_of_little_memory(layers: Sequence[Layer], inverse: str) -> None:
    """Before state is made for ``layers``: a warning if it takes more than half of what is free on a device."""
    by_device: dict[torch.device, list[tuple[int, str]]] = defaultdict(list)
    for layer in layers:
        by_device[layer.weight.device].append((layer_bytes(layer, inverse), layer.name))
    for device, sizes in by_device.items():
        needed, free = sum(size for size, _ in sizes), free_bytes(device)
        if free is None or needed <= free / 2:
            continue
        largest = ", ".join(f"{name} ({_mib(size)})" for size, name in sorted(sizes, reverse=True)[:3])
        warnings.warn(
            f"the curvature takes {_mib(needed)} of {_mib(free)} that are free on {device}; most for {largest}. "
            "A lower max_factor_dim keeps only the diagonals of large factors, and exclude=[...] leaves layers "
            "to plain SGD",
            RuntimeWarning,
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
