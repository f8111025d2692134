"""Problems: model, data, loss and metrics, blind to the optimizer."""

from experiments.problems.cifar10 import Cifar10, Cifar10NotFound, DataError
from experiments.problems.deep_linear import DeepLinearMLP
from experiments.problems.resnet import CifarResNet, cifar_resnet
from experiments.problems.vit import CifarViT
