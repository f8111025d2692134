"""The numeric surroundings of every comparison with an oracle."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float64(seed: int = 0) -> Iterator[None]:
    """Float64 by default, seeded, on one thread: what was there before comes back after."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
