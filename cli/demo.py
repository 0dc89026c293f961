"""`ebbtide demo`: a story read by the built-in model in less memory than its pages need."""

from __future__ import annotations

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

_PLACES = {"device": "GPU memory", "host": "RAM"}
_MAX_NEW_TOKENS = 32
_SHARE_IN_RAM = 0.25  # of the pages: most reads go to the disk, and show it
_ROOM_FOR_A_QUESTION = 192  # tokens: a question, the template around it and its answer


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
    with _open(run, story) as llm, llm.session() as session:
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


def _open(run: Run, story: str) -> Any:
    """The model, with memory for a quarter of the story's pages; a --host-memory that was given is
    taken as it is.
    """
    import ebbtide

    run.signals.working()
    options = run.open_options()
    with ebbtide.LLM.open(None, **options) as llm:
        num_tokens = llm.count_tokens([{"role": "user", "content": story}])
    run.terminal.note(
        f"A story of {num_tokens:,} tokens is read whole by a tiny built-in model, and then asked "
        "about. Its pages get a quarter of the RAM that they need; the rest lies on disk.\n"
    )
    options["context"] = run.settings.context or num_tokens + _ROOM_FOR_A_QUESTION
    llm = ebbtide.LLM.open(None, **options)
    try:
        if run.settings.host_memory == "auto":
            llm.keep_in_memory(_SHARE_IN_RAM)
    except BaseException:
        llm.close()
        raise
    return llm


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
