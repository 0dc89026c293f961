"""The queue of requests, and the one thread that answers them.

    waiting --its turn--> reading --first token--> writing --end, error or hang-up--> over
       '-------------------------hang-up or stop--------------------------------------^

One LLM serves one thread, so that thread takes the requests in their order (but for what only the
tokenizer is asked, which it answers in between). It is the process's
main thread, where Ctrl-C and SIGTERM arrive: they end an answer wherever it is. All requests share
a session. A conversation that goes on has its pages in memory, answers included, and only what is
new is read; of another one what is kept on disk is found.

Knows sessions and requests, and nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from ebbtide import errors

from ..failure import describe
from ..progress import ProgressDisplay
from ..run import Run
from .bad_request import BadRequest
from .estimate import num_common, times, token_counts
from .job import Answered, HungUp, Job, Started, Stopping
from .request import Request
from .text_query import TextQuery

_SIGNAL_S = 0.5  # on Windows Ctrl-C arrives between two waits
_TRY_AGAIN_S = 60.0  # after the model could not be loaded
_PART_CHARS = 1 << 14
_END_OF_THOUGHTS = "</think>"
# Of the tokens of tools and calls as JSON: some templates write them shorter, and drop what they
# do not know.
_LEAST_SHARE = 0.25
_TOLD = ("name", "description", "parameters")  # of a function
_CUT_TOKENS = 4  # that a part has more than it had in the whole text: a BOS, what was cut in two


class Worker:
    """Opens its session, and loads weights, at once. most_waiting: requests beside the one that is
    answered, and as many that only the tokenizer is asked, for those wait for no answer.
    unload_after_s: without requests the session is closed then and the weights are let go of, for
    the next request to load; what was read is found on disk. Where the model's files changed the
    next request loads what they hold now. counts: by name, since the start. trouble: why the model
    cannot be loaded, None: it can, as far as is known."""

    def __init__(self, run: Run, llm: Any, most_waiting: int, unload_after_s: float = math.inf):
        self._run, self._llm, self._most_waiting = run, llm, most_waiting
        self._unload_after_s = unload_after_s
        self._waiting: deque[Job] = deque()
        self._answering: Job | None = None
        self._changed = threading.Condition()
        self._is_stopping = False
        self._next_query_s = 0.0  # when the answer under way may be interrupted for one again
        self.counts: Counter[str] = Counter()  # of seconds too
        self.trouble: str | None = None
        self._try_again_s = math.inf
        self.session: Any = None
        self.context = 0
        self._open_session()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_loaded(self) -> bool:
        """Whether the next request finds the weights in memory."""
        return self._llm.is_loaded

    # ---- for the thread that talks HTTP -------------------------------------------------------

    def submit(self, request: Request | TextQuery) -> Job:
        """Puts a request at the end of the queue. Raises BadRequest where that is full."""
        job = Job(request)
        with self._changed:
            if self._is_stopping:
                raise BadRequest("The server is stopping.", status=503, code="stopping")
            # One that nobody has taken up yet waits for no other.
            if self._num_like(request) > self._most_waiting:
                raise BadRequest(
                    f"As many requests of this kind are waiting as may ({self._most_waiting}, set "
                    "with --queue); ask again later.",
                    status=503,
                    code="queue_full",
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def _num_like(self, request: Request | TextQuery) -> int:
        """How many are there that a request waits behind: a question to the tokenizer takes no
        place of an answer, nor the other way round."""
        jobs = [*self._waiting, *filter(None, [self._answering])]
        is_query = isinstance(request, TextQuery)
        return sum(isinstance(job.request, TextQuery) is is_query for job in jobs)

    def hang_up(self, job: Job) -> None:
        """Nobody listens to the job any more: it gives up its place, or stops."""
        with self._changed:
            job.has_hung_up = True
            if job in self._waiting:
                self._waiting.remove(job)

    # ---- the thread that answers --------------------------------------------------------------

    def work(self) -> None:
        """Answers requests until a signal raises; every job has its last event then."""
        job: Job | None = None
        try:
            while True:
                self._await_request()
                with self._changed:
                    if not self._waiting:  # who asked has hung up
                        continue
                    job = self._answering = self._waiting.popleft()
                self.answer(job)
                job = None
        finally:
            with self._changed:
                self._is_stopping = True
                left = [*filter(None, [job]), *self._waiting]
                self._waiting.clear()
            for job in left:
                job.put(Stopping())

    def _await_request(self) -> None:
        """Until one is waiting. Where none comes for long the memory is given back."""
        idle_from_s = time.monotonic()
        while True:
            with self._changed:
                if self._waiting or self._changed.wait(_SIGNAL_S):
                    return
            if self.is_loaded and time.monotonic() - idle_from_s >= self._unload_after_s:
                self._unload()
                idle_from_s = time.monotonic()  # should it have failed
            # Who asks for its health before anything else may not ask until it is well.
            if self.trouble is not None and time.monotonic() >= self._try_again_s:
                with contextlib.suppress(errors.EbbtideError):
                    self._open_session()

    def _unload(self) -> None:
        self._close_session()
        try:
            self._llm.unload()
        except errors.EbbtideError as error:
            self._run.terminal.warn(str(error))
        else:
            self.counts["unloads"] += 1
            self._run.terminal.detail("The model was unloaded; the next request loads it again.")

    def answer(self, job: Job) -> None:
        """Streams one answer; what goes wrong becomes the job's last event."""
        llm = self._llm
        before = llm.on_progress, llm.check
        # Log-probabilities lie where the plan has room for a text to be encoded.
        is_alone = isinstance(job.request, TextQuery) or job.request.tells_logprobs
        llm.check = job.check if is_alone else partial(self._check, job)
        llm.on_progress = job.note
        try:
            job.check()
            if isinstance(job.request, TextQuery):
                self._refuse_too_long(job.request.prompt, job.request.tools)
                last = job.request.answer(llm, self._run.generation())
            else:
                self._load_changed()
                last = self._answered(job, job.request)
        except HungUp as error:
            last = error
            self.counts["requests_cancelled"] += 1
        except (errors.InputError, errors.ContextOverflow) as error:
            last = error
            self.counts["requests_refused"] += 1
        except Exception as error:
            last = error
            self.counts["requests_failed"] += 1
            self._tell(error)
            if not isinstance(job.request, TextQuery):
                self._close_session()
        finally:
            llm.on_progress, llm.check = before
            self._run.warn_of(llm.warnings)
        if self._answering is job:
            self._answering = None  # whoever hears the end may ask again at once
        job.put(last)

    def _check(self, job: Job) -> None:
        """Between two layers or tokens of an answer: raises HungUp where nobody listens to it any
        more, and answers what only the tokenizer is asked, which need not wait for its end. The
        answer then goes on for as long as that took: questions have half of the time at most,
        however many there are."""
        job.check()
        began_s = time.monotonic()
        if began_s < self._next_query_s or (query := self._next_query()) is None:
            return
        try:
            self.answer(query)
        except BaseException:
            query.put(Stopping())
            raise
        now_s = time.monotonic()
        self._next_query_s = now_s + (now_s - began_s)

    def _next_query(self) -> Job | None:
        if not self._waiting:
            return None
        with self._changed:
            queries = (job for job in self._waiting if isinstance(job.request, TextQuery))
            if (found := next(queries, None)) is not None:
                self._waiting.remove(found)
            return found

    def _answered(self, job: Job, request: Request) -> Any:
        """The Output: of several prompts that of the last one, with the usage of all. Together
        their answers have as many tokens as the context holds: there is room for so much text."""
        for prompt in request.prompts:
            self._refuse_too_long(prompt, request.tools)
            if request.more_prompts and not isinstance(prompt, str):
                self._llm.encode(prompt)  # raises InputError for ids that there are not
        output, usage, room = None, {}, self.context
        for prompt in request.prompts:
            if output is not None:
                job.put(Answered(output))
            with contextlib.closing(self._stream(request, prompt, room)) as stream:
                output = self._read(job, stream) if request.only_reads else self._told(job, stream)
            usage = _sum(usage, output.usage)
            room = max(1, room - output.usage["completion_tokens"])
        assert output is not None
        return replace(output, usage=usage)

    def _told(self, job: Job, stream: Any) -> Any:
        """The Output, once all pieces were put."""
        self._put_started(job, stream)
        for piece in stream:
            job.put(piece)
            self._llm.check()
        self._count(stream.output)
        return stream.output

    def _put_started(self, job: Job, stream: Any) -> None:
        usage = stream.output.usage
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        job.put(Started(usage["prompt_tokens"], cached))

    def _read(self, job: Job, stream: Any) -> Any:
        """The Output of a prompt that is read, and not answered."""
        self._put_started(job, stream)
        began_s = time.monotonic()
        self.session.last_logits()
        stream.close()
        output = replace(stream.output, finish_reason="length")
        self.counts["requests_read"] += 1
        self._count_tokens(output, time.monotonic() - began_s)
        return output

    def _stream(self, request: Request, prompt: Any, room: int) -> Any:
        """Of one of the prompts. room: the most tokens of its answer, where it is not the only
        one."""
        if self.session is None:
            self._open_again()
        session: Any = self.session
        generation = {**self._run.generation(), **request.generation}
        if request.is_chat:
            return session.stream(prompt, **generation)
        if request.more_prompts:
            asked = generation.get("max_new_tokens")
            generation["max_new_tokens"] = room if asked is None else min(asked, room)
        ids = self._llm.encode(prompt)
        num_held = num_common(session.tokens, ids[:-1])  # the last one is what is continued
        session.truncate(num_held)
        return session.stream(ids[num_held:], **generation)

    def estimate(self, request: Request) -> dict[str, Any]:
        """What a request would take, were it next. In this thread too: a TextQuery's answer."""
        try:
            self._refuse_too_long(request.prompt, request.tools)
            num_tokens, cached, most = token_counts(
                self._llm, self.session, request, self._run.generation()
            )
        except errors.ContextOverflow as error:  # of more tokens than are worth counting
            num_tokens, cached, most = error.needed_tokens, 0, None
        room = max(0, self.context - num_tokens)
        return {
            "object": "estimate",
            "fits": room > 0,
            "context_length": self.context,
            "prompt_tokens": num_tokens,
            "cached_tokens": cached,
            "max_completion_tokens": room if most is None else min(room, most),
            "requests_waiting": self.num_waiting,
            "model_loaded": self.is_loaded,
            **times(self.counts, num_tokens - cached),
        }

    def _refuse_too_long(self, prompt: Any, tools: Iterable[Any]) -> None:
        """Encoding and decoding take memory by the token, of which the plan has as much as the
        context needs; a text of many times that is refused before it is encoded whole."""
        texts = [prompt] if isinstance(prompt, str) else _contents(prompt)
        num_tokens = 0.0 if texts else len(prompt)  # of token ids
        self._check_room(num_tokens)
        shares = [(1.0, text) for text in texts]
        shares += [(_LEAST_SHARE, text) for text in [*_calls(prompt), *_told(tools)]]
        for share, text in shares:
            for start in range(0, len(text), _PART_CHARS):
                counted = self._llm.count_tokens(text[start : start + _PART_CHARS])
                num_tokens += share * (counted - _CUT_TOKENS)
                self._check_room(num_tokens)

    def _check_room(self, least_tokens: float) -> None:
        num_tokens = int(least_tokens)
        if num_tokens > self.context:
            raise errors.ContextOverflow(
                f"the prompt has at least {num_tokens:,} tokens, and the context holds "
                f"{self.context:,}. Shorten it, or raise --context.",
                needed_tokens=num_tokens,
                available_tokens=self.context,
            )

    def _load_changed(self) -> None:
        """Where the model's files hold another one by now, that one answers."""
        if self._llm.files_changed():
            self._run.terminal.note("The model's files changed: it is loaded anew.")
            self._close_session()
            self._open_again()

    def _open_again(self) -> None:
        try:
            self._open_session()
        except (errors.DoesNotFit, errors.ContextOverflow) as error:
            # It did once: the request is not to blame.
            raise errors.StorageError(str(error)) from None

    def _open_session(self) -> None:
        """Loads the model if need be. Raises EbbtideError, which is `trouble` until that goes
        well."""
        before = self._llm.on_progress
        # A request may be what it is loaded for: nobody loads for one that has hung up.
        check = self._llm.check or (lambda: None)
        with ProgressDisplay(self._run.terminal, check) as progress:
            self._llm.on_progress = progress
            try:
                if self._llm.files_changed():
                    self._llm.unload()
                if find_spec("llguidance") is not None:  # else they are refused
                    self._llm.expect_schemas()
                self.session = self._llm.session()
            except errors.EbbtideError as error:
                folder = f"{self._llm.files.path.parent}{os.sep}"
                self.trouble = str(error).replace(folder, "")  # anybody may ask for it
                self._try_again_s = time.monotonic() + _TRY_AGAIN_S
                raise
            finally:
                self._llm.on_progress = before
        self.trouble, self.context = None, self.session.context

    def _close_session(self) -> None:
        """The next request opens another: after a failure that was not the request's nobody knows
        what it holds."""
        session, self.session = self.session, None
        if session is not None:
            try:
                session.close()
            except errors.EbbtideError as error:
                self._run.terminal.warn(str(error))

    def _tell(self, error: Exception) -> None:
        """What went wrong here, for whoever runs the server."""
        for line in describe(error)[1][:1]:
            self._run.terminal.tell(line)
        self._run.terminal.detail("".join(traceback.format_exception(error)).rstrip())

    def _count(self, output: Any) -> None:
        self.counts["requests_answered"] += 1
        self._count_tokens(output, output.timings["prefill_s"])

    def _count_tokens(self, output: Any, prefill_s: Any) -> None:
        usage = output.usage
        self.counts["prompt_tokens"] += usage["prompt_tokens"]
        self.counts["cached_tokens"] += usage["prompt_tokens_details"]["cached_tokens"]
        self.counts["completion_tokens"] += usage["completion_tokens"]
        self.counts["prefill_seconds"] += prefill_s
        self.counts["decode_seconds"] += output.timings["decode_s"]
        self.counts["kept_bytes"] += output.kv["bytes_kept"]
        self.counts["disk_read_bytes"] += output.kv["bytes_read"].get("disk", 0)
        self.counts["disk_written_bytes"] += output.kv["bytes_written"].get("disk", 0)


def _sum(usage: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Of two objects of numbers, whose objects are such too; the first may lack some."""
    return {
        name: _sum(usage.get(name, {}), value)
        if isinstance(value, dict)
        else usage.get(name, 0) + value
        for name, value in more.items()
    }


def _contents(prompt: list[Any]) -> list[str]:
    """Of messages; token ids have none. Of answers without the thoughts that they begin with, which
    templates leave out."""
    messages = [message for message in prompt if isinstance(message, dict)]
    return [
        message["content"].rpartition(_END_OF_THOUGHTS)[2]
        if message["role"] == "assistant"
        else message["content"]
        for message in messages
    ]


def _calls(prompt: str | list[Any]) -> list[str]:
    """Arguments of calls, which templates write in ways of their own. Thoughts before them they
    leave out, or most of them do."""
    messages = [message for message in prompt if isinstance(message, dict)]
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    return [_as_written(call["arguments"]) for call in calls]


def _told(tools: Iterable[Any]) -> list[str]:
    """What a model is told of tools; one that is wrong is refused later."""
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    described = [function for function in functions if isinstance(function, dict)]
    return [_as_written({name: own.get(name) for name in _TOLD}) for own in described]


def _as_written(value: Any) -> str:
    """JSON as templates write it: letters of all scripts as they are."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # what is wrong is said later
        return ""
