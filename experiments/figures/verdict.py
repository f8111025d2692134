"""Is Figure 1 (left) reproduced? A rule stated before looking at the numbers, and its answer."""

from typing import Literal, NamedTuple

from experiments.figures.curves import Runs
from experiments.figures.statistics import seed_median
from experiments.figures.style import OPTIMIZERS

TOLERANCE = 0.2
GAIN = 0.8
EPOCHS = {"sgd": (20, 100), "adam": (20, 100), "kfac": (20, 100), "two_level_kfac": (100,)}
RULE = (
    "Rule: for every optimizer the median over seeds of the training loss at epochs 20 and 100 is "
    "within 20% of the committed one (two-level K-FAC: at epoch 100 only, its early transient is "
    "chaotic), and the two-level median at epoch 100 is at most 0.8 of the one-level median. "
    "A diverged seed counts as an infinite loss in the median."
)
Answer = Literal["yes", "no", "not decided"]


class Check(NamedTuple):
    """One part of the rule: what it asks, the answer, and the numbers or the reason."""

    question: str
    answer: Answer
    detail: str


class _UndecidedError(Exception):
    """Why a part of the rule has no answer."""


def check_rule(runs: Runs, reference: Runs | None = None) -> list[Check]:
    """Apply ``RULE`` to the runs, one ``Check`` per part.

    Args:
        runs: of the deep linear MLP, by optimizer.
        reference: the committed ones; None leaves the comparison with them undecided.
    """
    checks = [
        _check_reference(runs, reference, name, epoch) for name, epochs in EPOCHS.items() for epoch in epochs
    ]
    return [*checks, _check_gain(runs)]


def verdict(checks: list[Check]) -> str:
    """``not reproduced`` if some part says no, else ``not decided`` if some part cannot say."""
    answers = {check.answer for check in checks}
    if "no" in answers:
        return "not reproduced"
    return "not decided" if "not decided" in answers else "reproduced"


def _check_reference(runs: Runs, reference: Runs | None, name: str, epoch: int) -> Check:
    question = f"{OPTIMIZERS[name].label}, epoch {epoch}: within 20% of the committed median"
    try:
        median = _median(runs, name, epoch)
        if reference is None:
            raise _UndecidedError("no committed records to compare with")
        committed = _median(reference, name, epoch, "committed ")
    except _UndecidedError as reason:
        return Check(question, "not decided", str(reason))
    close = abs(median - committed) <= TOLERANCE * committed < float("inf")
    return Check(question, "yes" if close else "no", f"{median:.4f} against {committed:.4f}")


def _check_gain(runs: Runs) -> Check:
    question = "two-level median at epoch 100 at most 0.8 of the one-level median"
    try:
        two, one = _median(runs, "two_level_kfac", 100), _median(runs, "kfac", 100)
    except _UndecidedError as reason:
        return Check(question, "not decided", str(reason))
    low = two <= GAIN * one and two < float("inf")
    return Check(question, "yes" if low else "no", f"{two:.4f} against {one:.4f}")


def _median(runs: Runs, name: str, epoch: int, kind: str = "") -> float:
    run, label = runs.get(name), OPTIMIZERS[name].label
    if run is None:
        raise _UndecidedError(f"no {kind}record of {label}")
    if run.remarks:
        raise _UndecidedError(f"{kind}record of {label} is not at the paper's settings: {run.remarks}")
    if run.epochs < epoch:
        raise _UndecidedError(f"{kind}run has {run.epochs} epochs, rule needs {epoch}")
    return seed_median(run.table("train_loss")).to_dict()[epoch]
