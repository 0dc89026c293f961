"""A run as a page: the plan, a timeline of tiers and speeds, the numbers, the result.

One HTML file that needs nothing else: no script, no font, no picture from anywhere, and a policy in
its head that forbids all of them. Knows the shape of an Output and of recorded samples.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ebbtide import format_size

from .chart import Band, Series, bar, chart
from .recorder import Recorder, Sample
from .values import show_duration

_PHASES = {
    "load": "loading",
    "restore": "taking from disk",
    "prefill": "reading",
    "decode": "writing",
}
_TIERS = {"device": "GPU", "host": "RAM", "disk": "disk"}
_FAR_ABOVE = 8
_SMOOTH = 6  # samples that a speed is taken over
_STYLE = Path(__file__).with_name("report.css")


def run_report(title: str, recorder: Recorder, fields: dict[str, Any]) -> str:
    """The page of one run. title: what was done; fields: the object that `--json` prints for it;
    its text is shown as it is.
    """
    last_s = recorder.samples[-1].at_s if recorder.samples else 0.0
    sections = [
        _tiles(_run_tiles(fields, last_s)),
        _section("The plan", plan_section(fields["plan"])),
        _section("What happened when", _timeline(recorder, last_s)),
        _section("The result", f'<div class="result">{escape(fields["text"])}</div>'),
        _section("The numbers", _numbers(recorder)),
    ]
    if fields["warnings"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in fields["warnings"])
        sections.append(_section("Warnings", f"<ul>{items}</ul>"))
    return page(title, fields["model"], sections)


def bench_report(model: str, rows: Sequence[dict], plan: dict, ceilings: dict[str, float]) -> str:
    """The page of a benchmark: speeds over the depth, next to what the machine allows."""
    depth = max((row["depth"] for row in rows), default=0)

    def over_depth(name: str, key: str, colour: str, **how: Any) -> Series:
        points = [(row["depth"], row[key]) for row in rows if row[key] is not None]
        return Series(name, colour, points, **how)

    reading = [over_depth("reading", "prefill_tokens_per_s", "host", dots=True)]
    writing = [over_depth("writing", "decode_tokens_per_s", "host", dots=True)]
    ceiling = over_depth(
        "most that the machine allows", "decode_ceiling_tokens_per_s", "limit", dashed=True
    )
    # A limit that is far above what was reached would press that to the floor; the table has it.
    fastest = max((y for _, y in writing[0].points if y), default=0.0)
    if ceiling.points and max(y for _, y in ceiling.points if y) <= _FAR_ABOVE * fastest:
        writing.append(ceiling)
    figures = [
        _figure(
            f"{name}, tokens/s",
            series,
            x_name="tokens already there",
            x_format=lambda x: f"{x:,.0f}",
            y_format=lambda y: f"{y:,.4g}",
            x_max=depth or 1,
        )
        for name, series in (("Reading", reading), ("Writing", writing))
    ]
    head = ("depth", "reading, tokens/s", "writing, tokens/s", "ceiling", "hit rate", "stalled")
    cells = [
        (
            f"{row['depth']:,}",
            f"{row['prefill_tokens_per_s']:,.1f}",
            f"{row['decode_tokens_per_s']:,.2f}",
            "-"
            if row["decode_ceiling_tokens_per_s"] is None
            else f"{row['decode_ceiling_tokens_per_s']:,.1f}",
            f"{row['hit_rate']:.3f}",
            f"{row['stall_s']:.2f} s",
        )
        for row in rows
    ]
    tiles = [
        (f"{speed / 1e9:.2f} GB/s", f"{_TIERS.get(t, t)} reads") for t, speed in ceilings.items()
    ]
    return page(
        "Benchmark",
        model,
        [
            _tiles(tiles),
            _section("Speed over depth", "".join(figures)),
            _section("The numbers", _table(head, cells)),
            _section("The plan", plan_section(plan)),
        ],
    )


def page(title: str, model: str, sections: Sequence[str]) -> str:
    """A whole HTML document."""
    import ebbtide

    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    document = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)} - Ebbtide</title>"
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(model)} · Ebbtide {ebbtide.__version__} · "
        f"{escape(when)}</p></header>{''.join(sections)}</main></body></html>\n"
    )
    return document.replace("\0", "\ufffd")  # which HTML does not have


# --- parts


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    inner = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles
    )
    return f'<section class="tiles">{inner}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    table = (
        f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(r, 'td') for r in rows)}</tbody>"
    )
    return f'<div class="wide"><table>{table}</table></div>'


def _figure(title: str, series: Sequence[Series], **how: Any) -> str:
    keys = "".join(
        f'<span class="key"><i class="c-{s.colour}{" dashed" if s.dashed else ""}"></i>'
        f"{escape(s.name)}</span>"
        for s in series
    )
    caption = f"<figcaption>{escape(title)}{keys}</figcaption>"
    return f"<figure>{caption}{chart(title, series, **how)}</figure>"


def _run_tiles(fields: dict[str, Any], last_s: float) -> list[tuple[str, str]]:
    usage, memory = fields["usage"], fields["memory"]
    host = memory["host"]
    return [
        (f"{usage['prompt_tokens']:,}", "tokens read"),
        (f"{usage['completion_tokens']:,}", "tokens written"),
        (show_duration(last_s), "in all"),
        (
            f"{format_size(host['peak_bytes'])} of {format_size(host['budget_bytes'])}",
            "RAM at most, and its budget",
        ),
        (format_size(memory["disk"]["peak_bytes"]), "on disk at most"),
    ]


def plan_section(plan: dict) -> str:
    """A bar for each tier: what was to lie there, next to the budget."""
    out = []
    for tier in ("device", "host", "disk"):
        items = {k: v for k, v in (plan.get(tier) or {}).items() if v}
        if not items:
            continue
        total = sum(items.values())
        budget = (plan.get("budget_bytes") or {}).get(tier) or total
        parts = [(f"{name}: {format_size(size)}", size) for name, size in items.items()]
        keys = "".join(
            f'<span class="key"><i class="p{n % 8}"></i>{escape(name)}</span>'
            for n, (name, _) in enumerate(parts)
        )
        out.append(
            f"<h3>{_TIERS[tier]}: {format_size(total)} of {format_size(budget)}</h3>"
            f"{bar(parts, budget)}<p>{keys}</p>"
        )
    if not out:
        return ""
    ceiling, windows = plan.get("decode_ceiling_tokens_per_s"), plan.get("window_layers")
    facts = [
        f"{plan['context']:,} tokens of context, {plan['largest_context']:,} would fit",
        f"{plan['kv_bits_per_element']:.2f} bits per element of KV",
        f"{plan['resident_bytes_per_token']:,.0f} bytes per token stay near, "
        f"{plan['far_bytes_per_token']:,.0f} are far",
        *([f"{windows} layers keep what their windows show"] if windows else []),
        f"weights: {plan['weight_bits']} bits, {plan['layers_streamed']} layers streamed",
        *([f"at most {ceiling:,.1f} tokens/s at full context"] if ceiling else []),
    ]
    return "".join(out) + f"<p>{escape('; '.join(facts))}.</p>"


def _timeline(recorder: Recorder, last_s: float) -> str:
    samples = recorder.samples
    if not samples or not recorder.outputs:
        return ""
    bands = _bands(samples, last_s)
    tiers = [t for t in _TIERS if any(s.tier_bytes.get(t) for s in samples)]

    def over_time(name: str, colour: str, value: Callable[[Sample], float], **how: Any) -> Series:
        return Series(name, colour, [(s.at_s, value(s)) for s in samples], **how)

    common = {"x_name": "seconds", "x_max": last_s, "bands": bands}
    figures = []
    if tiers:
        pages = [over_time(_TIERS[t], t, lambda s, t=t: s.tier_bytes.get(t, 0)) for t in tiers]
        figures.append(
            _figure(
                "Where the pages lie",
                pages,
                y_format=format_size,
                stacked=True,
                base=1024,
                **common,
            )
        )
    budget = recorder.outputs[-1].memory["host"]["budget_bytes"]
    memory = [over_time("this process", "host", lambda s: s.rss_bytes)]
    if budget:
        memory.append(Series("budget", "limit", [(0.0, budget), (last_s, budget)], dashed=True))
    figures.append(_figure("RAM", memory, y_format=format_size, base=1024, **common))
    for phase, name in (("prefill", "Reading"), ("decode", "Writing")):
        points = speeds(samples, phase)
        if points:
            series = [Series(_PHASES[phase], "host" if phase == "prefill" else "disk", points)]
            figures.append(
                _figure(f"{name}, tokens/s", series, y_format=lambda y: f"{y:,.4g}", **common)
            )
    return "".join(figures)


def speeds(samples: Sequence[Sample], phase: str) -> list[tuple[float, float | None]]:
    """(at_s, tokens/s) over the last few samples of a phase; None between two answers."""
    found: list[tuple[float, float | None]] = []
    for _, group in itertools.groupby(samples, lambda s: (s.phase, s.answer)):
        part = list(group)
        if part[0].phase != phase:
            continue
        if found:
            found.append((part[0].at_s, None))
        for i in range(1, len(part)):
            first, last = part[max(0, i - _SMOOTH)], part[i]
            if last.at_s > first.at_s:
                found.append((last.at_s, (last.done - first.done) / (last.at_s - first.at_s)))
    return found


def _bands(samples: Sequence[Sample], last_s: float) -> list[Band]:
    bands, start_s = [], 0.0
    for (phase, _), group in itertools.groupby(samples, lambda s: (s.phase, s.answer)):
        stop_s = list(group)[-1].at_s
        bands.append(Band(start_s, stop_s, _PHASES.get(phase, phase), other=phase == "decode"))
        start_s = stop_s
    return bands


def _numbers(recorder: Recorder) -> str:
    """A line for each answer that was made here, and the traffic of all."""
    if not recorder.outputs:
        return "<p>Every part had been finished by an earlier run; nothing was read here.</p>"
    head = (
        *("", "tokens read", "again", "tokens/s", "first after", "written", "tokens/s"),
        *("hit rate", "stalled", "missed mass"),
    )
    rows = []
    for title, output in zip(recorder.titles, recorder.outputs, strict=False):
        usage, timings, kv = output.usage, output.timings, output.kv
        rows.append(
            (
                title,
                f"{usage['prompt_tokens']:,}",
                f"{usage['recomputed_tokens']:,}",
                f"{timings['prefill_tokens_per_s']:,.0f}",
                show_duration(timings["ttft_s"]),
                f"{usage['completion_tokens']:,}",
                f"{timings['decode_tokens_per_s']:,.1f}",
                f"{kv['hit_rate']:.3f}",
                f"{kv['stall_s']:.2f} s",
                f"{kv['missed_mass']['mean']:.4f}",
            )
        )
    moved = []
    for tier, name in _TIERS.items():
        read = sum(o.kv["bytes_read"].get(tier, 0) for o in recorder.outputs)
        written = sum(o.kv["bytes_written"].get(tier, 0) for o in recorder.outputs)
        if read or written:
            moved.append((name, format_size(read), format_size(written)))
    traffic = _table(("pages of", "read", "written"), moved) if moved else ""
    return _table(head, rows) + traffic
