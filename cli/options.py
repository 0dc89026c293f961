"""The options that every command shares, in one table.

The flags, the environment variables, the keys of the user's file and the fields of Settings all
follow from it. Knows neither the command-line library nor the commands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import values

_MODEL, _MEMORY, _FIDELITY, _SCREEN = "Model", "Memory", "Exactness", "Output"
ANSWER_PANEL = "Answer"  # the options that shape an answer; a chat may change them as it goes


@dataclass(frozen=True)
class Option:
    """One shared option. `parse` is None for a switch; `many` collects repeated uses in a list."""

    name: str
    flags: tuple[str, ...]
    panel: str
    help: str
    parse: values.Parser | None = None
    metavar: str | None = None
    default: Any = None
    many: bool = False

    @property
    def key(self) -> str:
        """The name in the user's file."""
        return self.name.replace("_", "-")

    @property
    def envvar(self) -> str:
        return f"EBBTIDE_{self.name.upper()}"

    def shown(self, value: Any) -> str:
        """A value in words that the option takes: of a switch, its variable and its key."""
        if isinstance(value, bool):
            words = ("false", "true") if self.parse is None else ("off", "on")
            return words[value]
        if self.metavar == "SIZE" and isinstance(value, int):
            import ebbtide

            return ebbtide.format_size(value) if value else "0"
        return ", ".join(map(repr, value)) if isinstance(value, list) else str(value)


SHARED = (
    Option(
        "model",
        ("--model", "-m"),
        _MODEL,
        "A folder, a GGUF file or a Hugging Face id. Without one, the small built-in model.",
        values.plain,
        "MODEL",
    ),
    Option(
        "revision",
        ("--revision",),
        _MODEL,
        "Branch, tag or commit on the Hugging Face hub.",
        values.plain,
        "REV",
    ),
    Option(
        "device",
        ("--device",),
        _MODEL,
        "Where to compute: auto, cpu, cuda or mps.",
        values.choice("auto", "cpu", "cuda", "mps"),
        "DEVICE",
        "auto",
    ),
    Option("threads", ("--threads", "-t"), _MODEL, "CPU threads.", values.whole(1, 4096), "N"),
    Option(
        "device_memory",
        ("--device-memory",),
        _MEMORY,
        "GPU memory to use, such as 6GiB; auto, or 0 for none.",
        values.tier_size,
        "SIZE",
        "auto",
    ),
    Option(
        "host_memory",
        ("--host-memory",),
        _MEMORY,
        "RAM to use for everything, this program included.",
        values.size,
        "SIZE",
        "auto",
    ),
    Option(
        "disk_memory",
        ("--disk-memory",),
        _MEMORY,
        "Disk space for pages that do not fit in memory; 0 for none.",
        values.tier_size,
        "SIZE",
        "auto",
    ),
    Option(
        "spill_dir",
        ("--spill-dir",),
        _MEMORY,
        "Folder on a fast disk for pages that do not fit in memory, and for those that are kept. "
        "Default: your cache folder.",
        values.plain,
        "DIR",
    ),
    Option(
        "prefix_cache",
        ("--prefix-cache",),
        _MEMORY,
        "Disk space, beside --disk-memory, that keeps the pages of what ask, chat, serve and "
        "summarize read, so that it need not be read again: a size, auto, or off.",
        values.cache_size,
        "SIZE",
        "auto",
    ),
    Option(
        "context",
        ("--context",),
        _MEMORY,
        "The most tokens that prompt plus answer may reach. Default: what the request needs.",
        values.tokens(),
        "N",
    ),
    Option(
        "overflow",
        ("--overflow",),
        _MEMORY,
        "What to do with a document that is too long: error, or map-reduce (summarize only: parts, "
        "then a summary of their summaries).",
        values.choice("error", "map-reduce"),
        "HOW",
        "error",
    ),
    Option(
        "mode",
        ("--mode",),
        _FIDELITY,
        "Which pages a step attends to in full: exact (all), bounded (those that matter more than "
        "epsilon), deadline (of those, the ones that have arrived in time).",
        values.choice("exact", "bounded", "deadline"),
        "MODE",
        "exact",
    ),
    Option(
        "epsilon",
        ("--epsilon",),
        _FIDELITY,
        "How much --mode bounded may change what attention gives, in any layer.",
        values.number(0, 1, above=True, below=True),
        "F",
        0.02,
    ),
    Option(
        "draft",
        ("--draft",),
        _FIDELITY,
        "on (the default) or off: guess tokens and verify several at once (not in deadline mode). "
        "Answers are the same and usually come sooner.",
        values.switch_word,
        "on|off",
    ),
    Option(
        "kv_bits",
        ("--kv-bits",),
        _FIDELITY,
        "Bits of the KV cache: auto, full, 8, 6 or 4.",
        values.bits("auto", "full", "8", "6", "4"),
        "BITS",
        "auto",
    ),
    Option(
        "weight_bits",
        ("--weight-bits",),
        _FIDELITY,
        "Bits of the weights: auto, full, 8 or 4. Codes of 4 bits in the files stay as they are.",
        values.bits("auto", "full", "8", "4"),
        "BITS",
        "auto",
    ),
    Option(
        "max_new_tokens",
        ("--max-new-tokens", "-n"),
        ANSWER_PANEL,
        "The most tokens to generate.",
        values.tokens(),
        "N",
    ),
    Option(
        "min_new_tokens",
        ("--min-new-tokens",),
        ANSWER_PANEL,
        "The fewest tokens after which the model may end its answer.",
        values.whole(0, 2**31 - 1),
        "N",
    ),
    Option(
        "temperature",
        ("--temperature",),
        ANSWER_PANEL,
        "Randomness; 0 always takes the likeliest token.",
        values.number(0),
        "F",
    ),
    Option(
        "top_k",
        ("--top-k",),
        ANSWER_PANEL,
        "Sample from the K likeliest tokens; 0 for all.",
        values.whole(0, 2**31 - 1),
        "K",
    ),
    Option(
        "top_p",
        ("--top-p",),
        ANSWER_PANEL,
        "Sample from the likeliest tokens that together have this probability.",
        values.number(0, 1),
        "F",
    ),
    Option(
        "min_p",
        ("--min-p",),
        ANSWER_PANEL,
        "Drop tokens that are less likely than this share of the likeliest one.",
        values.number(0, 1),
        "F",
    ),
    Option(
        "typical_p",
        ("--typical-p",),
        ANSWER_PANEL,
        "Sample from the most typical tokens that together have this probability.",
        values.number(0, 1),
        "F",
    ),
    Option(
        "repetition_penalty",
        ("--repetition-penalty",),
        ANSWER_PANEL,
        "Above 1, tokens already seen become less likely.",
        values.number(0.01, 100),
        "F",
    ),
    Option(
        "presence_penalty",
        ("--presence-penalty",),
        ANSWER_PANEL,
        "Above 0, tokens that are in the answer become less likely; -2 to 2.",
        values.number(-2, 2),
        "F",
    ),
    Option(
        "frequency_penalty",
        ("--frequency-penalty",),
        ANSWER_PANEL,
        "The same, for each time that they are in it; -2 to 2.",
        values.number(-2, 2),
        "F",
    ),
    Option(
        "no_repeat_ngram_size",
        ("--no-repeat-ngram-size",),
        ANSWER_PANEL,
        "No run of N tokens is repeated, including those in the prompt; 0: any may be.",
        values.whole(0, 2**31 - 1),
        "N",
    ),
    Option(
        "stop",
        ("--stop",),
        ANSWER_PANEL,
        "End the answer before this text. May be repeated.",
        values.stop_text,
        "TEXT",
        many=True,
    ),
    Option(
        "seed",
        ("--seed",),
        ANSWER_PANEL,
        "Makes sampling repeatable.",
        values.whole(0, 2**64 - 1),
        "N",
    ),
    Option(
        "think",
        ("--think",),
        ANSWER_PANEL,
        "Whether a reasoning model thinks first; or how much, if its template has levels.",
        values.think_word,
        "on|off|low|medium|high",
    ),
    Option("json", ("--json",), _SCREEN, "Print one JSON object on one line."),
    Option("quiet", ("--quiet", "-q"), _SCREEN, "No notes and no progress; warnings stay."),
    Option("verbose", ("--verbose", "-v"), _SCREEN, "More detail; tracebacks for errors."),
)
BY_NAME = {option.name: option for option in SHARED}


@dataclass(frozen=True)
class Settings:
    """The shared options, parsed. None: not given, so the model or the runtime decides."""

    model: str | None = None
    revision: str | None = None
    device: str = "auto"
    threads: int | None = None
    device_memory: int | str = "auto"  # bytes or "auto", as the next two
    host_memory: int | str = "auto"
    disk_memory: int | str = "auto"
    spill_dir: str | None = None
    prefix_cache: int | str = "auto"  # bytes, 0 for off, or "auto"
    context: int | None = None  # of `plan` a list
    overflow: str = "error"
    mode: str = "exact"
    epsilon: float = 0.02
    draft: bool | None = None
    kv_bits: int | str = "auto"
    weight_bits: int | str = "auto"
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    think: bool | str | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    # Where each value came from, by name: "--seed", "EBBTIDE_SEED", "seed in FILE" or "default".
    origins: dict[str, str] = field(default_factory=dict)
