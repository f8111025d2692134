"""Classifiers of sequences from transformers, tiny and from their random initialisation."""

from typing import Any

import pytest
import torch

from tests.models.training import BATCH, CLASSES, check_training, each_optimizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

WORDS, LENGTH = 64, 12
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "Bert": (SIZES, 0.98),
    "GPT2": ({"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}, 0.98),
    "Llama": (SIZES | {"num_key_value_heads": 2}, 0.98),
}
"""Its sizes, and the least share of its parameters to be preconditioned."""


@each_optimizer
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, optimizer: str) -> None:
    sizes, share = MODELS[name]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS, max_position_embeddings=32, num_labels=CLASSES, pad_token_id=0, **sizes
    )
    check_training(
        optimizer,
        lambda: getattr(transformers, f"{name}ForSequenceClassification")(config),
        lambda: torch.randint(2, WORDS, (BATCH, LENGTH)),
        share,
    )
