"""What a torch optimizer promises, and the options of K-FAC."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, CoarseSpace, TwoLevelKFAC
from tests.optim.loop import (
    CLASSES,
    FACTORS,
    INVERSES,
    assert_close,
    batch,
    build,
    each_inverse,
    each_optimizer,
    grad,
    layer_of,
    network,
    replicated,
    same,
    seeds,
    train,
    train_replicas,
    values,
)

PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "kl_clip": None}


def weights_and_biases(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = list(model.named_parameters())
    return [p for n, p in named if n.endswith("weight")], [p for n, p in named if n.endswith("bias")]


def one_update(kind: type[KFAC], **options: Any) -> tuple[nn.Module, KFAC, list[Tensor]]:
    model = network()
    optimizer, before = build(kind, model, **options), values(model)
    train(model, optimizer, 1)
    return model, optimizer, [old - new for old, new in zip(before, values(model), strict=True)]


# -- construction -----------------------------------------------------------------------------------


@each_optimizer
def test_the_public_signature(kind: type[KFAC]) -> None:
    assert issubclass(kind, torch.optim.Optimizer)
    parameters = inspect.signature(kind).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "lr"]
    with pytest.raises(TypeError):
        kind(network(), 0.1, 0.9)  # pyright: ignore[reportCallIssue]


@each_optimizer
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "unknown likelihood 'poisson'.*categorical, bernoulli, gaussian"),
        ({"inverse": "lu"}, "unknown inverse 'lu'.*eigen, tikhonov"),
        ({"damping": -1e-3}, "damping.*-0.001"),
        ({"damping": float("nan")}, "damping.*nan"),
        ({"damping": float("inf")}, "damping.*inf"),
        ({"kl_clip": 0.0}, "kl_clip.*None turns clipping off"),
        ({"kl_clip": -1.0}, "kl_clip.*-1.0"),
        ({"kl_clip": float("nan")}, "kl_clip.*nan"),
        ({"factor_interval": 0}, "factor_interval.*0"),
        ({"factor_interval": 2.5}, "factor_interval.*2.5"),
        ({"inverse_interval": -1}, "inverse_interval.*-1"),
        ({"inverse_interval": "10"}, "inverse_interval.*'10'"),
        ({"factor_decay": 1.0}, "factor_decay.*1.0"),
        ({"factor_decay": -0.1}, "factor_decay.*-0.1"),
        ({"lr": -1.0}, "learning rate"),
        ({"momentum": -1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"generator": seeds(2)}, "2 generators for 1 replicas"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(kind: type[KFAC], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, network(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse_fisher": "dense"}, "unknown coarse_fisher 'dense'.*kronecker, exact"),
        ({"coarse_grid": "finest"}, "unknown coarse_grid 'finest'.*pairwise, common"),
        ({"resample": "cubic"}, "unknown resample 'cubic'.*nearest, area"),
        ({"coarse_weight": -0.5}, "coarse_weight.*-0.5"),
        ({"coarse_damping": "none"}, "unknown coarse_damping 'none'.*identity, consistent"),
        ({"coarse_max_ratio": -1.0}, "coarse_max_ratio.*-1.0"),
        pytest.param(
            {"coarse": CoarseSpace(), "coarse_grid": "common"}, "either `coarse` or coarse_grid", id="both"
        ),
    ],
    ids=str,
)
def test_bad_coarse_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(TwoLevelKFAC, network(), **options)


@each_optimizer
def test_a_model_without_a_supported_layer_is_refused(kind: type[KFAC]) -> None:
    model = nn.Sequential(nn.Bilinear(2, 2, 1), nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match=r"supported are Linear(.|\n)*0.weight: plain \(Bilinear is not"):
        kind(model)


def test_importing_the_optimizer_imports_no_framework() -> None:
    heavy = "{'hydra', 'omegaconf', 'wandb', 'pandas', 'matplotlib', 'scipy', 'tqdm'}"
    code = f"import sys, kfac2; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- what is preconditioned -------------------------------------------------------------------------


@each_optimizer
def test_print_says_what_is_preconditioned_and_why(kind: type[KFAC]) -> None:
    model = network()
    layer_of(model, 3).bias.requires_grad_(False)
    text = repr(build(kind, model, exclude=["5"]))
    assert kind.__name__ in text
    for line in (
        "0.weight: preconditioned (Kronecker-factored block of a Linear)",
        "0.bias: preconditioned (Kronecker-factored block of a Linear)",
        "1.weight: plain (BatchNorm1d is not a supported layer)",
        "3.weight: preconditioned",
        "3.bias: plain (was frozen when the optimizer was built)",
        "5.weight: plain (excluded)",
    ):
        assert line in text
    names = [line.parameter for line in build(kind, network()).coverage]
    assert names == [name for name, _ in model.named_parameters()]


def test_parameters_not_given_are_listed_and_left_alone() -> None:
    model = network()
    optimizer = build(KFAC, model, params=[*model[0].parameters(), *model[5].parameters()])
    assert "3.weight: plain (not given to the optimizer)" in repr(optimizer)
    before = values(model)
    train(model, optimizer, 3)
    changed = [not torch.equal(old, new) for old, new in zip(before, values(model), strict=True)]
    assert changed == [True, True, False, False, False, False, True, True]


@each_optimizer
@pytest.mark.parametrize(
    "exclude",
    [["3"], {"3"}, "3", lambda name, module: name == "3"],
    ids=["list", "set", "str", "predicate"],
)
def test_an_excluded_layer_takes_plain_steps(kind: type[KFAC], exclude: Any) -> None:
    model, _, updates = one_update(kind, exclude=exclude, lr=0.1, **PLAIN)
    for name, update, p in zip(dict(model.named_parameters()), updates, model.parameters(), strict=True):
        plain = torch.allclose(update, 0.1 * grad(p), rtol=1e-9, atol=1e-12)
        assert plain == name.startswith(("1.", "3.")), name


def test_a_predicate_sees_the_module() -> None:
    optimizer = build(KFAC, network(), exclude=lambda name, module: module.weight.shape[0] == CLASSES)
    assert [line.parameter for line in optimizer.coverage if line.reason == "excluded"] == [
        "5.weight",
        "5.bias",
    ]


def test_an_unknown_excluded_name_lists_the_layers() -> None:
    with pytest.raises(ValueError, match=r"\['head'\].*0, 3, 5"):
        build(KFAC, network(), exclude=["head"])


def test_excluding_a_container_excludes_what_it_holds_or_is_an_error() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    try:
        optimizer = build(KFAC, model, exclude=["0"])
    except ValueError as error:
        assert "0" in str(error)  # noqa: PT017
    else:
        preconditioned = [line.parameter for line in optimizer.coverage if line.preconditioned]
        assert preconditioned == ["1.weight", "1.bias"]


# -- parameter groups and schedules -----------------------------------------------------------------


@each_optimizer
@each_inverse
def test_weight_and_bias_in_different_groups_form_one_block(kind: type[KFAC], inverse: str) -> None:
    _, _, together = one_update(kind, inverse=inverse, lr=1.0, **PLAIN)
    model = network()
    weights, biases = weights_and_biases(model)
    groups = [{"params": biases, "lr": 0.01}, {"params": weights}]
    optimizer, before = build(kind, model, inverse=inverse, params=groups, lr=0.5, **PLAIN), values(model)
    train(model, optimizer, 1)
    for p, old, update in zip(model.parameters(), before, together, strict=True):
        lr = 0.01 if any(p is bias for bias in biases) else 0.5
        torch.testing.assert_close(old - p, lr * update, rtol=1e-9, atol=1e-12)


@each_optimizer
def test_clipping_counts_each_part_with_its_learning_rate(kind: type[KFAC]) -> None:
    """Equation 10, from the updates and gradients of an unclipped step."""
    model, _, updates = one_update(kind, lr=1.0, **PLAIN)
    parts = {n: (u * grad(p)).sum() for (n, p), u in zip(model.named_parameters(), updates, strict=True)}
    sums = [0.25 * parts[f"{i}.weight"] + 0.0001 * parts[f"{i}.bias"] for i in (0, 3, 5)]
    expected = (1e-6 / sum(abs(s) for s in sums)) ** 0.5
    assert expected < 1

    model = network()
    weights, biases = weights_and_biases(model)
    groups = [{"params": weights, "lr": 0.5}, {"params": biases, "lr": 0.01}]
    optimizer = build(kind, model, params=groups, **(PLAIN | {"kl_clip": 1e-6}))
    train(model, optimizer, 1)
    torch.testing.assert_close(optimizer.diagnostics["nu"].item(), expected.item())  # pyright: ignore


@each_optimizer
def test_a_learning_rate_schedule_is_a_learning_rate_set_by_hand(kind: type[KFAC]) -> None:
    scheduled, by_hand = network(), network()
    left, right = build(kind, scheduled), build(kind, by_hand)
    scheduler = torch.optim.lr_scheduler.StepLR(left, step_size=2, gamma=0.1)
    for step in range(5):
        train(scheduled, left, 1, first=step)
        scheduler.step()
        right.param_groups[0]["lr"] = 0.05 * 0.1 ** (step // 2)
        train(by_hand, right, 1, first=step)
    assert_close(scheduled, by_hand)


@each_optimizer
@pytest.mark.parametrize(("key", "value"), [("damping", 0.5), ("kl_clip", 1e-6), ("momentum", 0.0)])
def test_options_can_be_scheduled(kind: type[KFAC], key: str, value: float) -> None:
    scheduled, built_so, unchanged = network(), network(), network()
    optimizer = build(kind, scheduled)
    optimizer.param_groups[0][key] = value
    train(scheduled, optimizer, 3)
    train(built_so, build(kind, built_so, **{key: value}), 3)
    train(unchanged, build(kind, unchanged), 3)
    assert same(scheduled, built_so)
    assert not same(scheduled, unchanged)


def test_scheduled_damping_acts_at_the_next_refresh_of_the_inverses() -> None:
    def schedule(step: int) -> None:
        if step == 1:
            optimizer.param_groups[0]["damping"] = 1.0

    model, twin = network(), network()
    optimizer, other = build(KFAC, model), build(KFAC, twin)
    train(model, optimizer, INVERSES, before=schedule)
    train(twin, other, INVERSES)
    assert same(model, twin)
    train(model, optimizer, 1, first=INVERSES)
    train(twin, other, 1, first=INVERSES)
    assert not same(model, twin)


@pytest.mark.parametrize(
    ("key", "value"), [("factor_interval", 0), ("factor_interval", 2.5), ("damping", -1.0), ("kl_clip", 0.0)]
)
def test_a_schedule_out_of_range_is_an_error(key: str, value: Any) -> None:
    model = network()
    optimizer = build(KFAC, model)
    train(model, optimizer, 1)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=key):
        train(model, optimizer, 1, first=1)


@pytest.mark.parametrize("key", ["damping", "kl_clip", "factor_interval", "inverse_interval"])
def test_groups_must_agree_on_shared_options(key: str) -> None:
    model = network()
    weights, biases = weights_and_biases(model)
    with pytest.raises(ValueError, match=f"{key} must agree"):
        build(KFAC, model, params=[{"params": weights}, {"params": biases, key: 50}])
    optimizer = build(KFAC, model, params=[{"params": weights}, {"params": biases}])
    optimizer.param_groups[1][key] = 50
    with pytest.raises(ValueError, match=f"{key} must agree"):
        train(model, optimizer, 1)


@each_optimizer
def test_add_param_group_says_what_to_do(kind: type[KFAC]) -> None:
    optimizer = build(kind, network())
    with pytest.raises(RuntimeError, match=r"from the start.*or build a new optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


# -- the training loop ------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(kind: type[KFAC], set_to_none: bool) -> None:
    model = network()
    optimizer = build(kind, model)
    train(model, optimizer, 2)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()  # pyright: ignore


@each_optimizer
def test_grad_stays_the_plain_gradient(kind: type[KFAC]) -> None:
    model = network()
    optimizer = build(kind, model)
    for step in range(FACTORS + 1):
        x, y = batch(step)
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)
        assert all(p.grad is None for p in model.parameters())
        loss = F.cross_entropy(output, y)
        plain = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        optimizer.step()
        for p, gradient in zip(model.parameters(), plain, strict=True):
            assert torch.equal(grad(p), gradient)


@each_optimizer
def test_a_closure_is_evaluated_once_with_grad_enabled(kind: type[KFAC]) -> None:
    model, twin, calls = network(), network(), []
    optimizer = build(kind, model)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        x, y = batch(len(calls) - 1)
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)
        loss = F.cross_entropy(output, y)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(5)]
    assert calls == [True] * 5
    x, y = batch(0)
    torch.testing.assert_close(losses[0], F.cross_entropy(network()(x), y))
    train(twin, build(kind, twin), 5)
    assert same(model, twin)


@each_optimizer
def test_step_hooks_fire_once(kind: type[KFAC]) -> None:
    model, fired = network(), []
    optimizer = build(kind, model)
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    train(model, optimizer, 2)
    assert fired == ["pre", "post"] * 2


@each_optimizer
def test_update_curvature_does_nothing_unless_due(kind: type[KFAC]) -> None:
    model, generator = network(), torch.Generator().manual_seed(3)
    optimizer = build(kind, model, generator=generator)
    train(model, optimizer, 1)
    drawn, torchs = generator.get_state(), torch.get_rng_state()
    output = model(batch(1)[0])
    optimizer.update_curvature(output)
    optimizer.update_curvature(output, labels=batch(1)[1])
    assert torch.equal(generator.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), torchs)
    assert not any(module._forward_hooks for module in model.modules())


@each_optimizer
def test_label_draws_leave_torchs_generator_alone(kind: type[KFAC]) -> None:
    model = network()
    optimizer = build(kind, model, generator=None)
    before = torch.get_rng_state()
    train(model, optimizer, 5)
    assert torch.equal(torch.get_rng_state(), before)


# -- random numbers ---------------------------------------------------------------------------------


@each_optimizer
def test_a_seed_fixes_the_run(kind: type[KFAC]) -> None:
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, build(kind, model, generator=torch.Generator().manual_seed(seed)), 3)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_without_a_generator_torchs_seed_fixes_the_run() -> None:
    models = []
    for seed in (1, 1, 2):
        model = network()
        torch.manual_seed(seed)
        train(model, build(KFAC, model, generator=None), 3)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@each_optimizer
@each_inverse
def test_a_replica_with_its_own_generator_evolves_as_alone(kind: type[KFAC], inverse: str) -> None:
    model = replicated()
    train_replicas(model, build(kind, model, inverse=inverse, generator=seeds()), 10)
    for r, generator in enumerate(seeds()):
        single, full = replicated(), replicated()
        single = type(full)(*full)
        for module in single:
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(p[r : r + 1].detach().clone()))
        optimizer = build(kind, single, inverse=inverse, generator=generator)
        train_replicas(single, optimizer, 10, which=slice(r, r + 1))
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(p[r], q[0], rtol=1e-8, atol=1e-9)


# -- precision --------------------------------------------------------------------------------------


@each_optimizer
@each_inverse
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float64, torch.float64, 0.0),
        (torch.float32, torch.float32, 1e-3),
        (torch.bfloat16, torch.float32, 0.1),
    ],
    ids=str,
)
def test_parameter_types(
    kind: type[KFAC], inverse: str, dtype: torch.dtype, factors: torch.dtype, tolerance: float
) -> None:
    model, twin = network(dtype=dtype), network().to(dtype).double()
    optimizer = build(kind, model, inverse=inverse)
    train(model, optimizer, 3, empirical=True)
    train(twin, build(kind, twin, inverse=inverse), 3, empirical=True)
    for state in optimizer.state_dict()["preconditioner"]["layers"].values():
        assert state["a"].dtype == state["g"].dtype == factors
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)


@each_optimizer
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(kind: type[KFAC], inside: bool) -> None:
    """The forward pass in bfloat16; ``update_curvature`` and the loss inside the context or after it."""
    model, twin = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer = build(kind, model)
    for step in range(3):
        x, y = batch(step, torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            assert output.dtype == torch.bfloat16
            if inside:
                optimizer.update_curvature(output, labels=y)
                loss = F.cross_entropy(output, y)
        if not inside:
            optimizer.update_curvature(output, labels=y)
            loss = F.cross_entropy(output.float(), y)
        loss.backward()  # pyright: ignore[reportPossiblyUnboundVariable]
        optimizer.step()
    train(twin, build(kind, twin), 3, empirical=True)
    assert_close(model, twin, rtol=2e-2, atol=2e-2)
    assert not same(model, twin)
    for p, state in zip(model.parameters(), optimizer.state.values(), strict=True):
        assert p.dtype == state["momentum_buffer"].dtype == torch.float32


def test_memory_layout_does_not_matter() -> None:
    model, twin = network(), network()
    for module in twin:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().mT.contiguous().mT)
    train(model, build(TwoLevelKFAC, model), 5)
    train(twin, build(TwoLevelKFAC, twin), 5)
    assert_close(model, twin)
