"""`ebbtide calibrate`: what bounded mode loses and saves with a model, on the user's own text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import values
from .documents import FilesArgument, PagesOption, read_documents, refuse_too_long
from .progress import ProgressDisplay
from .run import Run
from .shared_options import parsed, with_shared_options

EPILOG = """Examples:

ebbtide calibrate thesis.pdf -m ./model

ebbtide calibrate book.txt -Q "Who is Ishmael?" --most-kl 0.002 --json"""

_EPSILONS = "0.02,0.05,0.1,0.2"
_MOST_EPSILONS = 16
_NUM_TOKENS = 64


@with_shared_options
def calibrate(
    run: Run,
    files: FilesArgument = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-Q",
            metavar="TEXT",
            show_default=False,
            help="A question whose answer is measured too; may be repeated.",
        ),
    ] = None,
    epsilons: Annotated[
        str,
        typer.Option(
            "--epsilons",
            metavar="F,F,...",
            show_default=False,
            help=f"What to try. Default: {_EPSILONS}.",
        ),
    ] = _EPSILONS,
    most_kl: Annotated[
        str,
        typer.Option(
            "--most-kl",
            metavar="F",
            show_default=False,
            help="The mean KL divergence from exact mode that is good enough. Default: 0.005.",
        ),
    ] = "0.005",
    pages: PagesOption = None,
) -> None:
    """Measure what --mode bounded loses and saves at each epsilon, on a text of yours."""
    tried = _epsilons(epsilons)
    bound = parsed(values.number(0, above=True), most_kl, "--most-kl")
    asked = [parsed(values.plain, text, "--question") for text in questions or []]
    documents = read_documents(files or [], run.terminal, pages=pages)
    import ebbtide

    with run.open_llm(mode="bounded", prefix_cache=0) as llm:
        refuse_too_long(llm, documents)
        text = ebbtide.join_documents(documents).text
        with ProgressDisplay(run.terminal, run.signals.check) as progress:
            llm.on_progress = progress
            found = ebbtide.calibrate(
                llm,
                text,
                asked,
                epsilons=tried,
                num_tokens=run.settings.max_new_tokens or _NUM_TOKENS,
            )
        best, for_answers = found.largest_epsilon(bound), None
        if asked:
            for_answers = found.largest_epsilon(bound, "answers")
        if run.terminal.as_json:
            run.terminal.result(
                {
                    "schema": 1,
                    "model": llm.model_name,
                    **found.to_dict(),
                    "most_kl": bound,
                    "recommended_epsilon": best,
                    "recommended_epsilon_for_answers": for_answers,
                    "plan": llm.plan.to_dict(),
                }
            )
            return
    run.terminal.answer(_table(found))
    run.terminal.note(_advice(best, for_answers, bound))


def _epsilons(text: str) -> list[float]:
    parse = values.number(0, 1, below=True)
    found = sorted({parsed(parse, part, "--epsilons") for part in text.split(",")})
    if len(found) > _MOST_EPSILONS:
        raise typer.BadParameter(f"at most {_MOST_EPSILONS} are measured", param_hint="--epsilons")
    return found


def _table(found: Any) -> str:
    lines = [
        f"A document of {found.document_tokens:,} tokens.\n",
        f"{'':8} {'mode':>13} {'tokens':>7} {'pages read':>11} {'KL, mean':>9} {'most':>8} "
        f"{'same first':>11} {'disk, MB':>9} {'ms/token':>9}",
    ]
    shown = ""
    for trial in found.trials:
        mode = "exact" if trial.epsilon is None else f"bounded {trial.epsilon:g}"
        lines.append(
            f"{trial.kind if trial.kind != shown else '':8} {mode:>13} {trial.num_tokens:>7,} "
            f"{100 * trial.selected_share:>9.1f} % {trial.kl_mean:>9.5f} {trial.kl_max:>8.4f} "
            f"{100 * trial.same_top1:>9.1f} % {trial.disk_bytes_per_token / 1e6:>9.2f} "
            f"{trial.ms_per_token:>9.1f}"
        )
        shown = trial.kind
    return "\n".join(lines) + "\n"


def _advice(best: float | None, for_answers: float | None, bound: float) -> str:
    if best is None:
        advice = (
            f"No epsilon that was tried keeps the mean KL at {bound:g} or less everywhere: stay "
            "with --mode exact, or try smaller ones with --epsilons."
        )
    else:
        advice = (
            f"The largest epsilon with a mean KL of at most {bound:g}: --mode bounded "
            f"--epsilon {best:g}"
        )
    if for_answers is not None and for_answers != best:
        advice += f"\nFor answers to such questions alone: --mode bounded --epsilon {for_answers:g}"
    return f"\n{advice}"
