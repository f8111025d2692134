"""Problems: model, data, loss and metrics, blind to the optimizer."""

from kfac2.problems.cifar10 import Cifar10, Cifar10NotFound, DataError
from kfac2.problems.deep_linear import DeepLinearMLP
from kfac2.problems.resnet import CifarResNet, cifar_resnet

__all__ = ["Cifar10", "Cifar10NotFound", "CifarResNet", "DataError", "DeepLinearMLP", "cifar_resnet"]
