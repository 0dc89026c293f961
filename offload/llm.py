"""The Python API: open a model under a budget, ask it, talk to it, look at its logits.

Weights are loaded at the first request, when its length is known and the plan can give memory to
what needs it. Ties the parts together and computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..prefetch.stats import Stats
from .answers.rules import AnswerRules
from .disk.spill_dir import prefix_dir, volume_warnings, writable_spill_dir
from .errors import InputError
from .mode import Mode
from .models.hub import log_download, resolve_model
from .models.opened_model import OpenedModel, open_model
from .options import Options, checked_count
from .output import Output, Progress
from .pages.geometry import Geometry
from .planning.admission import Admission
from .planning.budget import Budget, resolve
from .planning.device import choose_device, device_peak_bytes, free_device_bytes, kernel_warnings
from .planning.plan import Plan
from .prefixes.keeper import PrefixKeeper
from .prefixes.store import open_prefix_store
from .running import scoring
from .running.runtime import Runtime
from .sessions import forked
from .sessions.async_stream import AsyncAnswers, AsyncStream
from .sessions.generation import GenerationConfig
from .sessions.open_sessions import OpenSessions
from .sessions.session import Session
from .sessions.session_file import SessionFile
from .sessions.stream import Stream
from .text import long_texts
from .text.prompt import Messages, Prompt, TokenIds, check_room, checked_ids, is_messages
from .text.template import check_messages
from .text.text import Think, Tokenizer

if TYPE_CHECKING:
    from .running.engine import Engine

_SESSION_SEQUENCES = 4  # a session's own raw tail, two snapshots and one fork


class LLM:
    """A language model whose context may be larger than memory; a context manager. Open it with
    `LLM.open`. One LLM serves one thread at a time: a call from a second thread while one runs
    raises InputError. on_progress: called with Progress while loading and reading. check: called
    before each layer while reading; what either raises stops the run. warnings: what a user should
    know. plan: where things lie for the last request, or would lie for the context asked for."""

    def __init__(
        self,
        options: Options,
        *,
        geometry: Geometry | None = None,
        mode: Mode | None = None,
        **store_options,
    ):
        """For `open`. geometry, mode, store_options (see Runtime) replace what would be chosen."""
        model, budget = options.model, options.budget
        forked.watch()
        if options.threads is not None:
            forked.set_threads(options.threads)
        self._options, self._geometry, self._store_options = options, geometry, store_options
        self._warnings: list[str] = forked.warnings()
        self._is_open = True
        self.on_progress: Callable[[Progress], None] | None = None
        self.check: Callable[[], None] | None = None
        self.builtin = model is None
        self._path = resolve_model(model, options.revision, log_download)
        self.model_name = "ebb-nano (built in)" if self.builtin else str(model)
        self.device = choose_device(options.device)
        self._warnings += kernel_warnings(self.device)
        opened = open_model(self._path, self.model_name, options, geometry)
        self._spill_dir = None
        if budget.disk_memory != 0:
            self._spill_dir = writable_spill_dir(options.spill_dir)
            self._warnings += volume_warnings(self._spill_dir)
        self._prefixes = open_prefix_store(
            None if self._spill_dir is None else prefix_dir(options.spill_dir),
            options.prefix_cache,
            self._warn,
        )
        self._mode = mode or Mode(options.mode, selector_options={"epsilon": options.epsilon})
        self._context = options.context
        self._limits = resolve(budget, self._spill_dir, free_device_bytes(self.device))
        if self._limits.device_bytes is None and budget.device_memory not in ("auto", 0):
            self._warn("device_memory is without effect: the model computes on the CPU.")
        self.sessions = OpenSessions()
        self.async_answers = AsyncAnswers(self)
        self.last_stats: Stats | None = None  # traffic of pages in the last `logits` or `score`
        self._take(opened)

    def _take(self, opened: OpenedModel) -> None:
        """Answer by this model from now on: all that depends on one is made anew. Raises
        ContextOverflow, and leaves everything as it is, where it is not made for the context."""
        admission = Admission(
            opened.facts,
            opened.checkpoint,
            opened.geometry,
            self._limits,
            self.device,
            self._spill_dir,
            self._mode,
            self._options.draft,
            self._store_options,
        )
        self._first_plan = admission.plan(self._context or admission.natural_context())
        self.admission, self._opened = admission, opened
        self.files, self.config, self.geometry = opened.files, opened.config, opened.geometry
        self._tokenizer: Tokenizer | None = None
        for cached in ("fingerprint", "tokens_fingerprint"):
            self.__dict__.pop(cached, None)
        self._warn(*opened.generation.warnings)
        self.rules = AnswerRules(self)

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        budget: Budget | None = None,
        mode: str = "exact",
        epsilon: float = 0.02,
        kv_bits: str | int = "auto",
        weight_bits: str | int = "auto",
        context: int | None = None,
        spill_dir: str | Path | None = None,
        threads: int | None = None,
        draft: bool = True,
        prefix_cache: int | str = 0,
    ) -> LLM:
        """Open a model: a folder in Hugging Face's layout, a GGUF file, an id, or None for the
        small built-in one.
        context: the most tokens a request may reach; None: what each request needs. spill_dir:
        where pages that do not fit in memory go; None: the user's cache folder. draft: whether
        tokens may be guessed and several verified at once; answers are the same. prefix_cache: disk
        space for pages of what was read, which serve when it is read again: a size, "auto" or 0.
        Checks files and plan, loads no weights yet. Raises ModelError, InputError, and DoesNotFit
        when `context` was given and cannot fit."""
        llm = cls(
            Options(
                model=model,
                revision=revision,
                device=device,
                dtype=dtype,
                budget=Budget() if budget is None else budget,
                mode=mode,
                epsilon=epsilon,
                kv_bits=kv_bits,
                weight_bits=weight_bits,
                context=context,
                spill_dir=spill_dir,
                threads=threads,
                draft=draft,
                prefix_cache=prefix_cache,
            )
        )
        if context is not None:
            llm.plan.raise_if_unfit()
        return llm

    from_pretrained = open

    def measure(self) -> None:
        """Measure this machine's memory, disk and products, for a second or so: plans that are made
        from now on say what speeds these allow."""
        self.admission.measure()

    @property
    def plan(self) -> Plan:
        """The plan of the latest request; before one, of the context or what fits."""
        return self.admission.latest_plan or self._first_plan

    @property
    def load_s(self) -> float:
        """What loading the weights took; 0 before the first request."""
        return self.admission.load_s

    @property
    def is_loaded(self) -> bool:
        """Whether weights are in memory, for the next request to find."""
        return self.admission.weights is not None

    # ---- answers -----------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **generation: Any) -> Output:
        """Answer one prompt: a str is raw text, a list, tensor or array of ints token ids, a list
        of {role, content} goes through the chat template. Generation names follow Hugging Face's
        GenerationConfig; unknown ones raise InputError."""
        stream = self.stream(prompt, **generation)
        for _ in stream:
            pass
        return stream.output

    def chat(self, messages: Messages, **generation: Any) -> Output:
        """Answer the last of some messages, each {"role": ..., "content": a text, or a list of
        {"type": "text", "text": ...}}. Raises InputError for anything else."""
        if not is_messages(messages):
            check_messages(messages)  # which says what it is
        return self.generate(messages, **generation)

    def stream(self, prompt: Prompt, **generation: Any) -> Stream:
        """Like generate, piece by piece; see Stream. Its pages are freed at the end, or by
        `close()`."""
        config = self.generation.resolve(**generation)
        self.refuse_too_long(prompt)
        ids = self.encode(prompt, **config.chat_options)
        if not ids:
            raise InputError("the prompt is empty; there is nothing to answer")
        chat = is_messages(prompt)
        constraint = self.rules.constraint(config, ids if chat else None)
        context = self._context_for(len(ids), config)
        check_room(len(ids) + 1, context, self.config.max_positions)
        is_known = self._context is not None or config.max_new_tokens is not None
        reach = context if is_known else self.config.max_positions
        session = self.open_session(context, sequences=1, reach=reach)
        try:
            session.append(ids, process=False)
            return Stream(session, config, constraint, closes_session=True, chat=chat)
        except BaseException:
            session.close()
            raise

    def astream(self, prompt: Prompt, **generation: Any) -> AsyncStream:
        """Like stream, for asyncio: `async for piece in llm.astream(...)`; see AsyncStream."""
        return self.async_answers.stream(lambda: self.stream(prompt, **generation))

    async def agenerate(self, prompt: Prompt, **generation: Any) -> Output:
        """Like generate, while the loop goes on. Several at once are answered in turn."""
        return await self.async_answers.output(lambda: self.stream(prompt, **generation))

    def expect_schemas(self) -> None:
        """Set aside the memory that answers take which are kept to a schema, before a session takes
        all there is. (Else the first such answer does it.) Raises DoesNotFit."""
        self.rules.expect()

    def plan_at(self, context: int) -> Plan:
        """The Plan for one request that reaches `context` tokens; starts and loads nothing. `fits`
        may be False. Raises InputError for what is no number of tokens."""
        return self.admission.plan(checked_count("context", context))

    def session(self, name: str | None = None, *, context: int | None = None) -> Session:
        """A conversation or document that stays; its context is `context`, else the one given to
        `open`, else the largest that fits.
        name: its tokens, and their pages where there is a prefix_cache, are kept and found by the
        next session of that name, also in another process. The rest the first answer reads again,
        and counts in `recomputed_tokens`. Raises InputError for a name in use elsewhere or of a
        model with another tokenizer."""
        if context is not None:
            context = checked_count("context", context)
        context = context or self._context
        reach = context or self.config.max_positions
        context = context or self.admission.natural_context(_SESSION_SEQUENCES)
        if name is None:
            return self.open_session(context, sequences=_SESSION_SEQUENCES, reach=reach)
        file = SessionFile(name, self.tokens_fingerprint)
        try:
            session = self.open_session(context, sequences=_SESSION_SEQUENCES, reach=reach)
        except BaseException:
            file.close()
            raise
        try:
            session.restore(file)
        except BaseException:
            file.close()
            session.close()
            raise
        return session

    async def asession(self, name: str | None = None, *, context: int | None = None) -> Session:
        """Like session, while the loop goes on: loading weights takes seconds."""
        begin = partial(self.session, name, context=context)
        return await self.async_answers.call(begin, undo=Session.close)

    def keep_in_memory(self, share: float) -> None:
        """Let at most `share` of the far planes of a session that fills its context lie in memory,
        and the rest on disk, however large the budget: to see what that costs. Modes that select
        keep a tenth more at hand. Raises DoesNotFit, and InputError for no share from 0 to 1."""
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not 0 <= share <= 1:
            raise InputError(f"share is {share!r}; allowed is a number from 0 to 1")
        context = self._context or self.admission.natural_context(_SESSION_SEQUENCES)
        self.admission.keep_in_memory(share, context, _SESSION_SEQUENCES)

    def forget_files(self) -> bool:
        """Have the system's cache let go of the model's files, where tokens read some of them: to
        measure what the disk gives. False where the system cannot be told."""
        weights = self.admission.weights
        return weights is None or weights.forget_files()

    def logits(
        self, token_ids: TokenIds, *, prefill_tokens: int | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Logits (n, vocab_size) float32 on the CPU, of all tokens or the `last` n.
        The first prefill_tokens (default: all) are prefilled, the rest fed one by one through the
        decode path. The result is part of the host budget: DoesNotFit when it is too large."""
        return scoring.logits(self, token_ids, prefill_tokens, last)

    def score(
        self, token_ids: TokenIds, *, prefill_tokens: int | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Log-probability (n,) of each token after those before it; n is len(token_ids) - 1, or
        `last`.
        Runs in blocks: memory does not grow with the vocabulary times the text."""
        return scoring.score(self, token_ids, prefill_tokens, last)

    # ---- text --------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same model; another one, or the same trained further, has another."""
        return self.files.fingerprint()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises BadCheckpoint when its files have none, or when they
        changed before they were read."""
        if self._tokenizer is None:
            files = self.files.tokenizer()
            if not Path(self.model_name).expanduser().exists():  # a folder of the hub's cache
                files = replace(files, name=self.model_name.partition(" ")[0])
            tokenizer = Tokenizer(files)
            self._opened.check_texts()
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def warnings(self) -> list[str]:
        """What a user should know by now, in whole sentences."""
        return [*self._warnings, *(self._tokenizer.warnings if self._tokenizer else ())]

    @property
    def generation(self) -> GenerationConfig:
        """The model's own settings. An answer ends where the tokenizer says too: files that are
        made for chat often name its EOS there alone."""
        own = self._opened.generation
        more = tuple(i for i in self.tokenizer.end_ids if i not in own.eos_token_ids)
        return replace(own, eos_token_ids=(*own.eos_token_ids, *more)) if more else own

    def encode(
        self,
        prompt: Prompt,
        *,
        begins: bool = True,
        think: Think = None,
        tools: list[Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt. begins: whether raw text stands at the beginning, where a BOS
        belongs. think, tools: what a chat template is told."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, None if begins else False)
        if is_messages(prompt):
            return self.tokenizer.chat_ids(prompt, think=think, tools=tools)
        return checked_ids(prompt, self.config.vocab_size)

    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens a prompt has."""
        return len(self.encode(prompt))

    def least_tokens(self, text: str) -> int:
        """No more tokens than a text has, and nearly as many: for texts of any length, since
        `count_tokens` takes memory by the token, which plans have for a context alone."""
        return long_texts.least_tokens(text, self.count_tokens)

    def refuse_too_long(self, prompt: Prompt, context: int | None = None) -> None:
        """Before a text is encoded that is far longer than a context (a session's, else `open`'s).
        Raises ContextOverflow, and DoesNotFit for one that the budget has no room for."""
        long_texts.refuse_too_long(self, prompt, context)

    # ---- care --------------------------------------------------------------------------------

    def files_changed(self) -> bool:
        """Whether the model's files hold another one than is answered by, which `unload` takes. A
        file that was touched, or came again as a copy, is the same, as far as its size, its
        header, its tensors' edges and a megabyte of bytes of all files tell."""
        return self._opened.is_replaced()

    def unload(self) -> None:
        """Let go of the weights; the next request loads them again. Files that changed are opened
        anew, under the limits that were found first. Raises InputError while a session is open,
        ModelError for files that cannot be opened, ContextOverflow for a model that is not made for
        the context: weights are let go of then, too."""
        with self.sessions.nothing_left():
            if self.sessions:
                raise InputError("a session is open and needs the weights: close it first")
            self.admission.close()
            self._opened.checkpoint.close()
            if self.files_changed():
                self._take(open_model(self._path, self.model_name, self._options, self._geometry))

    def close(self) -> None:
        """Close all sessions and free everything. May be called again."""
        self.async_answers.close()
        self._is_open = False
        failure = self.sessions.close()
        self.admission.close()
        self._opened.checkpoint.close()
        if failure is not None:
            raise failure

    def __repr__(self) -> str:
        return f"<LLM {self.model_name!r}, {'open' if self._is_open else 'closed'}>"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def report(self, progress: Progress) -> None:
        """For what loads and reads: may raise, which stops it."""
        self.async_answers.check()
        if self.on_progress is not None:
            self.on_progress(progress)

    def check_wanted(self) -> None:
        """Before each layer that reads: may raise, which stops it."""
        self.async_answers.check()
        if self.check is not None:
            self.check()

    @cached_property
    def tokens_fingerprint(self) -> str:
        """Two models with the same one spell the same tokens."""
        fingerprint = self.files.tokens_fingerprint()
        self._opened.check_texts()
        return fingerprint

    def reserve_raw(self, engine: Engine) -> None:
        """Before a fork: a session's plan has room for _SESSION_SEQUENCES raw tails, snapshots
        included."""
        self.admission.check_fork(self.sessions.num_of(engine), _SESSION_SEQUENCES)

    def device_peak_bytes(self) -> int:
        """The most GPU memory that tensors held, in bytes; 0 on the CPU."""
        return device_peak_bytes(self.device)

    # ---- inside ------------------------------------------------------------------------------

    def _context_for(self, num_prompt: int, config: GenerationConfig) -> int:
        """How many tokens a single request may reach."""
        if self._context is not None:
            return self._context
        least = min(self.config.max_positions, num_prompt + (config.max_new_tokens or 1))
        natural = 0 if config.max_new_tokens is not None else self.admission.natural_context()
        return max(natural, least)

    def context_or(self, needed: int) -> int:
        """The context that `open` was given, else what is needed."""
        return self._context or needed

    def open_session(
        self, context: int, *, sequences: int, reach: int | None = None, **request: Any
    ) -> Session:
        """Admit a context, load weights if need be, and open its store. request: see Request.
        reach: how long the text may become (default: context), for RoPE scalings that depend on it.
        A function of options and request: what happens to fit must not change a result."""
        if not self._is_open:
            raise InputError("the LLM is closed; open it again with LLM.open")
        with self.sessions.nothing_left():
            # Now: files may be replaced once they were read.
            fingerprint = self.fingerprint if self._prefixes is not None else None
            reach = reach or context
            runtime = self.admission.admit(context, sequences, reach, self.report, **request)
            try:
                session = Session(
                    self,
                    runtime,
                    runtime.open(context),
                    context,
                    keeps_snapshots=sequences > 1,
                    prefixes=self._keeper(runtime, fingerprint) if fingerprint else None,
                )
            except BaseException:
                runtime.close()
                raise
            self.sessions.add(session)
            return session

    def _keeper(self, runtime: Runtime, fingerprint: str) -> PrefixKeeper:
        model = f"{fingerprint} {self.admission.facts.weight_bits}"
        assert self._prefixes is not None
        return PrefixKeeper(self._prefixes, runtime.engine, model, self._mode, self._warn)

    def _warn(self, *texts: str) -> None:
        self._warnings += [text for text in dict.fromkeys(texts) if text not in self._warnings]
