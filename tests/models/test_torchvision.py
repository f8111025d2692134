"""Image models of torchvision, from their random initialisation."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from tests.models.training import BATCH, CLASSES, check_training, each_optimizer

torchvision = pytest.importorskip("torchvision")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:left to plain SGD"),  # Swin reads its attention's weights itself
    pytest.mark.filterwarnings("ignore:no coarse correction"),  # and folds windows into the batch
]

models = torchvision.models
SWIN = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
VIT = {"patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
MODELS: dict[str, tuple[Callable[..., nn.Module], int, float]] = {
    "resnet18": (models.resnet18, 32, 0.99),  # its last maps have one pixel
    "densenet121": (models.densenet121, 32, 0.98),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 64, 0.99),
    "swin": (partial(models.SwinTransformer, **SWIN), 32, 0.67),
    "vit": (partial(models.VisionTransformer, image_size=32, **VIT), 32, 0.55),
}
"""What builds it, the side of its images, and the least share of its parameters to be preconditioned."""


@each_optimizer
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, optimizer: str) -> None:
    build, side, share = MODELS[name]
    check_training(
        optimizer, partial(build, num_classes=CLASSES), lambda: torch.randn(BATCH, 3, side, side), share
    )
