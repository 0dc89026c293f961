"""A document that no context holds: each part is summarized, then their summaries are.

Only where the user asked for it, and told in full. Every answer is kept in the job as soon as it is
whole; one that is there already is not made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ebbtide import errors

from .answer import is_blank, output_fields
from .job import Job, job_key
from .run import Run
from .summary_task import SummaryTask, part_name

# Room for what a template puts around a prompt, and for texts that count for more when joined.
SPARE_TOKENS = 48
# Of the context an answer gets a quarter at most: so two summaries and what is made of them fit in.
_CONTEXT_PER_ANSWER = 4
_LEAST_ANSWER_TOKENS = 16


class Steps:
    """Answers by the model, each kept; knows which of them were there already."""

    def __init__(self, run: Run, llm: Any, job: Job):
        self.run, self.llm, self.job = run, llm, job
        self.made: list[dict[str, Any]] = []
        self.num_reused = 0

    def answer(
        self,
        text: str,
        most_tokens: int,
        *,
        show: bool = False,
        through: Callable[[str], str] | None = None,
        title: str = "",
        json_schema: str | None = None,
    ) -> dict[str, Any]:
        """The fields of the Output for a prompt, as `--json` prints them.

        most_tokens: of the answer; what -n said is in it already, and may be too much for a part.
        json_schema: what the answer is kept to.
        Raises ModelError where nothing is answered: no summary is made of that, and none kept.
        """
        options = self.run.generation() | {"max_new_tokens": most_tokens}
        if json_schema is not None:
            options["json_schema"] = json_schema
        name = "answer-" + job_key([text, options])
        found = self.job.load(name)
        if found is not None and found["text"].strip():
            self.num_reused += 1
            shown = found["text"] if through is None else through(found["text"])
            if show:
                self.run.terminal.answer(shown)
            return found
        prompt = [{"role": "user", "content": text}]
        output = self.run.answer(self.llm, prompt, options, show=show, through=through, title=title)
        if is_blank(output):
            where = f"{title}: " if title else ""
            raise errors.ModelError(where + self.run.why_cut(output, "-n", "--think off"))
        found = output_fields(self.llm, output)
        self.made.append(found)
        self.job.save(name, found)
        return found


@dataclass
class PartsReport:
    """What map-reduce did, for people and for `--json`."""

    parts: list[dict[str, Any]]
    num_reused: int
    num_merges: int

    def sentence(self, largest: int) -> str:
        if len(self.parts) == 1:
            return (
                f"The text was read whole, but a context holds {largest:,} tokens: the answer had "
                "room for fewer than it might have taken."
            )
        last = (
            "their summaries stand one after the other"
            if not self.num_merges
            else f"their summaries were combined in {self.num_merges} more"
        )
        num_cut = sum(part["cut"] for part in self.parts)
        cut = f" {num_cut} of their summaries were cut; -n allows more." if num_cut else ""
        return (
            f"The text was read in {len(self.parts)} parts, not as a whole, since a context holds "
            f"{largest:,} tokens: {last}. No answer has seen more than its part.{cut}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"parts": self.parts, "reused": self.num_reused, "merges": self.num_merges}


class MapReduce:
    """Plans the parts of a document, and summarizes it in them.

    context: the most tokens that prompt and answer may reach together.
    """

    def __init__(self, steps: Steps, task: SummaryTask, document: Any, marked: bool, context: int):
        self._steps, self._task, self._document = steps, task, document
        self._marked, self._context = marked, context
        self._most_answer = steps.run.settings.max_new_tokens or task.most_tokens

    def plan(self) -> list[Any]:
        """The parts; those of an earlier try where they still fit. Raises ContextOverflow."""
        import ebbtide

        llm, job = self._steps.llm, self._steps.job
        kept = job.load("parts")
        if kept is not None and kept["context"] <= self._context:
            self._most_answer = kept["most_answer"]
            return [ebbtide.Part(*part) for part in kept["parts"]]
        label = "p. 99999 - p. 99999" + self._document.name
        around = max(self._count_around(self._task.part(n, n, label)) for n in (1, 9999))
        to_merge = 0 if self._task.builtin else self._count_around(self._task.merge(is_last=True))
        quarter = (self._context - to_merge) // _CONTEXT_PER_ANSWER
        room = self._context - min(self._most_answer, quarter) - around
        if room < 1 or quarter < _LEAST_ANSWER_TOKENS:
            needed = max(around, to_merge) + _CONTEXT_PER_ANSWER * _LEAST_ANSWER_TOKENS
            raise errors.ContextOverflow(
                f"the context of {self._context:,} tokens leaves no room for parts beside the "
                f"instructions and the answers; {needed:,} is the least. Raise --context.",
                needed_tokens=max(needed, self._context + 1),
                available_tokens=self._context,
            )
        self._most_answer = min(self._most_answer, quarter)

        def count(text: str) -> int:
            num_tokens = llm.least_tokens(text)
            return num_tokens if num_tokens > room else llm.count_tokens(text)

        parts = ebbtide.split_document(self._document, room, count, marked=self._marked)
        rows = [[p.start, p.end, p.num_tokens, p.label] for p in parts]
        kept = {"context": self._context, "most_answer": self._most_answer, "parts": rows}
        job.save("parts", kept)
        return parts

    def _count_around(self, instruction: str) -> int:
        """Tokens of everything but the text that is worked on."""
        messages = [{"role": "user", "content": f"\n\n{instruction}"}]
        return self._steps.llm.count_tokens(messages) + SPARE_TOKENS

    def run(
        self, parts: list[Any], show: bool, through: Callable[[str], str] | None
    ) -> tuple[dict[str, Any], PartsReport]:
        """The last answer's fields, its text whole, and what was done for it."""
        steps, task, document = self._steps, self._task, self._document
        summaries: list[tuple[str, str]] = []
        rows, found = [], {}
        for number, part in enumerate(parts, 1):
            text = document.piece(part.start, part.end, marked=self._marked).strip("\n")
            asked = f"{text}\n\n{task.part(number, len(parts), part.label)}"
            before = steps.num_reused
            title = part_name(number, len(parts), part.label)
            schema = task.json_schema if len(parts) == 1 else None
            found = steps.answer(asked, self._most_answer, title=title, json_schema=schema)
            summaries.append((part.label, found["text"].strip()))
            rows.append(
                {
                    "label": part.label,
                    "num_tokens": part.num_tokens,
                    "reused": steps.num_reused > before,
                    "cut": found["finish_reason"] == "length",
                }
            )
        if task.builtin or len(parts) == 1:  # it was taught to read documents, not summaries
            fields = self._joined(summaries, found, show, through)
            return fields, PartsReport(rows, steps.num_reused, 0)
        fields, num_merges = self._merge(summaries, show, through)
        return fields, PartsReport(rows, steps.num_reused, num_merges)

    def _joined(
        self,
        summaries: list[tuple[str, str]],
        last: dict[str, Any],
        show: bool,
        through: Callable[[str], str] | None,
    ) -> dict[str, Any]:
        text = summaries[0][1]
        if len(summaries) > 1:
            text = "\n\n".join(f"## {label}\n\n{text}" for label, text in summaries)
        shown = text if through is None else through(text)
        if show:
            self._steps.run.terminal.answer(shown)
        return {**last, "text": text}

    def _merge(
        self, summaries: list[tuple[str, str]], show: bool, through: Callable[[str], str] | None
    ) -> tuple[dict[str, Any], int]:
        """Summaries of summaries until one context holds the rest; (fields, answers made)."""
        steps, num_merges = self._steps, 0
        while len(groups := self._groups(summaries)) > 1:
            if len(groups) == len(summaries):
                raise errors.ContextOverflow(
                    f"the context of {self._context:,} tokens does not hold two summaries of parts "
                    "at once. Raise --context, or lower -n or --length.",
                    needed_tokens=2 * self._context,
                    available_tokens=self._context,
                )
            merged = []
            for number, group in enumerate(groups, 1):
                title = f"combining {number} of {len(groups)}"
                asked = f"{_listed(group)}\n\n{self._task.merge(is_last=False)}"
                found = steps.answer(asked, self._most_answer, title=title)
                label = f"{group[0][0].split(' - ')[0]} - {group[-1][0].split(' - ')[-1]}"
                merged.append((label, found["text"].strip()))
                num_merges += 1
            summaries = merged
        asked = f"{_listed(summaries)}\n\n{self._task.merge(is_last=True)}"
        fields = steps.answer(
            asked,
            self._most_answer,
            show=show,
            through=through,
            title="combining",
            json_schema=self._task.json_schema,
        )
        return fields, num_merges + 1

    def _groups(self, summaries: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
        """Neighbours that one context holds together."""
        groups: list[list[tuple[str, str]]] = [[]]
        room = self._context - self._most_answer
        for summary in summaries:
            asked = f"{_listed([*groups[-1], summary])}\n\n{self._task.merge(is_last=True)}"
            if (
                groups[-1]
                and self._steps.llm.count_tokens([{"role": "user", "content": asked}]) > room
            ):
                groups.append([])
            groups[-1].append(summary)
        return groups


def _listed(summaries: list[tuple[str, str]]) -> str:
    return "\n\n".join(f"{label}:\n{text}" for label, text in summaries)
