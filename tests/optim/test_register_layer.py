"""Which adapter a layer gets: subclasses, and types that their users register."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import kfac2
from kfac2 import KFAC
from kfac2.optim.layers import ADAPTERS, LinearLayer
from tests.optim.loop import build, each_optimizer, layer_of, network, train


@pytest.fixture(autouse=True)
def registry_as_before() -> Iterator[None]:
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


class Named(nn.Linear):
    """Adds what has no part in the forward."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.scale = nn.Parameter(torch.ones(1))
        self.note = "added"


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardized(nn.Conv2d):
    """Keeps ``forward`` and changes what it calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.std(), bias)


def reasons(optimizer: KFAC) -> dict[str, str]:
    return {line.parameter: line.reason for line in optimizer.coverage if not line.preconditioned}


@each_optimizer
def test_a_subclass_that_only_adds_is_the_layer(kind: type[KFAC]) -> None:
    model, plain = network(), network()
    layer = Named(4, 4).double()
    layer.load_state_dict(plain[3].state_dict(), strict=False)
    model[3] = layer
    model.load_state_dict(plain.state_dict(), strict=False)
    optimizer = build(kind, model)
    assert "Named" in next(line.reason for line in optimizer.coverage if line.parameter == "3.weight")
    train(model, optimizer, 6)
    train(plain, build(kind, plain), 6)
    for name, value in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(4, 4), "Doubled is a Linear with a forward of its own: kfac2.register_layer"),
        (Standardized(2, 2, 1), "Standardized is a Conv2d with a forward of its own"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "made from others"),
        (nn.LazyLinear(4), "run a forward pass before"),
        (nn.MultiheadAttention(4, 2).out_proj, "does not call it"),
    ],
    ids=["forward", "what forward calls", "parametrized", "lazy", "out-projection"],
)
def test_what_computes_something_else_is_left_plain_with_the_reason(layer: nn.Module, reason: str) -> None:
    optimizer = KFAC(nn.Sequential(nn.Linear(2, 2), layer))
    own = {line.reason for line in optimizer.coverage if line.parameter in ("1.weight", "1.bias")}
    assert not any(line.preconditioned for line in optimizer.coverage[2:])
    assert len(own) == 1
    assert reason in own.pop()


class Projection(nn.Module):
    """The example of ``register_layer``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight + self.bias


class ProjectionLayer(LinearLayer):
    def weight_matrix(self, weights: Tensor) -> Tensor:
        return weights.mT[:, None]

    def weight_like(self, matrices: Tensor) -> Tensor:
        return matrices[:, 0].mT


@each_optimizer
@pytest.mark.parametrize("kind_name", [Projection, f"{__name__}.Projection"], ids=["type", "name"])
def test_a_registered_layer_with_its_weight_transposed_is_a_linear_layer(
    kind: type[KFAC], kind_name: type[nn.Module] | str
) -> None:
    plain = network()
    model = deepcopy(plain)
    for index in (0, 3):
        linear = layer_of(plain, index)
        projection = Projection(linear.in_features, linear.out_features).double()
        projection.weight.data, projection.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
        model[index] = projection
    assert "0.weight" in reasons(build(kind, model))
    kfac2.register_layer(kind_name, ProjectionLayer)
    optimizer = build(kind, model)
    assert set(reasons(optimizer)) == {"1.weight", "1.bias"}
    train(model, optimizer, 6)
    train(plain, build(kind, plain), 6)
    for name, value in plain.named_parameters():
        own = model.get_parameter(name)
        torch.testing.assert_close(own.T if name in ("0.weight", "3.weight") else own, value)


def test_the_bias_may_sit_in_another_group_than_a_registered_layers_weight() -> None:
    kfac2.register_layer(Projection, ProjectionLayer)
    torch.manual_seed(0)
    model = nn.Sequential(Projection(4, 3)).double()
    linear = nn.Sequential(nn.Linear(4, 3)).double()
    for one, other in zip(linear.parameters(), model.parameters(), strict=True):
        one.data = (other.data.mT if other.dim() == 2 else other.data).clone()
    for net in (model, linear):
        weight, bias = net.parameters()
        train(net, build(KFAC, net, params=[{"params": [weight]}, {"params": [bias], "lr": 0.5}]), 4)
    for one, other in zip(linear.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other.mT if other.dim() == 2 else other)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        (3, LinearLayer, "subclass of nn.Module"),
        (nn.Bilinear, nn.Linear, "subclass of kfac2.optim.layers.Layer"),
    ],
    ids=["kind", "adapter"],
)
def test_what_is_no_layer_or_no_adapter_is_refused(kind: object, adapter: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kfac2.register_layer(kind, adapter)  # pyright: ignore[reportArgumentType]


class Conv1D(Projection):
    """As the layer of that name in transformers' GPT-2, whose bias is a part of the product."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


class Words(nn.Module):
    """On ``(B, T, 4)``, the layer's argument given by its name."""

    def __init__(self, hidden: nn.Module, name: str) -> None:
        super().__init__()
        self.hidden, self.head, self.name = hidden, nn.Linear(5, 3), name

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(**{self.name: x})).mean(1))


@each_optimizer
def test_the_linear_layer_of_transformers_is_known_by_its_name(
    kind: type[KFAC], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    torch.manual_seed(0)
    model = Words(Conv1D(4, 5), "x").double()
    plain = Words(nn.Linear(4, 5), "input").double()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        one.data = (other.data.T if one.shape != other.shape else other.data).clone()
    data = [(torch.randn(8, 6, 4).double(), torch.randint(3, (8,))) for _ in range(6)]
    for net in (model, plain):
        optimizer = build(kind, net)
        assert all(line.preconditioned for line in optimizer.coverage)
        for x, y in data:
            optimizer.zero_grad()
            output = net(x)
            optimizer.update_curvature(output)
            nn.functional.cross_entropy(output, y).backward()
            optimizer.step()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other.T if one.shape != other.shape else other)
