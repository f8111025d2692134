"""Tables and figures of the study's eight questions, and the second edition's tables, as far as there are records."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from experiments.figures import NoRecordsError, RecordError, save_figure
from experiments.figures.arguments import place_arguments, say_written
from experiments.figures.study.bound_figure import upper_bound_figure
from experiments.figures.study.decision import (
    RULE,
    controls_markdown,
    grid_markdown,
    paper_markdown,
    tuned_markdown,
)
from experiments.figures.study.decision_figure import decision_figure
from experiments.figures.study.dependencies import dependencies_markdown
from experiments.figures.study.hypotheses import (
    adaptive_markdown,
    convolutions_markdown,
    reconciled_markdown,
)
from experiments.figures.study.outcomes import chosen_by_test_loss, headline_markdown, headline_table
from experiments.figures.study.questions import QUESTIONS
from experiments.figures.study.records import Study
from experiments.figures.study.upper_bound import alike_markdown, chosen_markdown, verdict_markdown
from experiments.study.decision import DEEP_LINEAR, LAYER_NORM

DECISIONS: dict[str, tuple[Callable[[Study], str], ...]] = {
    "The paper's settings": (paper_markdown,),
    "1. Equal tuning": (grid_markdown, tuned_markdown),
    "2. What the matrix does, at lengths it does not choose": (controls_markdown,),
    **{
        f"3. The upper bound{where}": tuple(
            partial(part, net=net) for part in (chosen_markdown, verdict_markdown, alike_markdown)
        )
        for where, net in (("", DEEP_LINEAR), (", ReLU with layer norm", LAYER_NORM))
    },
    "4. A damping that finds itself": (adaptive_markdown,),
    "5. Convolutions": (convolutions_markdown,),
    "6. Koroko et al. and the paper": (reconciled_markdown,),
    "7. Normalisation, residual connections, attention": (dependencies_markdown,),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = place_arguments(__doc__)
    parser.set_defaults(output=Path("runs/study"))
    arguments = parser.parse_args(argv)
    study = Study(arguments.records)
    sections, missing = [f"## Under both losses\n\n{_headlines(study)}"], []
    for number, question in enumerate(QUESTIONS, start=1):
        heading = f"## {number}. {question.title}"
        try:
            answer = question.answer(study)
        except RecordError as error:
            missing.append(number)
            sections.append(f"{heading}\n\nNot answered: {error}.")
            print(f"question {number}: {error}")
            continue
        sections.append(f"{heading}\n\n![{question.title}]({question.name}.png)\n\n{answer.text}")
        say_written(*save_figure(answer.figure, arguments.output, question.name))
    arguments.output.mkdir(parents=True, exist_ok=True)
    tables = arguments.output / "tables.md"
    tables.write_text("\n\n".join(["# The study's tables", *sections]) + "\n", encoding="utf-8")
    say_written(tables)
    decision = arguments.output / "decision.md"
    decided = Study(arguments.records / "decision")
    decision.write_text(_decisions(decided) + "\n", encoding="utf-8")
    say_written(decision)
    for name, draw in (("decision", decision_figure), ("upper_bound", upper_bound_figure)):
        with suppress(NoRecordsError):
            save_figure(draw(decided), arguments.output, name)
    if missing:
        raise SystemExit(f"error: not answered: question {', '.join(map(str, missing))}")


def _headlines(study: Study) -> str:
    try:
        return f"{headline_markdown(headline_table(study))}\n\n{chosen_by_test_loss(study)}"
    except RecordError as error:
        return f"Not compared: {error}."


def _decisions(study: Study) -> str:
    sections = [
        "\n\n".join([f"## {title}", *(_or_why_not(part, study) for part in parts)])
        for title, parts in DECISIONS.items()
    ]
    return "\n\n".join(["# The second edition's tables", RULE, *sections])


def _or_why_not(part: Callable[[Study], str], study: Study) -> str:
    try:
        return part(study)
    except NoRecordsError as error:
        print(error)
        return "Not decided: not all of its trainings are finished."


if __name__ == "__main__":
    main()
