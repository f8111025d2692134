"""Models of transformers whose output has positions, tiny and from their random initialisation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.training import BATCH, CLASSES, check_training, each_optimizer

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:left to plain SGD"),  # an embedding that is the head's weight too
    pytest.mark.filterwarnings("ignore:no coarse correction"),
]

WORDS, LENGTH, SIDE, MASK = 32, 12, 32, 1
SIZES = {"vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class EncoderDecoder(nn.Module):
    """T5 that reads a sequence and the one to write, shifted by one."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, pad_token_id=0, **sizes)
        self.t5 = transformers.T5ForConditionalGeneration(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.t5(input_ids=tokens, labels=backwards(tokens)).logits


def gpt2() -> nn.Module:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=WORDS, **sizes))


def bert() -> nn.Module:
    # Its own range is for widths of hundreds: with it attention at this width begins as a plain mean.
    config = transformers.BertConfig(intermediate_size=96, initializer_range=0.1, **SIZES)
    return transformers.BertForMaskedLM(config)


def segformer() -> nn.Module:
    """Four resolutions, whose maps are put together for the classes of pixels."""
    heads = {"num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
    sizes = heads | {"hidden_sizes": [16, 24, 32, 48], "decoder_hidden_size": 32}
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_labels=CLASSES, **sizes)
    )


def counting() -> Tensor:
    """Sequences that count up from anywhere, of words 2 to the last."""
    return 2 + (torch.arange(LENGTH) + torch.randint(WORDS, (BATCH, 1))) % (WORDS - 2)


def masked() -> Tensor:
    """Sequences of one word, of which every fourth is to be filled in."""
    tokens = torch.randint(2, WORDS, (BATCH, 1)).repeat(1, LENGTH)
    tokens[:, ::4] = MASK
    return tokens


def next_words(tokens: Tensor) -> Tensor:
    """The last position has none."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)


def masked_words(tokens: Tensor) -> Tensor:
    return torch.where(tokens == MASK, tokens[:, 1:2], -100)


def backwards(tokens: Tensor) -> Tensor:
    return tokens.flip(1)


def brightest_channels(images: Tensor) -> Tensor:
    """At a quarter of the resolution, in which the classes are; a border does not count."""
    labels = torch.nn.functional.avg_pool2d(images, 4).argmax(1)
    labels[:, 0] = -100
    return labels


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[Tensor], Tensor], int, float]
MODELS: dict[str, Case] = {
    "GPT-2": (gpt2, counting, next_words, -1, 0.96),
    "BERT": (bert, masked, masked_words, -1, 0.96),
    "T5": (EncoderDecoder, counting, backwards, -1, 0.96),
    "SegFormer": (segformer, partial(torch.randn, BATCH, 3, SIDE, SIDE), brightest_channels, 1, 0.98),
}
"""The model, inputs, their labels, the axis of the classes, and the least share of parameters to be preconditioned."""


@each_optimizer
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, optimizer: str) -> None:
    build, draw, labels_of, class_dim, share = MODELS[name]
    options: dict[str, Any] = {"labels_of": labels_of, "class_dim": class_dim, "lr": 0.1}
    check_training(optimizer, build, draw, share, **options)
