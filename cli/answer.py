"""An answer as it is heard, and as it is told: the object of `--json`, the numbers in a line.

Knows the shape of an Output and nothing of how it came about.
"""

from __future__ import annotations

import time
from typing import Any

from ebbtide import Progress, format_size


class Heard:
    """What a stream has said so far, so that a cancelled run still has its answer."""

    def __init__(self, llm: Any):
        self._llm = llm
        self.stream: Any = None
        self.text = ""
        self.token_ids: list[int] = []
        self._began_s = 0.0  # when the first piece came

    def add(self, piece: Any) -> None:
        self._began_s = self._began_s or time.monotonic()
        self.text += piece.text
        self.token_ids += piece.token_ids

    def progress(self, most_tokens: int | None) -> Progress:
        """How much is written; nobody knows how much will be."""
        num_tokens, elapsed_s = len(self.token_ids), time.monotonic() - self._began_s
        speed = (num_tokens - 1) / elapsed_s if elapsed_s else 0.0
        return Progress("write", num_tokens, most_tokens or num_tokens, elapsed_s, speed, None)

    def close(self) -> None:
        """Stops the run and frees its pages."""
        if self.stream is not None:
            self.stream.close()

    def fields(self) -> dict[str, Any]:
        """The JSON object of a cancelled answer, with the numbers the stream still gives."""
        output = getattr(self.stream, "output", None)
        if output is not None:
            return {**output_fields(self._llm, output), "finish_reason": "cancelled"}
        num_tokens = len(self.token_ids)
        fields = blank_fields(self._llm.model_name)
        fields["usage"] |= {"completion_tokens": num_tokens, "total_tokens": num_tokens}
        return fields | {
            "text": self.text,
            "token_ids": self.token_ids,
            "warnings": list(self._llm.warnings),
        }


def is_blank(output: Any) -> bool:
    """Whether nothing was answered, whatever was thought."""
    return not output.text.strip()


def output_fields(llm: Any, output: Any) -> dict[str, Any]:
    """The object that `--json` prints for an answer."""
    return {
        "schema": 1,
        "model": llm.model_name,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "usage": output.usage,
        "timings": output.timings,
        "memory": output.memory,
        "kv": output.kv,
        "plan": output.plan,
        "warnings": output.warnings,
        **({"thought": output.thought} if getattr(output, "thought", "") else {}),
    }


def blank_fields(model: str | None) -> dict[str, Any]:
    """The same object for a run that was cancelled before it said anything."""
    tier = {"budget_bytes": 0, "peak_bytes": 0}
    return {
        "schema": 1,
        "model": model,
        "text": "",
        "token_ids": [],
        "finish_reason": "cancelled",
        "usage": {
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "total_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
            "recomputed_tokens": 0,
        },
        "timings": {
            "load_s": 0,
            "prefill_s": 0,
            "ttft_s": 0,
            "decode_s": 0,
            "prefill_tokens_per_s": 0,
            "decode_tokens_per_s": 0,
        },
        "memory": {"device": None, "host": dict(tier), "disk": dict(tier), "peak_rss_bytes": 0},
        "kv": {
            "bits_per_element": 0,
            "pages": 0,
            "resident_bytes_per_token": 0,
            "bytes_read": {},
            "bytes_written": {},
            "bytes_kept": 0,
            "hit_rate": 0,
            "stall_s": 0,
            "missed_mass": {"mean": 0, "max": 0},
        },
        "plan": {},
        "warnings": [],
    }


def summary_line(output: Any) -> str:
    """The run's numbers in a line: tokens, speeds, memory."""
    usage, timings, memory = output.usage, output.timings, output.memory
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    read = f"{usage['prompt_tokens'] - cached:,}"
    kept = output.kv["bytes_kept"]
    guessed = usage["completion_tokens_details"]["accepted_prediction_tokens"]
    return (
        (f"{read} of {usage['prompt_tokens']:,} tokens read" if cached else f"{read} tokens read")
        + f" at {timings['prefill_tokens_per_s']:,.0f}/s, "
        f"{usage['completion_tokens']:,} written at {timings['decode_tokens_per_s']:,.1f}/s"
        + (f" ({guessed:,} guessed right), " if guessed else ", ")
        + f"first after {timings['ttft_s']:.2f} s; "
        f"peak {format_size(memory['host']['peak_bytes'])} of RAM, "
        f"{format_size(memory['disk']['peak_bytes'])} of disk"
        + (f"; {format_size(kept)} written to be kept" if kept else "")
    )


def summed_usage(made: list[dict[str, Any]], blank: dict[str, Any]) -> dict[str, Any]:
    """Of the answers made in this run; those kept from an earlier one cost nothing now. blank: the
    counts that there are, to begin with."""

    def added(counts: list[Any]) -> Any:
        if not isinstance(counts[0], dict):
            return sum(counts)
        return {name: added([count[name] for count in counts]) for name in counts[0]}

    return added([blank, *(answer["usage"] for answer in made)])


def summed_timings(made: list[dict[str, Any]], blank: dict[str, Any]) -> dict[str, Any]:
    """Times added up, and the speeds that follow. blank: fields to give zeros for."""
    if len(made) == 1:
        return made[0]["timings"]
    total = dict.fromkeys(blank, 0.0)
    for name in ("prefill_s", "decode_s"):
        total[name] = sum(answer["timings"][name] for answer in made)
    if made:
        total["load_s"], total["ttft_s"] = (
            made[0]["timings"]["load_s"],
            made[0]["timings"]["ttft_s"],
        )
        read = sum(answer["usage"]["prompt_tokens"] for answer in made)
        written = sum(answer["usage"]["completion_tokens"] for answer in made)
        total["prefill_tokens_per_s"] = read / max(total["prefill_s"], 1e-9)
        total["decode_tokens_per_s"] = written / max(total["decode_s"], 1e-9)
    return total
