"""Kept pages: a text that was read once is found again, and no bit of an answer changes."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from prefixes_under_test import (  # short_texts_count: a fixture
    CELL,
    MORE,
    TEXT,
    answer,
    cached,
    kept,
    last_logits,
    opened,
    short_texts_count,  # noqa: F401
)
from small_llm import open_small

from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.mode import Mode
from ebbtide.offload.prefixes import keeper as prefix_keeper
from ebbtide.offload.prefixes.texts import kept_texts


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")  # key biases: the most that sealed pages leave out


# ---- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["8", "4", "full"])
def test_a_text_that_was_read_is_not_read_again(folder, tmp_path, codec):
    with open_small(folder, tmp_path, codec) as llm:
        llm._context = 2048
        expected = answer(llm, TEXT)
        expected_logits, _ = last_logits(llm, TEXT)
    with opened(folder, tmp_path, codec=codec) as llm:
        first = answer(llm, TEXT)
        assert cached(first) == 0
    with opened(folder, tmp_path, codec=codec) as llm:
        again = answer(llm, TEXT)
        logits, restored = last_logits(llm, TEXT)
    assert first.token_ids == again.token_ids == expected.token_ids
    assert torch.equal(logits, expected_logits)
    assert cached(again) == restored == len(TEXT) - 1
    assert again.usage["recomputed_tokens"] == 0 and not again.warnings


def why_missed(folder, place, text, caplog, **options) -> str:
    """What is told to who debugs when a text is looked up."""
    with opened(folder, place, **options) as llm:
        caplog.clear()
        with caplog.at_level("DEBUG", "ebbtide"):
            last_logits(llm, text)
    return " ".join(record.getMessage() for record in caplog.records)


def test_why_a_text_was_not_found_is_told(folder, tmp_path, caplog):
    assert "No pages of any text are kept" in why_missed(folder, tmp_path, TEXT, caplog)
    with opened(folder, tmp_path) as llm:
        answer(llm, TEXT)
    assert why_missed(folder, tmp_path, TEXT, caplog) == ""
    other = [*TEXT[:700], TEXT[700] ^ 1, *TEXT[701:]]
    for text, number in ((other, 701), ([TEXT[0] ^ 1, *TEXT[1:]], 1)):
        told = why_missed(folder, tmp_path, text, caplog)
        assert f"{number - 1:,} tokens; first difference at token {number:,}." in told
    assert "other --kv-bits" in why_missed(folder, tmp_path, TEXT, caplog, codec="4")


def test_the_files_of_a_session_are_those_of_its_texts(folder, tmp_path):
    """As they are listed: those with one beginning, what a rows file has behind it left out."""
    with opened(folder, tmp_path) as llm:
        answer(llm, TEXT)
        answer(llm, TEXT[:700] + MORE)
    found = kept_texts(tmp_path)
    assert {path.name for text in found for path in text.paths} == set(kept(tmp_path))
    assert [list(text.tokens) for text in found] == [
        TEXT[: len(TEXT) // CELL * CELL],
        (TEXT[:700] + MORE)[: 1000 // CELL * CELL],
    ]


def test_what_is_written_to_be_kept_is_counted(folder, tmp_path):
    """Once: a text that was read before adds what it has more."""
    counted = 0
    for text, is_new in ((TEXT, True), (TEXT, False), (TEXT + MORE, True)):
        with opened(folder, tmp_path) as llm:
            found = answer(llm, text).kv["bytes_kept"]
        counted += found
        sizes = [os.path.getsize(prefix_dir(tmp_path) / name) for name in kept(tmp_path)]
        assert counted == sum(sizes) and (found > 0) == is_new


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("read_share", [0.0, 1.0])
def test_tiers_do_not_matter(folder, tmp_path, read_share, share):
    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT)
    with opened(folder, tmp_path, share=read_share) as llm:
        last_logits(llm, TEXT)
    with opened(folder, tmp_path, share=share) as llm:
        logits, restored = last_logits(llm, TEXT)
    assert restored and torch.equal(logits, expected)


BOUNDED = Mode("bounded", selector_options={"epsilon": 0.1})


@pytest.mark.parametrize("modes", [(Mode(), BOUNDED), (BOUNDED, Mode()), (BOUNDED, BOUNDED)])
def test_one_file_serves_every_mode(folder, tmp_path, modes):
    """Decoding in bounded mode selects by near planes, of which exact mode keeps other ones."""
    read, asked = modes
    with opened(folder, tmp_path, cap=None, mode=asked) as llm:
        expected = answer(llm, TEXT)
    with opened(folder, tmp_path, mode=read) as llm:
        answer(llm, TEXT)
    with opened(folder, tmp_path, mode=asked, share=0.4) as llm:
        found = answer(llm, TEXT)
    assert found.token_ids == expected.token_ids and cached(found) > len(TEXT) - 2 * CELL
    assert found.kv["missed_mass"] == expected.kv["missed_mass"]


def test_near_planes_may_lie_with_the_far_ones(folder, tmp_path):
    def with_far_planes(llm):
        plan = llm.admission.plan
        llm.admission.plan = lambda *a, **k: replace(plan(*a, **k), near_resident=False)

    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT)
    with opened(folder, tmp_path) as llm:
        with_far_planes(llm)
        last_logits(llm, TEXT)
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
        assert restored and torch.equal(logits, expected)
        with_far_planes(llm)
        logits, restored = last_logits(llm, TEXT)
        assert restored and torch.equal(logits, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("common", [1, 8, 9, 16, 17, 18])
def test_another_end_finds_what_is_common(folder, tmp_path, monkeypatch, common, backend):
    """Two texts that part in cell `common`. Kept are the ends 9, and 17 and 18 with rows."""
    monkeypatch.setenv("EBBTIDE_KERNELS", backend)
    parting = common * CELL + 30
    other = [*TEXT[:parting], 255 - TEXT[parting], *MORE]
    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, other)
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        logits, restored = last_logits(llm, other)
        rows = 30 if common > 16 else 0
        assert restored == {1: 0, 8: 0, 9: 9, 16: 9, 17: 17, 18: 18}[common] * CELL + rows
        assert torch.equal(logits, expected)
        assert last_logits(llm, other)[1] == len(other) - 1


def test_text_in_pieces_is_kept_and_found(folder, tmp_path):
    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT)
    for pieces in (70, 1200, 511):
        with opened(folder, tmp_path) as llm, llm.open_session(2048, sequences=1) as session:
            for start in range(0, len(TEXT), pieces):
                session.append(TEXT[start : start + pieces])
            assert torch.equal(session.last_logits(), expected)
    with opened(folder, tmp_path) as llm:
        logits, restored = last_logits(llm, TEXT)
    assert restored == len(TEXT) - 1 and torch.equal(logits, expected)


def test_a_session_that_goes_on_takes_in_the_rest(folder, tmp_path):
    """Some cells are there already, the last span of them not whole."""
    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT)
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        for begun in (2, 3, 4, 7, 13):
            with llm.open_session(2048, sequences=4) as session:
                session.append(TEXT[: begun * CELL], process=False)
                session._prefill()
                session.append(TEXT[begun * CELL :], process=False)
                session.find_kept()
                assert session.take_restored() == len(TEXT) - 1 - begun * CELL
                assert torch.equal(session.last_logits(), expected)
                session._runtime.store.check_integrity(deep=True)


def test_going_back_too_far_finds_the_text_again(folder, tmp_path):
    with opened(folder, tmp_path) as llm, llm.open_session(2048, sequences=4) as session:
        session.generate(TEXT, max_new_tokens=4)
        session.truncate(1000)  # in cell 15, whose neighbours are sealed: all is read again
        output = session.generate(MORE[:20], max_new_tokens=4)
        assert cached(output) == 9 * CELL
        assert output.usage["recomputed_tokens"] == 1000 - 9 * CELL


def test_forks_share_what_was_restored(folder, tmp_path):
    with opened(folder, tmp_path) as llm:
        expected = answer(llm, TEXT + MORE[:30])
    with opened(folder, tmp_path, share=0.4) as llm, llm.open_session(2048, sequences=4) as root:
        root.append(TEXT)
        assert root.take_restored()
        with root.fork() as branch:
            assert branch.generate(MORE[:30], max_new_tokens=12).token_ids == expected.token_ids
        root._runtime.store.check_integrity(deep=True)


# ---- whose it is ---------------------------------------------------------------------------------


def test_another_model_finds_nothing(folder, checkpoint, tmp_path):
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        assert last_logits(llm, TEXT)[1]
    for other, options in (
        (checkpoint("llama2"), {}),
        (folder, {"codec": "6"}),
        (folder, {"weight_bits": "8"}),
        (folder, {"cell_tokens": 128}),
    ):
        with opened(other, tmp_path, **options) as llm:
            assert last_logits(llm, TEXT)[1] == 0


def test_other_kernels_find_nothing(folder, tmp_path, monkeypatch):
    with opened(folder, tmp_path) as llm:
        last_logits(llm, TEXT)
        monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
        assert last_logits(llm, TEXT)[1] == 0


def test_a_hash_that_says_too_much_is_not_believed(folder, tmp_path, monkeypatch):
    """Names of four bits: other tokens have the same ones. What a file holds is compared."""

    class Short:
        def __init__(self, data: bytes):
            self._sum = sum(data) % 16

        def digest(self) -> bytes:
            return bytes([self._sum])

        def hexdigest(self) -> str:
            return self.digest().hex()

    with opened(folder, tmp_path, cap=None) as llm:
        texts = [TEXT, TEXT[300:] + MORE, MORE * 3, [*TEXT[:70], 3, *TEXT[71:]]]
        expected = [last_logits(llm, text)[0] for text in texts]
    monkeypatch.setattr(prefix_keeper, "hashlib", SimpleNamespace(sha256=Short))
    with opened(folder, tmp_path) as llm:
        for _ in range(2):
            for text, logits in zip(texts, expected, strict=True):
                assert torch.equal(last_logits(llm, text)[0], logits)


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_only_the_user_may_read_them(folder, tmp_path):
    before = os.umask(0)
    try:
        with opened(folder, tmp_path) as llm:
            last_logits(llm, TEXT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(prefix_dir(tmp_path).stat().st_mode) == 0o700
    for name in kept(tmp_path):
        assert stat.S_IMODE((prefix_dir(tmp_path) / name).stat().st_mode) == 0o600


def test_nothing_is_kept_unless_it_is_asked_for(folder, tmp_path):
    with opened(folder, tmp_path, cap=None) as llm:
        answer(llm, TEXT)
    assert not prefix_dir(tmp_path).exists()
