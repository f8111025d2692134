"""Optimizers: K-FAC with one and two levels, and first-order ones with the same two calls."""
