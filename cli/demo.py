"""`ebbtide demo`: a story, or a text of the user's with facts written into it, read by the built-in
model in less memory than its pages need; then a report, summarised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ebbtide import format_size

from .documents import read_documents
from .planted import plant
from .progress import ProgressDisplay
from .run import Run
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide demo

ebbtide demo moby_dick.txt --context 32k          the same facts, written into a novel of yours

ebbtide demo --json

ebbtide demo --host-memory 2GiB"""

_PLACES = {"device": "GPU memory", "host": "RAM"}
_MAX_NEW_TOKENS, _SUMMARY_TOKENS = 32, 192
_SHARE_IN_RAM = 0.25  # of the pages: most reads go to the disk, and show it
_ROOM_FOR_A_QUESTION = 192  # tokens: a question, the template around it and its answer
_NOVEL_TOKENS = 6_000  # of a novel, where --context does not say; in more prose the model slips


@with_shared_options
def demo(
    run: Run,
    novel: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="A text of yours, to be read in place of the story; facts are written into it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """See a story answered from a quarter of the memory that its pages need."""
    if run.settings.model is not None:
        raise typer.BadParameter(
            "the demonstration belongs to the built-in model; 'ebbtide ask' takes any",
            param_hint="--model",
        )
    run.calm_libraries()
    import ebbtide

    material = ebbtide.demo_material()
    if novel is None:
        story = Path(material["story"]).read_text(encoding="utf-8").strip("\n")
        questions = material["questions"]
    else:
        story, questions = _with_facts(run, novel, material["questions"])
    summary = None
    with _open(run, story) as llm:
        with llm.session() as session:
            plan = llm.plan  # of the text; the report's is another
            run.terminal.note(f"{plan}\n")
            answers = _ask_all(run, llm, session, story, questions)
        if novel is None:
            summary = _summarise(run, llm, material)
        report = _report(run, llm, answers, summary) | {"plan": plan.to_dict()}
    if run.terminal.as_json:
        run.terminal.result(report)
    if novel is not None:
        num_right = sum(answer["correct"] for answer in answers)
        run.terminal.note(f"{num_right} of {len(answers)} answers are right.")
    elif not report["passed"]:
        run.terminal.tell("Some answers are wrong: that is a fault of Ebbtide, please report it.")
        raise typer.Exit(1)
    run.terminal.note(
        "\nThat was a tiny model, made for this demonstration. Next, a real one:\n"
        "  ebbtide plan Qwen/Qwen2.5-1.5B-Instruct --context 32768\n"
        '  ebbtide ask "What is the main claim?" thesis.txt -m Qwen/Qwen2.5-1.5B-Instruct\n'
        "  ebbtide chat Qwen/Qwen2.5-1.5B-Instruct"
    )


def _with_facts(run: Run, path: str, questions: list[dict]) -> tuple[str, list[dict]]:
    """The beginning of the user's text, as much as is read, with the facts in it; and what to ask,
    which has no chapters here.
    """
    import ebbtide

    text = read_documents([path], run.terminal)[0].text
    room = run.settings.context or _NOVEL_TOKENS + _ROOM_FOR_A_QUESTION
    with ebbtide.LLM.open(None, **_options(run)) as llm:

        def fits(num_chars: int) -> bool:
            message = {"role": "user", "content": story_of(num_chars)}
            return llm.count_tokens([message]) <= room - _ROOM_FOR_A_QUESTION

        def story_of(num_chars: int) -> str:
            return plant(text[:num_chars], [entry["sentence"] for entry in questions]).strip()

        # Tokens have one character at least and seldom more than eight: bisect between.
        few, more = 0, min(len(text), 8 * room) + 1
        while more - few > 1:
            middle = (few + more) // 2
            few, more = (middle, more) if fits(middle) else (few, middle)
    entries = [{k: v for k, v in entry.items() if k != "chapter"} for entry in questions]
    return story_of(few), entries


def _options(run: Run) -> dict[str, Any]:
    """As given; but what a demonstration shows is reading, each time."""
    return run.open_options() | {"prefix_cache": 0}


def _open(run: Run, story: str) -> Any:
    """The model, with memory for a quarter of the story's pages; a --host-memory that was given is
    taken as it is.
    """
    import ebbtide

    run.signals.working()
    options = _options(run)
    with ebbtide.LLM.open(None, **options) as llm:
        num_tokens = llm.count_tokens([{"role": "user", "content": story}])
    run.terminal.note(
        f"A text of {num_tokens:,} tokens is read whole by a tiny built-in model, and then asked "
        "about."
    )
    options["context"] = run.settings.context or num_tokens + _ROOM_FOR_A_QUESTION
    llm = ebbtide.LLM.open(None, **options)
    try:
        if run.settings.host_memory == "auto":
            llm.keep_in_memory(_SHARE_IN_RAM)
            told = "Its pages get a quarter of the RAM that they need; the rest lies on disk.\n"
            short = "So few need no pages: a longer text would have most of them on disk.\n"
            run.terminal.note(told if llm.plan.num_spans else short)
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


def _summarise(run: Run, llm: Any, material: dict[str, Any]) -> dict[str, Any]:
    """The report, read and summarised in a context of its own."""
    text = Path(material["report"]).read_text(encoding="utf-8").strip("\n")
    entry = material["summary"]
    run.terminal.note(f"A report of {len(text.split()):,} words. Q: {entry['question']}")
    prompt = [{"role": "user", "content": f"{text}\n\n{entry['question']}"}]
    output = run.answer(llm, prompt, run.generation(max_new_tokens=_SUMMARY_TOKENS))
    is_right = entry["answer"].strip() == output.text.strip()
    run.terminal.answer(" ✓" if is_right else f" ✗ (expected: {entry['answer']})")
    run.terminal.end_answer()
    return {**entry, "text": output.text, "correct": is_right}


def _sources(output: Any) -> str:
    """How many bytes came from where, summed over every token of the question and the answer."""
    read = output.kv["bytes_read"].items()
    parts = [
        f"{format_size(count)} from {_PLACES.get(tier, tier)}" for tier, count in read if count
    ]
    return ", ".join(parts) or "none"


def _report(
    run: Run, llm: Any, answers: list[dict], summary: dict[str, Any] | None
) -> dict[str, Any]:
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
        "passed": all(entry["correct"] for entry in [*answers, *([summary] if summary else [])]),
        "answers": answers,
        "summary": summary,
        "memory": memory,
        "kv": last.kv,
        "warnings": last.warnings,
    }
