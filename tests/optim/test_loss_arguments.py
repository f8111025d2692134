"""Losses of unknown curvature and wrong arguments are refused before they do harm."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import BATCH, INPUTS, REPLICAS, batch, build, network, replicated, train


class Focal(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": nn.MSELoss(reduction="none")}, "reduction='none'.*mean.*sum.*mask="),
        ({"likelihood": nn.NLLLoss()}, r"NLLLoss.*not known.*nn.CrossEntropyLoss\(\).*nn.MSELoss.*gaussian"),
        ({"likelihood": Focal()}, "Focal.*not known"),
        ({"likelihood": nn.MSELoss}, r"not known: pass one of the modules .*nn.MSELoss\(\)"),
        pytest.param({"likelihood": F.mse_loss}, "not known", id="a function"),
        ({"likelihood": nn.CrossEntropyLoss(torch.tensor([1.0, -1.0]))}, "weight .*negative"),
        ({"likelihood": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(-1.0))}, "pos_weight .*negative"),
        ({"likelihood": "gaussian", "class_dim": -1}, "class_dim= belongs to a categorical"),
        ({"class_dim": 0}, "class_dim must be .* after the batch, got 0"),
        ({"class_dim": "last"}, "class_dim must be .*'last'"),
    ],
    ids=str,
)
def test_a_loss_of_unknown_curvature_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(TwoLevelKFAC, network(), **options)


bits = torch.ones(BATCH, dtype=torch.bool)
labels = torch.zeros(BATCH, dtype=torch.int64)
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensor], Any], dict[str, Any], str]] = {
    "container": ({}, lambda x: SimpleNamespace(logits=x), {}, r"SimpleNamespace: pass its \.logits"),
    "tuple": ({}, lambda x: (x,), {}, "one tensor, got tuple: pass the one the loss is of"),
    "detached": ({}, lambda x: x.detach(), {}, "with grad enabled"),
    "integers": ({}, lambda x: x.argmax(1), {}, "floating point, got torch.int64"),
    "one logit": ({}, lambda x: x[:, :1], {}, r"class axis.*two classes or more.*'bernoulli'"),
    "single logits": ({}, lambda x: x[:, 0], {}, r"class axis.*'bernoulli'"),
    "no class_dim": ({}, lambda x: x[:, None], {}, r"class_dim=-1 for .*class_dim=1 for"),
    "wrong class_dim": ({"class_dim": 2}, lambda x: x, {}, "class axis at class_dim=2"),
    "batch as class_dim": ({"class_dim": -2}, lambda x: x, {}, "class axis at class_dim=-2"),
    "labels": ({}, lambda x: x, {"labels": labels[1:]}, "labels have shape"),
    "soft labels": ({}, lambda x: x, {"labels": labels.double()}, "labels must be class numbers"),
    "no tensor": ({}, lambda x: x, {"labels": [0] * BATCH}, "labels must be a tensor, got list"),
    "targets": ({}, lambda x: x, {"targets": labels[:, None]}, "targets have shape"),
    "mask of numbers": ({}, lambda x: x, {"mask": labels}, "mask must be a bool tensor, got torch.int64"),
    "mask of classes": ({}, lambda x: x, {"mask": bits[:, None]}, r"mask has shape \(8, 1\).*\(8,\)"),
    "nothing to ignore": (
        {"likelihood": nn.CrossEntropyLoss(ignore_index=0)},
        lambda x: x,
        {},
        r"ignore_index= depends on the data's labels.*targets=y",
    ),
    "no targets": (
        {"likelihood": nn.CrossEntropyLoss(torch.ones(3))},
        lambda x: x,
        {},
        r"weight= depends on the data's labels.*targets=y",
    ),
}


@pytest.mark.parametrize("due", [True, False], ids=["due", "not due"])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_in_every_iteration(case: str, due: bool) -> None:
    options, change, arguments, message = REFUSED[case]
    model = network()
    optimizer = build(TwoLevelKFAC, model, **options)
    optimizer.preconditioner.iteration = 0 if due else 1
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        optimizer.update_curvature(change(model(batch(0)[0])), **arguments)


@pytest.mark.parametrize("known", ["labels", "targets", "mask"])
def test_what_a_loss_ignores_can_be_said_in_three_ways(known: str) -> None:
    model = network()
    optimizer = build(KFAC, model, likelihood=nn.CrossEntropyLoss(ignore_index=0))
    optimizer.update_curvature(model(batch(0)[0]), **{known: bits if known == "mask" else labels})


def test_an_evaluation_between_refreshes_needs_no_gradient() -> None:
    model = network()
    optimizer = build(KFAC, model)
    train(model, optimizer, 1)
    with torch.no_grad():
        optimizer.update_curvature(model(batch(1)[0]))


def test_replicas_do_not_count_in_class_dim() -> None:
    x = torch.randn(REPLICAS, INPUTS, BATCH).double()
    for class_dim in (1, -1):
        model = replicated()
        optimizer = build(KFAC, model, class_dim=class_dim)
        optimizer.update_curvature(model(x).mT)
    with pytest.raises(ValueError, match="class_dim=2"):
        build(KFAC, replicated(), class_dim=2).update_curvature(model(x).mT)


def test_probabilities_in_place_of_logits_are_named_once() -> None:
    model = nn.Sequential(network(), nn.Softmax(-1))
    optimizer = build(KFAC, model)
    with pytest.warns(RuntimeWarning, match="logits are meant") as warned:
        train(model, optimizer, 4)
    assert len(warned) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.LogSoftmax(-1), nn.Identity()], ids=str)
def test_logits_of_other_ranges_are_not_named(last: nn.Module) -> None:
    model = nn.Sequential(network(), last)
    build(KFAC, model).update_curvature(model(batch(0)[0]))
