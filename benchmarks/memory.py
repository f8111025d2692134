"""Memory of tensors, from the allocator's own records."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], Any]) -> float:
    """MiB that what ``run`` allocates occupies at its peak; what was there before does not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    allocated = peak = 0
    for event in events:
        if event.name() == "[memory]":
            allocated += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, allocated)
    return peak / 2**20
