"""How an answer is made: lengths, sampling, stops. One frozen, checked value.

Names and meanings follow Hugging Face's GenerationConfig. Who samples is decided in this order:
temperature 0 or do_sample=False is greedy; a given temperature above 0 samples; otherwise the
model's generation_config.json decides, else greedy. Filters that nobody asked for are off (Hugging
Face turns top_k=50 on by itself).

Knows names and numbers only: no tokens, no tensors, no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..answers.tools import check_kept_calls, name_of, shown_tool
from ..errors import BadCheckpoint, InputError
from .setting_checks import CHECKS, ids_of

ALIASES = {
    "stop": "stop_strings",
    "eos_token_id": "eos_token_ids",
    "logits_processor": "logits_processors",
}
MIN_TEMPERATURE = 1e-6  # below it logits / temperature overflows float32; it is greedy by then
FROM_MODEL = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *(
        "typical_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "suppress_tokens",
        "bad_words_ids",
    ),
    "stop_strings",
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one answer; InputError names a value that is not allowed.

    `resolve` gives a changed copy, `from_model_folder` what a model's files ask for.
    """

    max_new_tokens: int | None = None  # None: to an EOS token or the context's end
    min_new_tokens: int = 0  # before so many no EOS token comes
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    typical_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    # Taken off the logits of the answer's tokens so far, once and for each time; 0: off.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Added to the logits of tokens.
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    # No run of so many tokens comes again, of the prompt's neither; 0: off.
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()  # never come
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # each, token after token, never comes
    # Each (ids (1, num_tokens), logits (1, vocab)) -> logits, as Hugging Face's LogitsProcessor.
    logits_processors: tuple[Callable[..., Any], ...] = ()
    stop_strings: tuple[str, ...] = ()  # the answer ends before the first of them
    seed: int | None = None  # None: a new one each time
    eos_token_ids: tuple[int, ...] = ()
    # None: as the chat template does by itself; one of THINK_LEVELS: so much, where it knows them
    think: bool | str | None = None
    json_schema: str | None = None  # the answer is a JSON value that this schema allows
    tools: tuple[dict[str, Any], ...] = ()  # functions that an answer to a chat may call
    tool_choice: str | dict[str, Any] = "auto"  # none, required, or the one that must be called
    parallel_tool_calls: bool = True  # whether an answer may call several
    # Tell each token's log-probability, and those of so many of the likeliest; None: of none.
    logprobs: int | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        names = [name_of(tool) for tool in self.tools]
        must = self.must_call
        if must and (must not in names if isinstance(must, str) else not names):
            offered = ", ".join(names) or "none"
            raise InputError(f"tool_choice asks for a call, and the tools for it are: {offered}")
        if self.keeps_calls or self.json_schema is not None:
            all_of = not isinstance(must, str)
            check_kept_calls(t for t in self.offered_tools if all_of or name_of(t) == must)

    @property
    def offered_tools(self) -> tuple[dict[str, Any], ...]:
        """What a model is told of."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool | str:
        """Whether the answer must be a call, or of which function."""
        if isinstance(self.tool_choice, str):
            return self.tool_choice == "required"
        return name_of(self.tool_choice)

    @property
    def keeps_calls(self) -> bool:
        """Whether calls are kept to the schemas of their arguments: where one must be made, and
        where a function asks for it by `strict`."""
        is_strict = any(tool["function"].get("strict") for tool in self.offered_tools)
        return bool(self.must_call) or is_strict

    @property
    def chat_options(self) -> dict[str, Any]:
        """What a chat template is told of all this."""
        tools = {"tools": [*map(shown_tool, self.offered_tools)]} if self.offered_tools else {}
        return {"think": self.think, **tools}

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return not self.do_sample or self.temperature < MIN_TEMPERATURE

    def check_ids(self, vocab_size: int) -> None:
        """Raises InputError where a setting names a token that a model of so many has not."""
        words = [token for word in self.bad_words_ids for token in word]
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("suppress_tokens", self.suppress_tokens),
            ("bad_words_ids", words),
        ):
            if max(ids, default=0) >= vocab_size:
                raise InputError(
                    f"{name}: there is no token {max(ids)}; the model has {vocab_size:,}, counted "
                    "from 0"
                )

    def resolve(self, **overrides: Any) -> GenerationConfig:
        """A copy with what a caller gave; a value of None means "not given".

        `stop`, `eos_token_id` and `logits_processor` are other names for stop_strings,
        eos_token_ids and logits_processors. An unknown name is an InputError that lists the known
        ones.
        """
        given: dict[str, Any] = {}
        for name, value in overrides.items():
            own = ALIASES.get(name, name)
            if own not in CHECKS:
                raise InputError(_unknown(name))
            if value is None:
                continue
            if own in given:
                raise InputError(f"{own} is given twice, as {name} and by its other name")
            given[own] = CHECKS[own](name, value)
        if given.get("temperature", 0.0) > 0 and "do_sample" not in given:
            given["do_sample"] = True
        resolved = dataclasses.replace(self, **given)
        if resolved.greedy:
            samples = ("temperature", "top_k", "top_p", "min_p", "typical_p")
            idle = [name for name in samples if given.get(name)]
            if idle:
                note = f"{', '.join(idle)}: without effect, as the answer is greedy"
                return dataclasses.replace(resolved, warnings=(*self.warnings, note))
        return resolved

    @classmethod
    def from_model_folder(cls, folder: str | Path) -> GenerationConfig:
        """What generation_config.json asks for; the EOS ids from there, else from config.json.

        Either file may be missing. A setting out of its range is left out and named in `warnings`;
        EOS ids that are not ids, or a file that is not JSON, are BadCheckpoint.
        """
        folder = Path(folder)
        wishes = _read_json(folder / "generation_config.json")
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config")
        sources = [wishes, config, text_config if isinstance(text_config, dict) else {}]
        eos = next((s["eos_token_id"] for s in sources if s.get("eos_token_id") is not None), ())
        try:
            values: dict[str, Any] = {"eos_token_ids": ids_of("eos_token_id", eos)}
        except InputError as error:
            raise BadCheckpoint(f"{folder}: {error}") from None
        sizes = (s.get("vocab_size") for s in sources[1:])
        vocab_size = next((size for size in sizes if type(size) is int), None)
        notes = []
        for name in FROM_MODEL:
            if wishes.get(name) is None:
                continue
            try:
                value = CHECKS[name](name, wishes[name])
                if vocab_size is not None:
                    cls(**{name: value}).check_ids(vocab_size)
                values[name] = value
            except InputError as error:
                notes.append(f"generation_config.json: {error}; left out")
        return cls(**values, warnings=tuple(notes))


def _unknown(name: str) -> str:
    known = [*CHECKS, *ALIASES]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name} is not a generation setting.{hint} Known: {', '.join(sorted(known))}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
