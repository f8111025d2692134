"""Damping that finds itself: the quadratic model against dense matrices, λ against a literal twin."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from processes import Network as SharedNetwork
from processes import run, share
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac2 import KFAC, LevenbergMarquardt, TwoLevelKFAC
from kfac2.nn import ReplicatedBatchNorm, ReplicatedLinear
from kfac2.optim.adaptive import AdaptiveDamping
from kfac2.optim.first_order import SGD
from kfac2.optim.quadratic import Changes, changes_by_step, output_and_tangent, quadratic_model
from tests.optim.loop import (
    BATCH,
    CLASSES,
    INPUTS,
    REPLICAS,
    batch,
    build,
    each_inverse,
    each_optimizer,
    layer_of,
    network,
    replicated,
    same,
    seeds,
    train,
    values,
)
from tests.reference.adaptive import flat, jacobian, literal_changes, literal_rule, output_hessian

RULE = LevenbergMarquardt(interval=2)
NEVER: Any = None
Before = dict[Tensor, Tensor]


def smooth(seed: int = 0) -> nn.Sequential:
    """Without batch norm, so that the dense Jacobian's samples do not interact."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def labels_for(likelihood: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if likelihood == "categorical":
        return torch.randint(CLASSES, (BATCH,), generator=generator)
    return torch.rand(BATCH, CLASSES, generator=generator, dtype=torch.float64).round()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": F.cross_entropy,
    "bernoulli": lambda output, y: (
        F.binary_cross_entropy_with_logits(output, y, reduction="none").sum(1).mean()
    ),
    "gaussian": lambda output, y: 0.5 * (output - y).square().sum(1).mean(),
}
each_likelihood = pytest.mark.parametrize("likelihood", LOSSES)


def moved(model: nn.Module, length: float = 0.1) -> Before:
    """The parameters' values, after which they are changed."""
    generator = torch.Generator().manual_seed(5)
    before: Before = {p: p.detach().clone() for p in model.parameters()}
    with torch.no_grad():
        for p in before:
            p.add_(length * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return before


def adapt(optimizer: Any, model: nn.Module, step: int, call: Any = None) -> None:
    x, y = batch(step)
    optimizer.adapt_damping(partial(call or model, x), partial(F.cross_entropy, target=y))


def train_adaptively(optimizer: Any, model: nn.Module, steps: int, first: int = 0) -> list[float]:
    """λ after each step."""
    path = []
    for step in range(first, first + steps):
        train(model, optimizer, 1, step)
        adapt(optimizer, model, step)
        path.append(float(optimizer.diagnostics["damping"]))
    return path


# -- the quadratic model ----------------------------------------------------------------------------


@each_inverse
@each_optimizer
def test_rho_is_one_where_the_model_is_exact(kind: type[KFAC], inverse: str) -> None:
    """A linear map under a squared error, after a step of the optimizer with momentum and clipping."""
    torch.manual_seed(0)
    model = nn.Linear(INPUTS, CLASSES).double()
    optimizer = build(kind, model, likelihood="gaussian", inverse=inverse, factor_interval=1)
    y = labels_for("gaussian")

    def loss(output: Tensor) -> Tensor:
        return LOSSES["gaussian"](output, y)

    for step in range(3):
        x, _ = batch(step)
        before: Before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)
        loss(output).backward()
        optimizer.step()
        changes = changes_by_step(model, before, partial(model, x), loss)
        assert changes.actual.abs() > 1e-4
        torch.testing.assert_close(changes.actual, changes.predicted, rtol=1e-10, atol=0)


@each_likelihood
def test_the_curvature_is_the_dense_fisher_s(likelihood: str) -> None:
    model, (x, _) = smooth(), batch(0)
    before = moved(model)
    step = {p: p.detach() - old for p, old in before.items()}
    output, tangent = output_and_tangent(model, partial(model, x), before, step)
    y = labels_for(likelihood)
    _, slope, curvature = quadratic_model(lambda o: LOSSES[likelihood](o, y), output, tangent)
    names = [name for name, _ in model.named_parameters()]
    J = jacobian(model, names, list(before.values()), x)
    delta = flat(list(step.values()))
    expected = delta @ J.T @ output_hessian(output, likelihood) @ J @ delta
    torch.testing.assert_close(curvature, expected[None], rtol=1e-10, atol=0)
    _, predicted = literal_changes(
        model,
        names,
        list(before.values()),
        values(model),
        x,
        lambda o: LOSSES[likelihood](o, y),
        likelihood,
    )
    assert float(slope + curvature / 2) == pytest.approx(predicted, rel=1e-10)


class Cube(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubes(nn.Module):
    def __init__(self, cube: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.cube = nn.Linear(INPUTS, 4), nn.Linear(4, CLASSES), cube
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.cube(self.one(x)))


def test_a_function_without_forward_mode_is_differentiated_in_reverse() -> None:
    x, _ = batch(0)
    found = []
    for cube in (Cube.apply, lambda h: h**3):
        model = Cubes(cube)
        before = moved(model)
        step = {p: p.detach() - old for p, old in before.items()}
        found.append(output_and_tangent(model, partial(model, x), before, step))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert not any(x.requires_grad for pair in found for x in pair)


def test_a_replicated_batch_norm_is_differentiated_as_an_ordinary_one() -> None:
    torch.manual_seed(0)
    seed = [torch.Generator().manual_seed(0)]
    own = nn.Sequential(ReplicatedLinear(1, INPUTS, 4, generators=seed), ReplicatedBatchNorm(1, 4)).double()
    plain = nn.Sequential(nn.Linear(INPUTS, 4, bias=False), nn.BatchNorm1d(4)).double()
    with torch.no_grad():
        layer_of(plain, 0).weight.copy_(next(own.parameters())[0])
    x, _ = batch(0)
    tangents = []
    for model, inputs in ((own, x.mT[None]), (plain, x)):
        before = moved(model)
        step = {p: p.detach() - old for p, old in before.items()}
        tangents.append(output_and_tangent(model, partial(model, inputs), before, step)[1])
    torch.testing.assert_close(tangents[0][0].mT, tangents[1], rtol=1e-9, atol=1e-12)


# -- the rule ---------------------------------------------------------------------------------------

UP, SAME, DOWN = 1 / 0.95**2, 1.0, 0.95**2


@pytest.mark.parametrize(
    ("actual", "predicted", "factor"),
    [
        (-1.0, -1.0, DOWN),
        (-0.5, -1.0, SAME),
        (-0.2, -1.0, UP),
        (0.5, -1.0, UP),
        (0.9, 1.0, UP),
        (-1.0, 1.0, UP),
        (math.nan, -1.0, UP),
        (math.inf, -1.0, UP),
        (math.inf, math.inf, UP),
        (-1.0, math.nan, UP),
        (0.0, 0.0, SAME),
    ],
)
def test_the_rule(actual: float, predicted: float, factor: float) -> None:
    changes = Changes(*(torch.tensor([x], dtype=torch.float64) for x in (actual, predicted)))
    adapted = RULE.adapted(torch.tensor([0.1], dtype=torch.float64), *changes)
    assert adapted.item() == pytest.approx(0.1 * factor, rel=1e-12)


def test_damping_stays_within_its_bounds() -> None:
    rule = LevenbergMarquardt(bounds=(0.1, 0.11))
    damping, good, bad = (torch.tensor([x], dtype=torch.float64) for x in (0.1, -1.0, 1.0))
    assert rule.adapted(damping, good, good).item() == 0.1
    assert rule.adapted(damping, bad, good).item() == 0.11


@each_inverse
@each_optimizer
def test_damping_follows_the_literal_rule(kind: type[KFAC], inverse: str) -> None:
    """Groups of different η, momentum, clipping; dense Jacobians of what the steps have done."""
    model = smooth()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    groups = [{"params": weights, "lr": 2.0}, {"params": biases, "lr": 0.5}]
    options: dict[str, Any] = {"damping": 0.03, "kl_clip": 10.0, "inverse": inverse, "params": groups}
    optimizer = build(kind, model, adaptive_damping=RULE, **options)
    names, damping, directions = [name for name, _ in model.named_parameters()], 0.03, set()
    for step in range(24):
        before = values(model)
        train(model, optimizer, 1, step)
        if step % 2 == 1:
            x, y = batch(step)
            loss = partial(F.cross_entropy, target=y)
            after = values(model)
            changes = literal_changes(model, names, before, after, x, loss, "categorical")
            new = literal_rule(damping, *changes, interval=2)
            directions.add((new > damping) - (new < damping))
            damping = new
        adapt(optimizer, model, step)
        assert float(optimizer.diagnostics["damping"]) == pytest.approx(damping, rel=1e-12)
    assert {-1, 1} <= directions


def test_only_preconditioned_parameters_take_part() -> None:
    """The batch norm's and an excluded layer's stand where the step has left them."""
    model = network()
    optimizer = build(KFAC, model, adaptive_damping=LevenbergMarquardt(interval=1), exclude=["5"])
    names = [f"{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")]
    before = [model.get_parameter(name).detach().clone() for name in names]
    train(model, optimizer, 1, 0)
    assert isinstance(optimizer._damping, AdaptiveDamping)
    remembered = optimizer._damping._before
    assert [p is model.get_parameter(name) for p, name in zip(remembered, names, strict=True)] == [True] * 4
    for old, expected in zip(remembered.values(), before, strict=True):
        assert old.equal(expected)


@each_optimizer
def test_damping_does_not_run_away_from_the_inverses(kind: type[KFAC]) -> None:
    """They take λ at their own interval, and until then it stays within a factor of three."""
    model = network()
    options: dict[str, Any] = {"lr": 1e-4, "momentum": 0.0, "weight_decay": 0.0}  # too short steps: λ shrinks
    optimizer = build(kind, model, adaptive_damping=RULE, inverse_interval=30, **options)
    taken = []
    refresh = optimizer.preconditioner.refresh_inverses

    def spy(damping: Any) -> None:
        refresh(damping)
        taken.append(float(damping))

    optimizer.preconditioner.refresh_inverses = spy
    path = train_adaptively(optimizer, model, 61)
    assert taken == pytest.approx([1e-2, 1e-2 / 3, 1e-2 / 9], rel=1e-12)
    assert path[:10] == pytest.approx([1e-2 * DOWN ** (step // 2) for step in range(1, 11)], rel=1e-12)
    assert path[26:29] == pytest.approx([1e-2 / 3] * 3, rel=1e-12)


@each_inverse
@each_optimizer
def test_a_tensor_of_dampings_gives_the_numbers_of_a_float(kind: type[KFAC], inverse: str) -> None:
    model = network(dtype=torch.float32)
    optimizer = build(kind, model, inverse=inverse, factor_dtype=torch.float64)
    x, y = batch(0, torch.float32)
    output = model(x)
    optimizer.update_curvature(output)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    found = []
    for damping in (1e-3, torch.tensor([1e-3], dtype=torch.float64)):
        optimizer.preconditioner.refresh_inverses(damping)
        coarse = [] if optimizer.coarse is None else [optimizer.coarse.inverse]
        found.append(
            [*(x for stack in optimizer.preconditioner.stacks for x in stack.blocks.inverse), *coarse]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


# -- replicas and processes -------------------------------------------------------------------------


def train_replicas_adaptively(
    model: nn.Module, optimizer: KFAC, steps: int, which: slice = slice(None)
) -> list[list[float]]:
    """The inputs of the replicas differ in size, so that their λ part."""
    path = []
    for step in range(steps):
        generators = [torch.Generator().manual_seed(10 * step + r) for r in range(REPLICAS)]
        x = torch.stack(
            [(1 + 2 * r) * torch.randn(INPUTS, BATCH, generator=g) for r, g in enumerate(generators)]
        ).double()[which]
        y = torch.stack([torch.randint(CLASSES, (BATCH,), generator=g) for g in generators])[which]

        def losses(output: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(output.mT, y, reduction="none").mean(1)

        optimizer.zero_grad()
        output = model(x).mT
        optimizer.update_curvature(output)
        losses(output).sum().backward()
        optimizer.step()
        optimizer.adapt_damping(lambda x=x: model(x).mT, losses)
        path.append(optimizer.diagnostics["damping"].tolist())
    return path


@each_optimizer
def test_replicas_evolve_as_they_would_alone(kind: type[KFAC]) -> None:
    """Each with its own λ."""
    options: dict[str, Any] = {"adaptive_damping": RULE, "inverse_interval": 20, "lr": 0.02, "kl_clip": None}
    model = replicated()
    together = train_replicas_adaptively(model, build(kind, model, generator=seeds(), **options), 24)
    for r in range(REPLICAS):
        own = [torch.Generator().manual_seed(r)]
        alone = nn.Sequential(
            ReplicatedLinear(1, INPUTS, 4, bias=True, generators=own),
            nn.Tanh(),
            ReplicatedLinear(1, 4, CLASSES, generators=own),
        ).double()
        optimizer = build(kind, alone, generator=[seeds()[r]], **options)
        path = train_replicas_adaptively(alone, optimizer, 24, slice(r, r + 1))
        assert [one[0] for one in path] == pytest.approx([all_of[r] for all_of in together], rel=1e-12)
        for one, other in zip(values(alone), values(model), strict=True):
            torch.testing.assert_close(one[0], other[r], rtol=1e-8, atol=1e-10)
    assert len({f"{damping:.6g}" for damping in together[-1]}) > 1


def joint_loss(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (output - y).square().sum(1).mean()


def in_process(rank: int, world: int = 2) -> dict[str, Any]:
    sizes = [12 // world] * world
    model = SharedNetwork()
    optimizer = KFAC(
        model,
        0.5,
        likelihood="gaussian",
        damping=0.1,
        factor_interval=2,
        inverse_interval=4,
        adaptive_damping=RULE,
        generator=torch.Generator().manual_seed(7),
    )
    call: Any = DistributedDataParallel(model) if world > 1 else model
    path = []
    for step in range(8):
        x, y = share(step, rank, sizes)
        optimizer.zero_grad()
        output = call(x)
        optimizer.update_curvature(output, labels=y)
        joint_loss(output, y).backward()
        optimizer.step()
        optimizer.adapt_damping(partial(call, x), partial(joint_loss, y=y))
        path.append(float(optimizer.diagnostics["damping"]))
    return {"path": path, "model": model.state_dict()}


def test_processes_adapt_alike_to_the_joint_batch() -> None:
    alone = in_process(0, world=1)
    for own in run(2, in_process):
        assert own["path"] == pytest.approx(alone["path"], rel=1e-12)
        for name, value in alone["model"].items():
            torch.testing.assert_close(own["model"][name], value, rtol=1e-8, atol=1e-11)
    assert len(set(alone["path"])) > 2


# -- what it leaves alone, and saves ----------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(INPUTS, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, CLASSES)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_it_leaves_no_trace() -> None:
    """Buffers, generators, gradients and parameters are as before, and both passes drop the same units."""
    model = Noisy()
    optimizer = build(KFAC, model, adaptive_damping=LevenbergMarquardt(interval=1))
    train(model, optimizer, 1, 0)
    before, random = {k: x.clone() for k, x in model.state_dict().items()}, torch.get_rng_state()
    gradients, own = [p.grad for p in model.parameters()], list(model.parameters())
    outputs = []

    def forward() -> Tensor:
        outputs.append(model(batch(0)[0]))
        return outputs[-1]

    optimizer.adapt_damping(forward, partial(F.cross_entropy, target=batch(0)[1]))
    assert len(outputs) == 2
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    assert torch.get_rng_state().equal(random)
    assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    _, new = outputs
    with torch.no_grad(), torch.random.fork_rng():
        expected = model(batch(0)[0])
    assert new.equal(expected)
    assert not new.equal(outputs[0])


def test_a_compiled_model_is_run_eagerly() -> None:
    paths = []
    for compiled in (False, True):
        model = smooth()
        call: Any = torch.compile(model, backend="eager") if compiled else model
        optimizer = build(KFAC, call, adaptive_damping=RULE)
        paths.append(train_adaptively(optimizer, call, 6))
    assert paths[0] == pytest.approx(paths[1], rel=1e-12)


@each_optimizer
def test_a_resumed_run_goes_on_exactly(kind: type[KFAC]) -> None:
    options: dict[str, Any] = {"adaptive_damping": RULE, "lr": 0.5}
    whole = network()
    path = train_adaptively(build(kind, whole, **options), whole, 14)
    model = network()
    first = build(kind, model, **options)
    train_adaptively(first, model, 7)
    resumed = build(kind, model, **options | {"damping": 1.0})
    resumed.load_state_dict(first.state_dict())
    assert train_adaptively(resumed, model, 7, first=7) == path[7:]
    assert same(model, whole)


def test_a_state_of_the_other_kind_is_refused() -> None:
    fixed, adaptive = (build(KFAC, network(), adaptive_damping=given) for given in (False, True))
    with pytest.raises(ValueError, match="without adaptive_damping"):
        adaptive.load_state_dict(fixed.state_dict())
    with pytest.raises(ValueError, match="saved with adaptive_damping"):
        fixed.load_state_dict(adaptive.state_dict())


def test_it_does_nothing_where_damping_is_fixed_or_no_step_is_to_be_judged() -> None:
    model = network()
    optimizer = build(KFAC, model)
    train(model, optimizer, 1, 0)
    optimizer.adapt_damping(NEVER, NEVER)
    SGD(model, 0.1).adapt_damping(NEVER, NEVER)
    model = network()
    optimizer = build(KFAC, model, adaptive_damping=RULE)
    optimizer.adapt_damping(NEVER, NEVER)
    train(model, optimizer, 1, 0)
    optimizer.adapt_damping(NEVER, NEVER)
    train(model, optimizer, 1, 1)
    adapt(optimizer, model, 1)
    optimizer.adapt_damping(NEVER, NEVER)
    assert float(optimizer.diagnostics["damping"]) != 1e-2


def test_a_loss_that_is_not_finite_makes_it_grow() -> None:
    model = network()
    optimizer = build(KFAC, model, adaptive_damping=RULE)
    for step in range(2):
        train(model, optimizer, 1, step)
    optimizer.adapt_damping(partial(model, batch(1)[0]), lambda output: output.square().sum() * torch.nan)
    assert float(optimizer.diagnostics["damping"]) == pytest.approx(1e-2 * UP)


def test_a_forgotten_call_is_an_error() -> None:
    model = network()
    optimizer = build(KFAC, model, adaptive_damping=RULE)
    train(model, optimizer, 1, 0)
    train(model, optimizer, 1, 1)
    with pytest.raises(RuntimeError, match=r"step 2 was to be judged: call optimizer.adapt_damping"):
        train(model, optimizer, 1, 2)


@pytest.mark.parametrize(
    ("forward", "loss", "error", "message"),
    [
        (lambda m: lambda: (m(batch(0)[0]),), torch.sum, TypeError, "one tensor, got tuple"),
        (lambda m: lambda: batch(0)[0], torch.sum, RuntimeError, "does not depend on the preconditioned"),
        (
            lambda m: partial(m, batch(0)[0]),
            lambda o: o.sum(1),
            ValueError,
            r"1 number\(s\), one per replica",
        ),
        (lambda m: partial(m, batch(0)[0]), lambda o: 1.0, ValueError, r"got float"),
    ],
    ids=["tuple", "independent", "a loss per sample", "a float"],
)
def test_what_is_returned_must_fit(forward: Any, loss: Any, error: type[Exception], message: str) -> None:
    model = network()
    optimizer = build(KFAC, model, adaptive_damping=LevenbergMarquardt(interval=1))
    train(model, optimizer, 1, 0)
    with pytest.raises(error, match=message):
        optimizer.adapt_damping(forward(model), loss)


@pytest.mark.parametrize(
    ("rule", "damping", "message"),
    [
        (LevenbergMarquardt(interval=0), 0.1, "interval of adaptive_damping"),
        (LevenbergMarquardt(decay=1.0), 0.1, "decay of adaptive_damping"),
        (LevenbergMarquardt(bounds=(0.0, 1.0)), 0.1, "bounds of adaptive_damping"),
        (LevenbergMarquardt(bounds=(1.0, 0.1)), 0.1, "bounds of adaptive_damping"),
        (True, 0.0, r"damping=0.0, from where adaptive_damping begins"),
    ],
    ids=["interval", "decay", "zero bound", "bounds descend", "damping outside"],
)
def test_constants_out_of_range_are_refused(rule: Any, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoLevelKFAC(network(), damping=damping, adaptive_damping=rule)


def test_another_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="must be True, False or a LevenbergMarquardt, got 'yes'"):
        KFAC(network(), adaptive_damping=cast(Any, "yes"))
