"""`ebbtide demo`: a story read by the built-in model in less memory than its pages need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from ebbtide import errors, format_size

from .progress import ProgressDisplay
from .run import Run
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide demo

ebbtide demo --json

ebbtide demo --host-memory 2GiB"""

# A quarter of the pages lies in RAM and the rest on disk: most reads go to the disk, and show it.
_SHARE_IN_RAM, _SHARE_TOLERANCE = 0.25, 0.1
_MOST_TRIALS = 8
_PLACES = {"device": "GPU memory", "host": "RAM"}
_MAX_NEW_TOKENS = 32
# A question, the template around it and its answer.
_ROOM_FOR_A_QUESTION = 192


@with_shared_options
def demo(run: Run) -> None:
    """See a story answered from a quarter of the memory that its pages need."""
    if run.settings.model is not None:
        raise typer.BadParameter(
            "the demonstration belongs to the built-in model; 'ebbtide ask' takes any",
            param_hint="--model",
        )
    run.calm_libraries()
    import ebbtide

    material = ebbtide.demo_material()
    story = Path(material["story"]).read_text(encoding="utf-8").strip("\n")
    with _open_tight(run, story) as (llm, session):
        run.terminal.note(f"{llm.plan}\n")
        answers = _ask_all(run, llm, session, story, material["questions"])
        report = _report(run, llm, answers)
    if run.terminal.as_json:
        run.terminal.result(report)
    if not report["passed"]:
        run.terminal.tell("Some answers are wrong: that is a fault of Ebbtide, please report it.")
        raise typer.Exit(1)
    run.terminal.note(
        "\nThat was a tiny model, made for this demonstration. Next, a real one:\n"
        "  ebbtide plan Qwen/Qwen2.5-1.5B-Instruct --context 32768\n"
        '  ebbtide ask "What is the main claim?" thesis.txt -m Qwen/Qwen2.5-1.5B-Instruct\n'
        "  ebbtide chat Qwen/Qwen2.5-1.5B-Instruct"
    )


@contextmanager
def _open_tight(run: Run, story: str) -> Iterator[tuple[Any, Any]]:
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
    trials_left = _MOST_TRIALS
    if run.settings.host_memory == "auto":
        with open_llm(None, **options) as llm:
            host_bytes = llm.plan.fixed_host_bytes + int(llm.plan.kv_far_bytes * _SHARE_IN_RAM)
    else:
        host_bytes, trials_left = run.settings.host_memory, 0
    while True:
        options["budget"] = replace(options["budget"], host_memory=host_bytes)
        llm = None
        try:
            llm = open_llm(None, **options)
            session = llm.session()
            missing_bytes = _missing_bytes(llm.plan)
        except errors.DoesNotFit as error:
            session, missing_bytes = None, error.needed_bytes - error.available_bytes
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
    """How far the RAM of a plan is from the quarter; 0 when it is near enough."""
    share = plan.far_spans.get("host", 0) / plan.num_spans if plan.num_spans else _SHARE_IN_RAM
    if plan.layers_streamed or not plan.near_resident:
        share = min(share, 0.0)
    is_near = abs(share - _SHARE_IN_RAM) <= _SHARE_TOLERANCE
    return 0 if is_near else int((_SHARE_IN_RAM - share) * plan.kv_far_bytes)


def _ask_all(
    run: Run, llm: Any, session: Any, story: str, questions: list[dict[str, str]]
) -> list[dict]:
    """Each question goes to a fork of the session that read the story: the same pages serve all."""
    with ProgressDisplay(run.terminal) as progress:
        llm.on_progress = progress
        # Processes whole cells only; what ends the message here is dropped for the question.
        session.append([{"role": "user", "content": story}])
        llm.on_progress = None
    found = []
    for entry in questions:
        prompt = [{"role": "user", "content": f"{story}\n\n{entry['question']}"}]
        place = f"  (chapter {entry['chapter']})" if "chapter" in entry else ""
        run.terminal.note(f"Q: {entry['question']}{place}")
        if not run.terminal.as_json:
            run.terminal.answer("A: ")
        options = run.generation(max_new_tokens=_MAX_NEW_TOKENS)
        branch = session.fork()
        output = run.answer(llm, prompt, options, source=branch)
        branch.close()
        is_right = entry["answer"].strip() == output.text.strip()
        run.terminal.answer(" ✓" if is_right else f" ✗ (expected: {entry['answer']})")
        run.terminal.end_answer()
        run.terminal.note(f"   pages read for it: {_sources(output)}\n")
        found.append({**entry, "text": output.text, "correct": is_right, "output": output})
    return found


def _sources(output: Any) -> str:
    """How many bytes came from where, summed over every token of the question and the answer."""
    read = output.kv["bytes_read"].items()
    parts = [
        f"{format_size(count)} from {_PLACES.get(tier, tier)}" for tier, count in read if count
    ]
    return ", ".join(parts) or "none"


def _report(run: Run, llm: Any, answers: list[dict]) -> dict[str, Any]:
    """What `--json` prints; says the memory on the way."""
    last = answers[-1].pop("output")
    for answer in answers:
        answer.pop("output", None)
    memory = last.memory
    run.terminal.note(
        f"Peak memory: {format_size(memory['host']['peak_bytes'])} of a budget of "
        f"{format_size(memory['host']['budget_bytes'])}, and "
        f"{format_size(memory['disk']['peak_bytes'])} on disk."
    )
    return {
        "schema": 1,
        "model": llm.model_name,
        "passed": all(answer["correct"] for answer in answers),
        "answers": answers,
        "memory": memory,
        "kv": last.kv,
        "plan": llm.plan.to_dict(),
        "warnings": last.warnings,
    }
