"""Does curvature between layers help? Variants of the coarse space, and the exact Fisher to measure them by."""
