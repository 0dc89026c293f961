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
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .answers.json_schema import checked_schema
from .answers.tools import checked_choice, checked_tools, name_of, shown_tool
from .errors import BadCheckpoint, InputError

ALIASES = {"stop": "stop_strings", "eos_token_id": "eos_token_ids"}
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1000
MOST_TOP_LOGPROBS = 20
THINK_LEVELS = ("low", "medium", "high")
MIN_TEMPERATURE = 1e-6  # below it logits / temperature overflows float32; it is greedy by then
FROM_MODEL = (
    "max_new_tokens do_sample temperature top_k top_p min_p repetition_penalty stop_strings".split()
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one answer; InputError names a value that is not allowed.

    `resolve` gives a changed copy, `from_model_folder` what a model's files ask for.
    """

    max_new_tokens: int | None = None  # None: to an EOS token or the context's end
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    # Taken off the logits of the answer's tokens so far, once and for each time; 0: off.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        names = [name_of(tool) for tool in self.tools]
        must = self.must_call
        if must and (must not in names if isinstance(must, str) else not names):
            offered = ", ".join(names) or "none"
            raise InputError(f"tool_choice asks for a call, and the tools for it are: {offered}")

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

    def resolve(self, **overrides: Any) -> GenerationConfig:
        """A copy with what a caller gave; a value of None means "not given".

        `stop` and `eos_token_id` are other names for stop_strings and eos_token_ids. An unknown
        name is an InputError that lists the known ones.
        """
        given: dict[str, Any] = {}
        for name, value in overrides.items():
            own = ALIASES.get(name, name)
            if own not in _CHECKS:
                raise InputError(_unknown(name))
            if value is None:
                continue
            if own in given:
                raise InputError(f"{own} is given twice, as {name} and by its other name")
            given[own] = _CHECKS[own](name, value)
        if given.get("temperature", 0.0) > 0 and "do_sample" not in given:
            given["do_sample"] = True
        resolved = dataclasses.replace(self, **given)
        if resolved.greedy:
            idle = [n for n in ("temperature", "top_k", "top_p", "min_p") if given.get(n)]
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
            values: dict[str, Any] = {"eos_token_ids": _ids("eos_token_id", eos)}
        except InputError as error:
            raise BadCheckpoint(f"{folder}: {error}") from None
        notes = []
        for name in FROM_MODEL:
            if wishes.get(name) is None:
                continue
            try:
                values[name] = _CHECKS[name](name, wishes[name])
            except InputError as error:
                notes.append(f"generation_config.json: {error}; left out")
        return cls(**values, warnings=tuple(notes))


def _unknown(name: str) -> str:
    known = [*_CHECKS, *ALIASES]
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


# One check per field: (name, value) -> the value in its own type, or InputError.


def _refuse(name: str, value: Any, allowed: str) -> InputError:
    return InputError(f"{name} must be {allowed}, not {value!r}")


def _whole(low: int, high: int, optional: bool = False):
    allowed = f"a whole number from {low} to {high}"

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise _refuse(name, value, allowed)
        if not low <= int(value) <= high:
            raise _refuse(name, value, allowed)
        return int(value)

    return check


def _number(low: float, high: float):
    upper = f"a number from {low:g} to {high:g}"
    allowed = f"a number of at least {low:g}" if high == math.inf else upper

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _refuse(name, value, allowed)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (low <= number <= high and math.isfinite(number)):
            raise _refuse(name, value, allowed)
        return number

    return check


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise _refuse(name, value, "text, or a list of texts")
    if len(texts) > MAX_STOP_STRINGS:
        raise InputError(f"{name} may hold {MAX_STOP_STRINGS} texts at most, not {len(texts)}")
    for text in texts:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InputError(
                f"{name}: each must have 1 to {MAX_STOP_CHARS} characters, one has {len(text)}"
            )
    return tuple(dict.fromkeys(texts))


def _think(name: str, value: Any) -> bool | str | None:
    is_level = isinstance(value, str) and value in THINK_LEVELS
    if not (value is None or isinstance(value, bool) or is_level):
        raise _refuse(name, value, f"True, False or one of {', '.join(THINK_LEVELS)}")
    return value


def _schema(name: str, value: Any) -> str | None:
    return None if value is None else checked_schema(name, value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    allowed = "a token id, or a list of them"
    ids = (value,) if isinstance(value, (int, float, str)) else value
    if not isinstance(ids, Iterable) or isinstance(ids, Mapping):
        raise _refuse(name, value, allowed)
    ids = tuple(ids)
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, Integral) or int(item) < 0:
            raise _refuse(name, value, allowed)
    return tuple(dict.fromkeys(int(item) for item in ids))


_CHECKS = {
    "max_new_tokens": _whole(1, 2**31 - 1, optional=True),
    "do_sample": _switch,
    "temperature": _number(0, math.inf),
    "top_k": _whole(0, 2**31 - 1),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),  # beyond, penalised logits leave float32
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "stop_strings": _texts,
    "seed": _whole(0, 2**64 - 1, optional=True),
    "eos_token_ids": _ids,
    "think": _think,
    "json_schema": _schema,
    "tools": checked_tools,
    "tool_choice": checked_choice,
    "parallel_tool_calls": _switch,
    "logprobs": _whole(0, MOST_TOP_LOGPROBS, optional=True),
}
