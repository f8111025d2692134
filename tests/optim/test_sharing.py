"""Positions anywhere, several calls of a layer, K-FAC-reduce: against the twin on ``(B, d, *positions)``."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kfac2 import KFAC, TwoLevelKFAC
from tests.reference.coarse import LiteralTwoLevelKFAC
from tests.reference.fisher import gaussian_fisher, gradient, negative_log_likelihood, parameter_vector
from tests.reference.kfac import LiteralKFAC
from tests.reference.precision import float64
from tests.reference.problems import GAUSSIAN, real_step
from tests.reference.reduced import LiteralReducedKFAC

SAMPLES, STEPS_OF_TIME = 5, 3
SHAPES = [(4, 3), (4, 4), (2, 4)]  # two layers with positions, and a head without
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "kl_clip": 1e-2, "damping": 1e-2}
INTERVALS: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1, "likelihood": "gaussian"}
COARSE: list[dict[str, Any]] = [{}, {"coarse_grid": "common"}, {"coarse_fisher": "exact"}]
close = partial(assert_close, rtol=1e-10, atol=1e-11)
each_sharing = pytest.mark.parametrize("sharing", ["expand", "reduce"])


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        torch.manual_seed(3)
        yield


Call = tuple[Tensor, Tensor]
Layout = Callable[[Tensor], list[Tensor]]
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "batch first": (lambda x: [x], {}),
    "time first": (lambda x: [x.transpose(0, 1)], {}),
    "folded, batch outermost": (lambda x: [x.flatten(0, 1)], {"batch_axis": {"0": 0, "1": 0}}),
    "a call for each position": (lambda x: list(x.unbind(1)), {}),
    "calls of different lengths": (lambda x: [x[:, :2], x[:, 2:]], {"batch_axis": 0}),
    "calls on parts of the batch": (lambda x: [x[:1], x[1:]], {"batch_axis": 0}),
    "time-first calls on parts": (
        lambda x: [x[:2].transpose(0, 1), x[2:].transpose(0, 1)],
        {"batch_axis": 1},
    ),
    "two axes of positions": (lambda x: [x[:, :, None]], {}),
}


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(d_in, d_out) for d_out, d_in in SHAPES))


def observed(optimizer: KFAC, inputs: list[Tensor], gradients: list[Tensor], layout: Layout) -> None:
    """Each layer's calls, the last one first as in a backward pass; the head's is plain."""
    preconditioner = optimizer.preconditioner
    for index in (2, 1, 0):
        split = layout if index < 2 else LAYOUTS["batch first"][0]
        calls = list(zip(split(inputs[index]), split(gradients[index]), strict=True))
        for number in reversed(range(len(calls))):
            preconditioner.observe(index, *calls[number], SAMPLES, call=number)
    preconditioner.end_batch()


def random_rows() -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and output gradients of ``layers()``, batch first."""
    axes = [(SAMPLES, STEPS_OF_TIME)] * 2 + [(SAMPLES,)]
    inputs = [torch.randn(*axis, d_in) + 0.5 for axis, (_, d_in) in zip(axes, SHAPES, strict=True)]
    return inputs, [torch.randn(*axis, d_out) for axis, (d_out, _) in zip(axes, SHAPES, strict=True)]


def twin_of(
    kind: type[LiteralTwoLevelKFAC], inputs: list[Tensor], gradients: list[Tensor], **coarse: Any
) -> Any:
    twin = kind(layers(), **OPTIONS, **INTERVALS, inverse="eigen", **coarse)
    twin.t = 1
    a, g = {}, {}
    for index, (x, outputs) in enumerate(zip(inputs, gradients, strict=True)):
        ones = torch.ones(*x.shape[:-1], 1)
        a[str(index)] = torch.cat([x, ones], -1).movedim(-1, 1)
        g[str(index)] = outputs.movedim(-1, 1)
    twin.average(twin.statistics(a, g))
    twin.preconditioned = twin.layers
    return twin


@each_sharing
@pytest.mark.parametrize("coarse", COARSE, ids=["pairwise", "common", "exact"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_same_wherever_the_samples_are(
    layout: str, coarse: dict[str, Any], sharing: str
) -> None:
    split, options = LAYOUTS[layout]
    inputs, gradients = random_rows()
    kinds = {"expand": LiteralTwoLevelKFAC, "reduce": LiteralReducedKFAC}
    twin = twin_of(kinds[sharing], inputs, gradients, **coarse)
    optimizer = TwoLevelKFAC(layers(), **OPTIONS, **INTERVALS, weight_sharing=sharing, **coarse, **options)
    observed(optimizer, inputs, gradients, split)
    optimizer.preconditioner.refresh_factors()
    state = optimizer.state_dict()["preconditioner"]["layers"]
    for name in twin.layers:
        close(state[name]["a"][0], twin.averages["A", name])
        close(state[name]["g"][0], twin.averages["G", name])
    assert optimizer.coarse is not None
    close(optimizer.coarse.matrix()[0], twin.coarse_matrix())
    assert not optimizer.preconditioner.outside_coarse


def test_rows_need_not_be_a_multiple_of_the_samples() -> None:
    """As the nodes of a batch of graphs."""
    optimizer = KFAC(nn.Sequential(nn.Linear(3, 2)), **OPTIONS, **INTERVALS)
    x, g = torch.randn(7, 3), torch.randn(7, 2)
    optimizer.preconditioner.observe(0, x, g, 4)
    optimizer.preconditioner.end_batch()
    optimizer.preconditioner.refresh_factors()
    state = optimizer.state_dict()["preconditioner"]["layers"]["0"]
    close(state["a"][0, :3, :3], x.T @ x / 7)
    close(state["g"][0], g.T @ g / 4)


# -- models -----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """One function of ``(B, T, 3)``, its first layer run in several ways."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.run = nn.Linear(3, 4), nn.Linear(4, 2), run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.body, x).tanh().mean(1))


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "batch first": lambda layer, x: layer(x),
    "time first": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
    "folded": lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
}


def trained(
    kind: type[KFAC], model: nn.Module, sample: tuple[int, ...], size: int = 6, **options: Any
) -> KFAC:
    optimizer = kind(model, **OPTIONS, **(INTERVALS | {"factor_interval": 2}), **options)
    torch.manual_seed(5)
    for batch in GAUSSIAN.batches(6, size=size, sample=sample):
        real_step(optimizer, model, [batch])
    return optimizer


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        close(p, q)


@pytest.mark.parametrize("run", RUNS)
def test_one_level_needs_no_batch_axis(run: str) -> None:
    model, twin = Tokens(RUNS[run]), Tokens(RUNS["batch first"])
    for one in (model, twin):
        trained(KFAC, one, (6, 3))  # as many time steps as samples
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("steps_of_time", [4, 6])
def test_two_levels_with_the_batch_axis_given(run: str, steps_of_time: int) -> None:
    model, twin = Tokens(RUNS[run]), Tokens(RUNS["batch first"])
    axis = 1 if run == "time first" else 0
    trained(TwoLevelKFAC, model, (steps_of_time, 3), batch_axis={"body": axis})
    trained(TwoLevelKFAC, twin, (steps_of_time, 3), batch_axis={"body": 0})
    assert_same_parameters(model, twin)


@pytest.mark.parametrize(("run", "steps_of_time"), [("batch first", 6), ("time first", 6), ("folded", 4)])
def test_a_layer_whose_samples_are_not_found_has_no_coarse_correction(run: str, steps_of_time: int) -> None:
    model = Tokens(RUNS[run])
    with pytest.warns(
        RuntimeWarning, match=r"no coarse correction for 1 of 2.*body: .*6 samples.*batch_axis"
    ) as caught:
        optimizer = trained(TwoLevelKFAC, model, (steps_of_time, 3))
    assert len(caught) == 1
    assert list(optimizer.preconditioner.outside_coarse) == [0]
    assert optimizer.coarse is not None
    assert (optimizer.coarse.matrix()[0] != 0).tolist() == [[False, False], [False, True]]
    assert (optimizer.coarse.inverse[0] != 0).tolist() == [[False, False], [False, True]]


def test_with_no_layer_in_the_coarse_space_two_levels_are_one() -> None:
    two, one = nn.Sequential(nn.Linear(3, 2), Mean()), nn.Sequential(nn.Linear(3, 2), Mean())
    two.load_state_dict(one.state_dict())
    with pytest.warns(RuntimeWarning, match="no coarse correction for 1 of 1"):
        optimizer = trained(TwoLevelKFAC, two, (6, 3))
    trained(KFAC, one, (6, 3))
    assert_same_parameters(two, one)
    assert optimizer.failed_inverses == 0
    assert optimizer.diagnostics["coarse_ratio"].item() == 0


def test_frames_of_a_video_in_the_batch() -> None:
    class Video(nn.Module):
        def __init__(self, folded: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv, self.head, self.folded = nn.Conv2d(1, 3, 3), nn.Linear(3, 2), folded

        def forward(self, x: Tensor) -> Tensor:
            frames = self.conv(x.flatten(0, 1)[:, None])
            return self.head(frames.tanh().mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))

    plain = Video(folded=True)
    with pytest.warns(RuntimeWarning, match="conv: "):
        trained(TwoLevelKFAC, plain, (2, 4, 5))
    model = Video(folded=True)
    optimizer = trained(TwoLevelKFAC, model, (2, 4, 5), batch_axis={"conv": 0})
    assert not optimizer.preconditioner.outside_coarse
    assert optimizer.coarse is not None
    assert (optimizer.coarse.matrix() != 0).all()


# -- K-FAC-reduce -----------------------------------------------------------------------------------


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Pooled(nn.Module):
    """Convolutions with a stride, a dilation and padding, and a pool over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two = (
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Conv2d(3, 2, (2, 1), dilation=2, bias=False),
        )
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()).tanh().mean((2, 3)))


@pytest.mark.parametrize("coarse", [None, *COARSE], ids=["one level", "pairwise", "common", "exact"])
def test_reduced_convolutions_follow_the_twin(coarse: dict[str, Any] | None) -> None:
    model, its_twin = Pooled(), Pooled()
    options = OPTIONS | INTERVALS
    if coarse is None:
        optimizer = KFAC(model, **options, weight_sharing="reduce")
        twin: LiteralKFAC = LiteralReducedKFAC(its_twin, **options, inverse="eigen", coarse_weight=0.0)
    else:
        optimizer = TwoLevelKFAC(model, **options, weight_sharing="reduce", **coarse)
        twin = LiteralReducedKFAC(its_twin, **options, inverse="eigen", **coarse)
    for batch in GAUSSIAN.batches(4, sample=(2, 8, 7)):
        real_step(optimizer, model, [batch])
        twin.step(batch.inputs, batch.labels, batch.loss)
        assert_same_parameters(model, its_twin)


@pytest.mark.parametrize(("sharing", "exact"), [("reduce", True), ("expand", False)])
def test_reduce_is_exact_where_a_linear_layer_s_positions_are_averaged(sharing: str, exact: bool) -> None:
    """Every mean input meets every error, so that the samples' inputs and gradients are independent."""
    errors = 2**0.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    model = nn.Sequential(nn.Linear(3, 2), Mean())
    inputs = torch.randn(5, 4, 3).repeat_interleave(len(errors), dim=0)
    optimizer = KFAC(
        model, 0.1, momentum=0.0, weight_decay=0.0, kl_clip=None, weight_sharing=sharing, **INTERVALS
    )
    F = gaussian_fisher(model, inputs)
    output = model(inputs)
    loss = negative_log_likelihood(output, torch.randn(20, 2), "gaussian").mean()
    before = parameter_vector(["0"], dict(model.named_parameters())).detach()
    step = torch.linalg.solve(F + 1e-2 * torch.eye(len(F)), gradient(model, loss))
    optimizer.update_curvature(output, labels=output.detach() + errors.repeat(5, 1))
    loss.backward()
    optimizer.step()
    after = parameter_vector(["0"], dict(model.named_parameters())).detach()
    assert torch.allclose(after, before - 0.1 * step, rtol=1e-10, atol=1e-11) == exact


def test_a_mapping_reduces_some_layers() -> None:
    mapped, reduced, expanded = Pooled(), Pooled(), Pooled()
    states = []
    for model, sharing in ((mapped, {"one": "reduce"}), (reduced, "reduce"), (expanded, "expand")):
        optimizer = KFAC(model, **OPTIONS, **INTERVALS, weight_sharing=sharing)
        optimizer.update_curvature(model(torch.ones(3, 2, 8, 7)), labels=torch.ones(3, 2))
        optimizer.step()
        states.append(optimizer.state_dict()["preconditioner"]["layers"])
    assert torch.equal(states[0]["one"]["a"], states[1]["one"]["a"])
    assert torch.equal(states[0]["two"]["a"], states[2]["two"]["a"])
    assert not torch.allclose(states[1]["two"]["a"], states[2]["two"]["a"])


def test_reduce_without_a_batch_axis_is_refused_for_all_layers_at_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))

    model = Two()
    optimizer = KFAC(model, weight_sharing="reduce", likelihood="gaussian")
    output = model(torch.randn(4, 4, 3))
    with pytest.raises(ValueError, match=r"'(first|second)': .*4 samples.*'(first|second)': .*batch_axis"):
        optimizer.update_curvature(output)
    optimizer = KFAC(
        model, weight_sharing="reduce", likelihood="gaussian", batch_axis={"first": 0, "second": 0}
    )
    output = model(torch.randn(4, 4, 3))
    optimizer.update_curvature(output)
    output.sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_sharing": "mean"}, "unknown weight_sharing 'mean': choose from expand, reduce"),
        ({"weight_sharing": {"0": "mean"}}, "unknown weight_sharing 'mean'"),
        ({"weight_sharing": {"9": "reduce"}}, r"weight_sharing names \['9'\].*layers are: 0, 1, 2"),
        ({"batch_axis": {"layer": 0}}, r"batch_axis names \['layer'\]"),
        ({"batch_axis": -1}, "counted from 0, got -1"),
        ({"batch_axis": {"0": "first"}}, "counted from 0, got 'first'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(layers(), **options)


def test_a_module_stands_for_the_layers_in_it() -> None:
    model = nn.Sequential(layers(), nn.Linear(2, 2))
    optimizer = KFAC(model, weight_sharing={"0": "reduce", "0.1": "expand"})
    assert [layer.reduces for layer in optimizer.preconditioner.layers] == [True, False, True, False]


def test_nothing_is_warned_of_where_all_samples_are_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(TwoLevelKFAC, Tokens(RUNS["time first"]), (4, 3))
