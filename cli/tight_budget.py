"""A budget that leaves the pages of a story a quarter of the RAM they need: for `ebbtide demo`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ebbtide import errors

from .run import Run

# A quarter of the pages lies in RAM and the rest on disk: most reads go to the disk, and show it.
_SHARE_IN_RAM, _SHARES_NEAR_ENOUGH = 0.25, (0.12, 0.42)
# A process grows by some MiB the first times it opens a model, and then no more.
_MOST_TRIALS = 24
# A question, the template around it and its answer.
_ROOM_FOR_A_QUESTION = 192


@contextmanager
def open_tight(run: Run, story: str) -> Iterator[tuple[Any, Any]]:
    """The model, and a session whose pages have a quarter of the RAM they need.

    What the process itself takes is known only as it runs, so this is approached in trials. A
    --host-memory that was given is taken as it is.
    """
    import ebbtide

    open_llm = ebbtide.LLM.open
    run.signals.working()
    options = run.open_options()
    with open_llm(None, **options) as llm:
        num_tokens = llm.count_tokens([{"role": "user", "content": story}])
    options["context"] = run.settings.context or num_tokens + _ROOM_FOR_A_QUESTION
    run.terminal.note(
        f"A story of {num_tokens:,} tokens is read whole by a tiny built-in model, and then asked "
        "about. Its pages get a quarter of the RAM that they need; the rest lies on disk.\n"
    )
    with open_llm(None, **options) as llm:
        plan = llm.plan
    quarter_bytes = int(plan.kv_far_bytes * _SHARE_IN_RAM)
    host_bytes, trials_left = plan.fixed_host_bytes + quarter_bytes, _MOST_TRIALS
    if run.settings.host_memory != "auto":
        host_bytes, trials_left = run.settings.host_memory, 0
    while True:
        options["budget"] = replace(options["budget"], host_memory=host_bytes)
        llm = None
        try:
            llm = open_llm(None, **options)
            session = llm.session()
            missing_bytes = _missing_bytes(llm.plan)
        except errors.DoesNotFit as error:
            session = None
            missing_bytes = error.needed_bytes - error.available_bytes + quarter_bytes
            if not trials_left:
                raise
        if session is not None and (not missing_bytes or not trials_left):
            break
        if llm is not None:
            llm.close()
        host_bytes += missing_bytes
        trials_left -= 1
    with llm:
        yield llm, session


def _missing_bytes(plan: Any) -> int:
    """What a budget lacks, or has too much (below 0), for the quarter; 0 when it is near enough."""
    share = plan.far_spans.get("host", 0) / plan.num_spans if plan.num_spans else _SHARE_IN_RAM
    if plan.layers_streamed or not plan.near_resident:
        share = 0.0  # short of more than room for pages
    is_near = _SHARES_NEAR_ENOUGH[0] <= share <= _SHARES_NEAR_ENOUGH[1]
    return 0 if is_near else int((_SHARE_IN_RAM - share) * plan.kv_far_bytes)
