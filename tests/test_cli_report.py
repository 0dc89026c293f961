"""The page of a run: what is drawn is what was recorded, and the page needs nothing but itself."""

from __future__ import annotations

import html
import itertools
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cli import recorder as recorder_module
from ebbtide.cli.chart import Band, Series, bar, chart, ticks
from ebbtide.cli.recorder import Recorder, Sample
from ebbtide.cli.report import bench_report, run_report, speeds

PLAN = {
    "host": {"weights": 3000, "far planes": 5000, "text": 0},
    "disk": {"far planes": 9000},
    "device": None,
    "budget_bytes": {"host": 10_000, "disk": 20_000, "device": None},
    "context": 4096,
    "largest_context": 8192,
    "kv_bits_per_element": 8.75,
    "resident_bytes_per_token": 200.0,
    "far_bytes_per_token": 1200.0,
    "weight_bits": "full",
    "layers_streamed": 0,
    "decode_ceiling_tokens_per_s": 12.5,
}


def output(plan=PLAN, warnings=()):
    return SimpleNamespace(
        plan=plan,
        warnings=list(warnings),
        usage={"prompt_tokens": 1000, "completion_tokens": 20, "recomputed_tokens": 7},
        timings={"prefill_tokens_per_s": 50.0, "decode_tokens_per_s": 2.0, "ttft_s": 20.0},
        memory={
            "host": {"budget_bytes": 10_000, "peak_bytes": 9_000},
            "disk": {"budget_bytes": 20_000, "peak_bytes": 4_096},
        },
        kv={
            "bytes_read": {"host": 5, "disk": 2048},
            "bytes_written": {"disk": 1024},
            "hit_rate": 0.97,
            "stall_s": 0.5,
            "missed_mass": {"mean": 0.01, "max": 0.2},
        },
    )


def fields_of(made, text="", model="m"):
    return {**vars(made), "text": text, "model": model}


def recorded(plan=PLAN, warnings=()):
    """A recorder of one answer: 10 s of reading at 100 tokens/s, 5 s of writing at 2."""
    found = Recorder()
    found.begin("what <is> it")
    for t in range(11):
        tiers = {"host": 500 * t, "disk": 1000 * max(0, t - 5)}
        found.samples.append(Sample(float(t), "prefill", 0, 100 * t, tiers, 8000 + 10 * t))
    for t in range(1, 11):
        at_s = 10 + t / 2
        found.samples.append(Sample(at_s, "decode", 0, t, {"host": 5000, "disk": 5000}, 8100))
    found.end(output(plan, warnings))
    return found


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object"):
            self.outside.append(tag)
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        self.outside += [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


HOSTILE = "</div><script>alert(1)</script> <img src=x onerror=y> & \"quoted\" 'too' \x00"


@pytest.mark.parametrize("plan", [PLAN, {}], ids=["plan", "no plan"])
def test_a_page_of_a_run(plan):
    found = recorded(plan, [HOSTILE])
    fields = fields_of(found.outputs[0], f"# Sum\n{HOSTILE}", HOSTILE)
    text = run_report(f"Title {HOSTILE}", found, fields)
    page = Page(text)
    assert page.outside == []
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text
    shown = "".join(page.text)
    assert f"# Sum\n{HOSTILE}" in shown.replace("\ufffd", "\x00")
    for words in ("1,000", "tokens read", "0.970", "0.0100", "what <is> it"):
        assert words in shown
    if plan:
        assert "RAM: 7.8 KiB of 9.8 KiB" in shown and "weights: 2.9 KiB" in html.unescape(text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg)


def test_a_run_without_samples_still_has_its_page():
    found = Recorder()
    found.begin()
    assert "earlier run" in run_report("t", found, fields_of(output()))
    found.end(output())
    assert Page(run_report("t", found, fields_of(output(), "text"))).outside == []


def test_a_page_of_a_benchmark():
    rows = [
        {
            "depth": depth,
            "prefill_tokens_per_s": 100.0 - depth / 100,
            "decode_tokens_per_s": 10.0,
            "decode_ceiling_tokens_per_s": ceiling,
            "hit_rate": 1.0,
            "stall_s": 0.0,
        }
        for depth, ceiling in ((0, None), (2048, 40.0), (8192, 20.0))
    ]
    text = bench_report("model", rows, PLAN, {"host": 3e10, "disk": 2e9})
    page = Page(text)
    assert page.outside == [] and "30.00 GB/s" in "".join(page.text)
    assert text.count("<circle") == 6
    # One depth gives one point, and no division by its zero.
    assert Page(bench_report("model", rows[:1], {}, {})).outside == []


# --- charts


def points_of(svg, colour, kind="line"):
    (path,) = re.findall(rf'<path class="{kind} c-{colour}" d="([^"]*)"', svg)
    numbers = [tuple(map(float, pair.split())) for pair in re.split("[MLZ]", path) if pair]
    return numbers


def test_a_line_goes_through_its_points():
    data = [(0.0, 0.0), (5.0, 50.0), (10.0, 100.0)]
    svg = chart("t", [Series("s", "host", data)], x_name="s", y_format=str)
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg, "host")
    # Equal steps of the data are equal steps on the page, and up is more.
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.2) and x1 > x0
    assert math.isclose(y0 - y1, y1 - y2, abs_tol=0.2) and y1 < y0


def test_areas_are_stacked():
    below = Series("a", "host", [(0.0, 1.0), (1.0, 1.0)])
    above = Series("b", "disk", [(0.0, 2.0), (1.0, 3.0)])
    svg = chart("t", [below, above], x_name="s", y_format=str, stacked=True)
    host, disk = points_of(svg, "host", "area"), points_of(svg, "disk", "area")
    assert disk[2:] == list(reversed(host[:2]))  # its lower edge is the other's upper one
    assert disk[1][1] < disk[0][1] < host[0][1]


def test_a_break_is_not_bridged():
    data = [(0.0, 1.0), (1.0, 1.0), (2.0, None), (3.0, 1.0), (4.0, 1.0), (5.0, None), (6.0, 2.0)]
    svg = chart("t", [Series("s", "host", data)], x_name="s", y_format=str)
    assert svg.count('class="line c-host"') == 3 and svg.count("<circle") == 1


def test_bands_and_bars_say_what_they_are():
    svg = chart(
        "t",
        [Series("s", "host", [(0.0, 1.0), (10.0, 1.0)])],
        x_name="s",
        y_format=str,
        bands=[Band(0, 5, "reading"), Band(5, 5.01, "too narrow")],
    )
    assert "reading" in svg and "too narrow" not in svg
    widths = [
        float(w)
        for w in re.findall(
            r'class="p\d" x="[^"]*" y="0" width="([^"]*)"', bar([("a", 1.0), ("b", 3.0)], 8.0)
        )
    ]
    assert widths == [112.5, 337.5]


@given(maximum=st.floats(1e-6, 1e15), base=st.sampled_from([10, 1024]))
def test_ticks_are_few_even_and_reach_the_top(maximum, base):
    found = ticks(maximum, base)
    assert 2 <= len(found) <= 7 and found[0] == 0
    assert found[-1] >= maximum * (1 - 1e-9) and found[-2] <= maximum
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps)


# --- what is recorded


def progress(done, total):
    return SimpleNamespace(phase="prefill", done_tokens=done, total_tokens=total)


def piece(finish=None):
    return SimpleNamespace(token_ids=[1], finish_reason=finish)


class Tiers:
    """A stream whose pages grow with each look; after its end there is nothing to see."""

    num_looks = 0

    def tiers(self):
        self.num_looks += 1
        return {"host": {"used_bytes": self.num_looks}}


def test_a_recorder_notes_first_and_last_and_thins_the_rest(monkeypatch):
    found, stream = Recorder(), Tiers()
    found._every_s = 1e9  # nothing in between is old enough
    found.begin("one")
    for done in range(1, 101):
        found.progress(progress(done, 100), stream)
    for reason in (None, None, None, "stop"):
        found.piece(piece(reason), stream)
    assert [(s.phase, s.done) for s in found.samples] == [
        *(("prefill", 1), ("prefill", 100), ("decode", 1), ("decode", 4))
    ]
    assert found.samples[-1].tier_bytes == found.samples[-2].tier_bytes
    monkeypatch.setattr(recorder_module, "_MOST_SAMPLES", 50)
    found._every_s = 1e-12  # everything is old enough
    for _ in range(400):
        found.piece(piece(), stream)
    assert (len(found.samples) <= 51 and found._every_s > 0) or found._every_s == 0.0
    assert [s.at_s for s in found.samples] == sorted(s.at_s for s in found.samples)


def test_loading_has_no_pages_yet():
    found = Recorder()
    found.begin()
    found.progress(SimpleNamespace(phase="load", done_tokens=1, total_tokens=2), None)
    assert found.samples[0].tier_bytes == {} and found.samples[0].rss_bytes > 1 << 20


def test_speeds_are_those_of_the_phase():
    found = recorded()
    reading, writing = speeds(found.samples, "prefill"), speeds(found.samples, "decode")
    assert {round(speed) for _, speed in reading} == {100}
    assert {round(speed, 6) for _, speed in writing} == {2}
    later = [Sample(20.0 + t, "prefill", 1, 10 * t, {}, 0) for t in range(3)]
    both = speeds([*found.samples, *later], "prefill")
    assert [y for _, y in both[len(reading) :]] == [None, 10.0, 10.0]
