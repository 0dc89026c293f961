"""`ebbtide demo`: a story read by the built-in model in less memory than its pages need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from ebbtide import format_size

from .progress import ProgressDisplay
from .run import Run
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide demo

ebbtide demo --json

ebbtide demo --host-memory 2GiB"""

# A quarter of the pages lies in RAM and the rest on disk: most reads go to the disk, and show it.
_SHARE_IN_RAM = 4
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
    import ebbtide

    run.calm_libraries()
    material = ebbtide.demo_material()
    story = Path(material["story"]).read_text(encoding="utf-8").strip("\n")
    run.settings = _with_tight_budget(run, story)
    with run.open_llm(context=run.settings.context) as llm:
        run.terminal.note(f"{llm.plan}\n")
        answers = _ask_all(run, llm, story, material["questions"])
        report = _report(run, llm, answers)
    if run.terminal.as_json:
        run.terminal.result(report)
    if not report["passed"]:
        run.terminal.tell("Some answers are wrong: that is a fault of Ebbtide, please report it.")
        raise typer.Exit(1)
    run.terminal.note(
        "\nThat was a tiny model, made for this demonstration. Next, a real one:\n"
        "  ebbtide plan Qwen/Qwen2.5-1.5B-Instruct --context 32768\n"
        '  ebbtide ask "What is the main claim?" thesis.pdf -m Qwen/Qwen2.5-1.5B-Instruct'
    )


def _with_tight_budget(run: Run, story: str) -> Any:
    """The settings with RAM for a quarter of the pages, unless the user chose otherwise."""
    with run.open_llm() as llm:
        num_tokens = llm.count_tokens(story)
    context = run.settings.context or num_tokens + _ROOM_FOR_A_QUESTION
    run.terminal.note(
        f"A story of {num_tokens:,} tokens is read whole by a tiny built-in model, and then asked "
        "about. Its pages get a quarter of the RAM that they need; the rest lies on disk.\n"
    )
    if run.settings.host_memory != "auto":
        return replace(run.settings, context=context)
    plan = run.plan(context=context)
    host_bytes = plan.fixed_host_bytes + plan.kv_far_bytes // _SHARE_IN_RAM
    return replace(run.settings, context=context, host_memory=host_bytes)


def _ask_all(run: Run, llm: Any, story: str, questions: list[dict[str, str]]) -> list[dict]:
    """Each question goes to a fork of the session that read the story: the same pages serve all."""
    session = llm.session()
    with ProgressDisplay(run.terminal) as progress:
        llm.on_progress = progress
        # Processes whole cells only; what ends the message here is dropped for the question.
        session.append([{"role": "user", "content": story}])
        llm.on_progress = None
    found = []
    for entry in questions:
        prompt = [{"role": "user", "content": f"{story}\n\n{entry['question']}"}]
        run.terminal.note(f"Q: {entry['question']}")
        if not run.terminal.as_json:
            run.terminal.answer("A: ")
        options = run.generation(max_new_tokens=_MAX_NEW_TOKENS)
        branch = session.fork()
        output = run.answer(llm, prompt, options, source=branch)
        branch.close()
        is_right = _normal(entry["answer"]) in _normal(output.text)
        run.terminal.answer(" ✓" if is_right else f" ✗ (expected: {entry['answer']})")
        run.terminal.end_answer()
        run.terminal.note(f"   read for it: {_sources(output)}")
        found.append({**entry, "text": output.text, "correct": is_right, "output": output})
    return found


def _normal(text: str) -> str:
    """Case, blanks and a closing full stop are not what is asked."""
    return " ".join(text.casefold().replace(".", " ").split())


def _sources(output: Any) -> str:
    read = {tier: count for tier, count in output.kv["bytes_read"].items() if count}
    return (
        ", ".join(f"{format_size(count)} from {tier}" for tier, count in read.items()) or "nothing"
    )


def _report(run: Run, llm: Any, answers: list[dict]) -> dict[str, Any]:
    """What `--json` prints; says the memory on the way."""
    last = answers[-1].pop("output")
    for answer in answers:
        answer.pop("output", None)
    memory = last.memory
    run.terminal.note(
        f"\nPeak memory: {format_size(memory['host']['peak_bytes'])} of a budget of "
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
