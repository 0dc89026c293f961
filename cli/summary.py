"""One summary: whether it is read whole or in parts, what is kept of it, and what comes out.

Knows no files and no options of the command line but the shared ones.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ebbtide import errors

from . import speeds
from .answer import blank_fields, summed_timings, summed_usage
from .documents import refuse_too_long
from .job import Job, job_key
from .map_reduce import SPARE_TOKENS, MapReduce, Steps
from .output_file import OutputFile
from .run import Run
from .summary_plan import SummaryPlan, describe
from .summary_task import SummaryTask
from .summary_text import SummaryText, as_json

# A part of every job's key: raised when the same request would be answered differently.
_VERSION = 1
_DIGEST_CHARS = 1 << 16
# Settings that decide nothing of what an answer says.
_UNDECIDING = {
    *("threads", "device_memory", "host_memory", "disk_memory", "spill_dir"),
    *("json", "quiet", "verbose", "origins"),
}


class Summary:
    """One summary of some documents with an open model. keeps: whether finished parts are kept."""

    def __init__(
        self,
        run: Run,
        llm: Any,
        documents: list[Any],
        words: int,
        prompt: str | None,
        format: str,
        cite: str,
        *,
        json_schema: str | None = None,
        keeps: bool = True,
    ):
        import ebbtide

        self.run, self.llm, self.documents, self.format = run, llm, documents, format
        self.document = document = ebbtide.join_documents(documents)
        self.cites = cites(document, cite)
        # The built-in model was not taught marks; what it says word for word is marked for it.
        self.marked = self.cites and not llm.builtin
        example = next((p.label for p in document.places if p.kind != "file"), "")
        self.task = SummaryTask(
            words,
            prompt,
            llm.builtin,
            len(documents) > 1,
            example if self.marked else "",
            json_schema,
        )
        self.most_answer = run.settings.max_new_tokens or self.task.most_tokens
        memory = llm.plan
        if json_schema is not None:  # which takes some
            llm.expect_schemas()
            memory = llm.plan_at(memory.context)
        self.largest = run.settings.context or min(memory.model_context, memory.largest_context)
        self.num_tokens = self._count()
        fits = self.num_tokens + self.most_answer <= self.largest
        self.job = Job(self._key(), run.terminal, keeps=keeps)
        self.steps = Steps(run, llm, self.job)
        self.map_reduce, self.parts = None, []
        if not fits and run.settings.overflow == "map-reduce":
            if not self.largest:
                llm.plan.raise_if_unfit()
            self.map_reduce = MapReduce(self.steps, self.task, document, self.marked, self.largest)
            self.parts = self.map_reduce.plan()
            if json_schema is not None and llm.builtin and len(self.parts) > 1:
                raise errors.InputError(
                    "the built-in model cannot combine the summaries of parts, so there would be "
                    "none of the whole to keep to --json-schema; name another model with -m"
                )

    @property
    def text(self) -> str:
        """What is read where all of it is; made anew, since it may be long and is seldom needed."""
        return f"{self.document.piece(marked=self.marked)}\n\n{self.task.whole()}"

    def _count(self) -> int:
        """Tokens of the text; where no context holds as many, what is a little less is enough."""
        num_tokens = self.llm.least_tokens(self.document.text)
        if num_tokens > self.largest:
            return num_tokens
        return self.llm.count_tokens([{"role": "user", "content": self.text}])

    def _key(self) -> str:
        settings = {k: v for k, v in vars(self.run.settings).items() if k not in _UNDECIDING}
        places = [[place.start, place.label] for place in self.document.places]
        parts = [_VERSION, self.llm.fingerprint, self.task.to_dict(), settings]
        return job_key([*parts, _digest(self.document.text), places])

    def print_plan(self) -> None:
        """The whole plan, with measured bandwidths, as the command's result. It is that of the
        run: what the text and its tokens take here is no part of the runtime there either."""
        self.llm.measure()
        plan = self.llm.plan_at(self._longest_context())
        found = self._plan(plan)
        if self.run.terminal.as_json:
            self.run.terminal.result(found.to_dict())
        self.run.terminal.answer("\n".join([*found.lines(), str(plan)]) + "\n")

    def note_plan(self) -> None:
        """The plan in some lines, before the work."""
        found = self._plan(self.llm.plan_at(self._longest_context()))
        if found.fits:  # else the error says it
            for line in found.lines():
                self.run.terminal.note(line)

    def _longest_context(self) -> int:
        """Tokens that the longest of the answers needs."""
        if self.run.settings.context is not None:
            return self.run.settings.context
        num_tokens = max((part.num_tokens for part in self.parts), default=self.num_tokens)
        context = min(num_tokens + self.most_answer, self.llm.plan.model_context)
        return max(context, num_tokens + 1)

    def _plan(self, plan: Any) -> SummaryPlan:
        return SummaryPlan(
            self.documents,
            self.num_tokens,
            self.most_answer,
            self.largest,
            self.parts,
            plan,
            speeds.recall(self.llm, self.run.settings),
            self.run.settings.prefix_cache if self.run.settings.disk_memory else 0,
        )

    def write(self, out: OutputFile | None) -> dict[str, Any]:
        """Makes the summary, and puts it where it belongs. Returns the object of `--json`."""
        import ebbtide

        run, terminal = self.run, self.run.terminal
        checker = ebbtide.CitationChecker(self.document) if self.cites else None
        shown = SummaryText(checker, self.format)
        # What is left as it is comes piece by piece, the rest line by line.
        through = None if checker is None and self.format != "txt" else shown.push
        is_shown = out is None and self.format != "json"
        try:
            fields, report = self._answer(is_shown, through)
        except (errors.ContextOverflow, errors.DoesNotFit) as error:
            if self.map_reduce is None and self.largest > SPARE_TOKENS:
                error.args = (f"{error} Or read it in parts: --overflow map-reduce.",)
            raise
        except BaseException as error:
            if out is not None and not self.parts and isinstance(error, KeyboardInterrupt):
                # The file stays as it was; what was written of the summary so far is not lost.
                terminal.answer(run.when_cancelled["text"])
            if self.steps.made and self.job.is_kept:
                terminal.note("What is finished is kept: the same command goes on from here.")
            raise
        rest = shown.finish()
        if is_shown:
            terminal.answer(rest)
            terminal.end_answer()
        text = fields["text"] if through is None else shown.text
        fields = self._fields(fields, text, checker, report)
        content = as_json(fields) if self.format == "json" else text.rstrip("\n")
        if out is not None:
            try:
                out.commit(content + "\n")
            except errors.StorageError as error:  # what was made at length is perhaps nowhere else
                vars(error)["text"] = content
                terminal.answer(content + "\n")
                raise
            terminal.note(f"Wrote {out.path.name}.")
        elif self.format == "json":
            terminal.answer(content + "\n")
        if terminal.as_json:
            terminal.result(fields)
        if fields["finish_reason"] == "length":
            terminal.note(
                "The summary was cut, at its most tokens or at the end of the context; -n allows "
                "more of the first."
            )
        self.job.finish()
        speeds.remember(self.llm, run.settings, self.steps.made)
        return fields

    def _answer(self, is_shown: bool, through: Any) -> tuple[dict[str, Any], Any]:
        if self.map_reduce is not None:
            return self.map_reduce.run(self.parts, is_shown, through)
        refuse_too_long(self.llm, [self.document])
        found = self.steps.answer(
            self.text,
            self.most_answer,
            show=is_shown,
            through=through,
            json_schema=self.task.json_schema,
        )
        return found, None

    def _fields(
        self, fields: dict[str, Any], text: str, checker: Any, report: Any
    ) -> dict[str, Any]:
        """The object of `--json`: an answer's, with what only a summary has."""
        warnings = [w for d in self.documents for w in d.warnings]
        if report is not None:
            warnings.append(report.sentence(self.largest))
            self.run.terminal.warn(warnings[-1])
            fields = {**fields, "map_reduce": report.to_dict()}
        if checker is not None and checker.num_doubtful:
            warnings.append(
                f"{checker.num_doubtful} of {len(checker.citations)} citations do not hold: their "
                "words are not where they should be, and the text says so in brackets."
            )
            self.run.terminal.warn(warnings[-1])
        return {
            **fields,
            "text": text,
            "usage": summed_usage(self.steps.made, blank_fields(None)["usage"]),
            "timings": summed_timings(self.steps.made, fields["timings"]),
            "documents": [describe(document) for document in self.documents],
            "citations": [c.to_dict() for c in checker.citations] if checker is not None else [],
            "warnings": list(dict.fromkeys([*warnings, *fields["warnings"]])),
        }


def _digest(text: str) -> str:
    """A hash of a text in UTF-8, of which no copy is made."""
    digest = hashlib.sha256()
    for start in range(0, len(text), _DIGEST_CHARS):
        part = text[start : start + _DIGEST_CHARS]
        digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def cites(document: Any, cite: str) -> bool:
    """Whether a document's citations are wanted, by what `--cite` says."""
    kinds = {place.kind for place in document.places}
    return cite == "on" or (cite == "auto" and bool(kinds & {"page", "slide", "sheet", "chapter"}))
