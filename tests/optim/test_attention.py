"""``nn.MultiheadAttention`` against the same attention written with linear layers, and against torch's own."""

import pickle
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac2 import KFAC, TwoLevelKFAC
from kfac2.optim.hooks import has_own_forward
from tests.reference.precision import float64

WIDTH, HEADS, SAMPLES, LENGTH, MEMORY = 6, 2, 4, 5, 3


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


class Attending(nn.Module):
    """One attention over the inputs, or over a memory of another length, and a layer on the mean."""

    def __init__(self, cross: bool = False, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 3)
        self.cross = cross

    def attend(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
        return self.attention(x, memory, memory, **options)[0]

    def forward(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
        batch_first = self.attention.batch_first
        inputs = [y if batch_first else y.transpose(0, 1) for y in (x, memory if self.cross else x)]
        return self.head(self.attend(*inputs, **options).mean(1 if batch_first else 0))


class SpelledOut(Attending):
    """The same function of the same values, each projection a linear layer; samples first."""

    def __init__(self, net: Attending):
        super().__init__(net.cross, batch_first=True)
        own, self.head = net.attention, deepcopy(net.head)
        del self.attention
        self.attention = nn.Module()
        self.attention.batch_first = True  # pyright: ignore[reportArgumentType]
        weights = own.in_proj_weight.chunk(3)
        biases = [None] * 3 if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
        self.projections = nn.ModuleList(map(linear, weights, biases))
        self.out = linear(own.out_proj.weight, own.out_proj.bias)

    def attend(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
        products = (layer(y) for layer, y in zip(self.projections, (x, memory, memory), strict=True))
        heads = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in products)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, memory = (torch.randn(SAMPLES, n, WIDTH, generator=generator) for n in (LENGTH, MEMORY))
    return x, memory, torch.randint(3, (SAMPLES,), generator=generator)


@pytest.mark.parametrize("inverse", ["eigen", "tikhonov"])
@pytest.mark.parametrize(
    ("cross", "options"),
    [
        (False, {"batch_first": True}),
        (True, {}),
        (True, {"batch_first": True, "bias": False}),
        (False, {"bias": False}),
    ],
)
def test_it_is_preconditioned_as_linear_layers_are(
    cross: bool, options: dict[str, Any], inverse: str
) -> None:
    torch.manual_seed(0)
    net = Attending(cross, **options)
    if net.attention.in_proj_bias is not None:
        nn.init.normal_(net.attention.in_proj_bias)
    spelled_out = SpelledOut(net)
    settings = {"damping": 1e-2, "kl_clip": 1e-3, "inverse": inverse}
    settings |= {"factor_interval": 2, "inverse_interval": 2}
    models = (net, spelled_out)
    optimizers = [KFAC(m, 1e-1, generator=torch.Generator().manual_seed(1), **settings) for m in models]
    before = net.attention.in_proj_weight.detach().clone()
    for step in range(5):
        *inputs, labels = batch(step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            output = model(*inputs)
            optimizer.update_curvature(output)
            F.cross_entropy(output, labels).backward()
            optimizer.step()
    for key in ("weight", "bias")[: 1 + (net.attention.in_proj_bias is not None)]:
        expected = torch.cat([getattr(layer, key) for layer in spelled_out.projections])
        torch.testing.assert_close(getattr(net.attention, f"in_proj_{key}"), expected)
        torch.testing.assert_close(getattr(net.attention.out_proj, key), getattr(spelled_out.out, key))
    assert (net.attention.in_proj_weight - before).abs().min() > 1e-6
    assert all(line.preconditioned for line in optimizers[0].coverage)


@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": True},
        {"need_weights": False, "key_padding_mask": torch.arange(LENGTH).ge(3).repeat(SAMPLES, 1)},
        {"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool(), "is_causal": True, "need_weights": False},
        {
            "attn_mask": torch.linspace(-2, 2, LENGTH * LENGTH).double().view(LENGTH, LENGTH),
            "average_attn_weights": False,
        },
    ],
    ids=["weights", "padding", "causal", "floating"],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_captured_pass_is_torch_s(batch_first: bool, options: dict[str, Any]) -> None:
    """With dropout, which draws alike."""
    torch.manual_seed(0)
    net = Attending(batch_first=batch_first, dropout=0.3)
    x, memory, _ = batch(0)
    own = deepcopy(net)
    optimizer = KFAC(net)
    found = []
    for model in (own, net):
        torch.manual_seed(1)
        y = x if batch_first else x.transpose(0, 1)
        attended, weights = model.attention(y, y, y, **options)
        torch.manual_seed(1)
        output = model(x, memory, **options)
        output.sum().backward()
        found.append([attended, weights, output, *(p.grad for p in model.parameters())])
    assert optimizer.refresh_is_due
    torch.testing.assert_close(*found)


def test_transformers_train_and_keep_nothing() -> None:
    """Encoder and decoder, with two optimizers on one model and a copy made while a pass is under way."""
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 8, dropout=0.0, batch_first=True)
    copies = []
    handle = model.decoder.register_forward_hook(
        lambda *_: copies.extend([deepcopy(model.encoder), pickle.loads(pickle.dumps(model.encoder))])
    )
    options: dict[str, Any] = {"likelihood": "gaussian", "damping": 1e-1, "kl_clip": 1e-2}
    optimizer = TwoLevelKFAC(model, 1e-1, coarse_damping="consistent", factor_interval=1, **options)
    other = KFAC(model, **options)
    x, memory, _ = batch(0)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        output = model(memory, x)
        optimizer.update_curvature(output)
        if not losses:
            other.update_curvature(output)
            handle.remove()
        loss = (output - x).square().sum((1, 2)).mean() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    plain = {line.parameter for line in optimizer.coverage if not line.preconditioned}
    assert plain
    assert all("norm" in name for name in plain)
    assert "rows of their own" in str(optimizer.coverage)
    factors = [o.preconditioner.stacks[0].blocks.a.isfinite().all() for o in (optimizer, other)]
    assert all(factors)
    other.detach()  # which waits for its step
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(has_own_forward(module) for each in copies for module in each.modules())


def test_under_activation_checkpointing_it_trains_alike() -> None:
    class Checkpointed(Attending):
        def attend(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
            return checkpoint(super().attend, x, memory, use_reentrant=False)  # pyright: ignore[reportReturnType]

    torch.manual_seed(0)
    plain, checkpointed = Attending(batch_first=True), Checkpointed(batch_first=True)
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        optimizer = KFAC(model, 1e-1, factor_interval=2, generator=torch.Generator().manual_seed(1))
        for step in range(4):
            *inputs, labels = batch(step)
            optimizer.zero_grad()
            output = model(*inputs)
            optimizer.update_curvature(output)
            F.cross_entropy(output, labels).backward()
            optimizer.step()
        assert "forward" not in vars(model.attention)
    torch.testing.assert_close(plain.state_dict(), checkpointed.state_dict())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 4, "vdim": 4}, "kdim or vdim is not embed_dim"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
    ],
)
def test_what_it_does_not_precondition_is_named(options: dict[str, Any], reason: str) -> None:
    model = Attending(**options)
    lines = {line.parameter: line for line in KFAC(model).coverage}
    assert any(reason in line.reason for line in lines.values())
    assert "does not call it" in lines["attention.out_proj.weight"].reason
    assert lines["head.weight"].preconditioned


def test_reduce_is_refused_for_attention() -> None:
    model = Attending(batch_first=True)
    x, memory, _ = batch(0)
    optimizer = KFAC(model, weight_sharing="reduce", batch_axis=0)
    with pytest.raises(ValueError, match="for the attention 'attention', whose positions are not averaged"):
        optimizer.update_curvature(model(x, memory))


def test_an_attention_that_is_not_optimized_hides_its_out_projection() -> None:
    model = Attending(batch_first=True)
    optimized = [p for name, p in model.named_parameters() if "in_proj" not in name]
    lines = {line.parameter: line for line in KFAC(model, params=optimized).coverage}
    assert "not preconditioned" in lines["attention.out_proj.weight"].reason
