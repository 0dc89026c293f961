"""An answer as it is heard, and as it is told: the object of `--json`, the numbers in a line.

Knows the shape of an Output and nothing of how it came about.
"""

from __future__ import annotations

from typing import Any

from ebbtide import format_size


class Heard:
    """What a stream has said so far, so that a cancelled run still has its answer."""

    def __init__(self, llm: Any):
        self._llm = llm
        self.stream: Any = None
        self.text = ""
        self.token_ids: list[int] = []

    def add(self, piece: Any) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids

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
    return (
        f"{usage['prompt_tokens']:,} tokens read at {timings['prefill_tokens_per_s']:,.0f}/s "
        f"({usage['prompt_tokens_details']['cached_tokens']:,} cached), "
        f"{usage['completion_tokens']:,} written at {timings['decode_tokens_per_s']:,.1f}/s, "
        f"first after {timings['ttft_s']:.2f} s; "
        f"peak {format_size(memory['host']['peak_bytes'])} of RAM, "
        f"{format_size(memory['disk']['peak_bytes'])} of disk"
    )
