"""`ebbtide plan`: what would lie where, and how fast it would go, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from ebbtide import format_size

from . import speeds, values
from .options import BY_NAME
from .run import Run
from .shared_options import with_shared_options
from .summary_plan import TIER_NAMES
from .values import show_duration

EPILOG = """Examples:

ebbtide plan Qwen/Qwen2.5-7B-Instruct --context 131072

ebbtide plan ./model --context 8k,32k,128k         a table, with a row for each

ebbtide plan ./model --host-memory 6GiB --json"""

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A folder, a GGUF file or a Hugging Face id.", show_default=False
    ),
]
_CONTEXTS = replace(
    BY_NAME["context"],
    help="The most tokens that prompt plus answer may reach; several are compared in a table. "
    "Default: the most that fits.",
    parse=values.several(values.tokens()),
    metavar="N,N,...",
)


@partial(with_shared_options, changed=(_CONTEXTS,))
def plan(run: Run, model_argument: ModelArgument = None) -> None:
    """Show what would lie where, and how fast it would go; loads no weights."""
    run.choose_model(model_argument)
    with run.open_llm(context=None) as llm:
        llm.measure()
        contexts: Any = run.settings.context  # a list, of this command alone
        plans = [llm.plan_at(n) for n in contexts or [llm.plan.context]]
        known = speeds.recall(llm, run.settings)
    if run.terminal.as_json:
        found = [{**one.to_dict(), "prefill_expected_s": _expected_s(one, known)} for one in plans]
        run.terminal.result({"schema": 1, **(found[0] if len(found) == 1 else {"plans": found})})
    elif len(plans) == 1:
        run.terminal.answer("\n".join([str(plans[0]), *_reading(plans[0], known)]))
    else:
        run.terminal.answer(_table(plans, known))
    run.terminal.end_answer()


def _expected_s(plan: Any, known: speeds.Speeds) -> float | None:
    """What reading the whole context takes at an earlier run's speed."""
    expected_s = known.reading_s(plan.context)
    return None if expected_s is None else max(expected_s, plan.prefill_least_s or 0.0)


def _reading(plan: Any, known: speeds.Speeds) -> list[str]:
    """How long it takes, in a line, as far as that is known and can be."""
    if not plan.fits:
        return []
    found, least_s, expected_s = [], plan.prefill_least_s, _expected_s(plan, known)
    if least_s is not None:
        found.append(f"at least {show_duration(least_s)} for {plan.context:,} tokens")
    if expected_s is not None:
        found.append(f"about {show_duration(expected_s)} at the speed of an earlier run")
    return [f"  reading {', '.join(found)}"] if found else []


def _table(plans: Sequence[Any], known: speeds.Speeds) -> str:
    """A row for each context; of tiers, what would lie there."""
    columns: dict[str, list[str]] = {
        "tokens": [f"{plan.context:,}" for plan in plans],
        "fits": ["yes" if plan.fits else "no" for plan in plans],
    }
    for tier, name in TIER_NAMES.items():
        if getattr(plans[0], tier) is not None:
            columns[name] = [format_size(sum(getattr(plan, tier).values())) for plan in plans]
    columns["reading at least"] = [_shown(plan.prefill_least_s) for plan in plans]
    if known.prefill:
        columns["about"] = [_shown(_expected_s(plan, known)) for plan in plans]
    ceilings = [plan.decode_ceiling_tokens_per_s for plan in plans]
    columns["tokens/s at most"] = ["-" if c is None else f"{c:,.1f}" for c in ceilings]
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    lines = [columns, *zip(*columns.values(), strict=True)]
    largest = max(plan.largest_context for plan in plans)
    most = f"largest that fits {largest:,}" if largest else "no context fits"
    first = f"{plans[0].model}: limit {plans[0].model_context:,}, {most}"
    rows = ("  ".join(map(str.rjust, line, widths)) for line in lines)
    caveat = plans[0].disk_caveat
    last = [f"  The disk's speed is {caveat}."] if caveat else []
    return "\n".join([first, *(f"  {row}" for row in rows), *last])


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else show_duration(seconds)
