"""Problems: model, data, loss and metrics, blind to the optimizer."""

from kfac2.problems.deep_linear import DeepLinearMLP

__all__ = ["DeepLinearMLP"]
