"""A GGUF file's header: what it says is read; whatever is wrong is named, in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter

import gguf
import numpy as np
import pytest
from gguf_tokens import write_keys
from gguf_writer import write
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import TINY, open_small

from ebbtide.offload.errors import BadCheckpoint, DoesNotFit, EbbtideError, ModelError
from ebbtide.offload.gguf import file as gguf_file
from ebbtide.offload.gguf.file import Strings, is_gguf, read_header

IDS = [1, 2, 3]


def refusal(path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read_header(path)
    return str(caught.value)


# ---- what is read -------------------------------------------------------------------------------


TEXTS = st.text(max_size=20).filter(lambda text: text.isprintable())
VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    TEXTS.filter(bool),  # the package leaves empty ones out
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9),
    st.lists(TEXTS, min_size=1, max_size=9),
)


def plain(value):
    if isinstance(value, Strings):
        return list(value)
    if isinstance(value, float):
        return float(np.float32(value))
    return value.tolist() if isinstance(value, np.ndarray) else value


@given(st.dictionaries(TEXTS.filter(bool), VALUES, max_size=8))
@settings(deadline=None, max_examples=50)
def test_what_was_written_is_read(tmp_path_factory, said):
    path = tmp_path_factory.mktemp("keys") / "m.gguf"
    found = write_keys(path, said).metadata
    assert {key: plain(found[key]) for key in said} == said


def test_tensors_lie_where_the_package_finds_them(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q8_0")
    header = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert header.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert ours.kind == tensor.tensor_type.name
        assert ours.offset == tensor.data_offset and ours.num_bytes == tensor.n_bytes
        assert ours.shape == tuple(map(int, tensor.shape[::-1]))
        assert ours.block, ours.block_bytes == gguf.GGML_QUANT_SIZES[tensor.tensor_type]


def test_known_types_are_as_long_as_the_package_says():
    from ebbtide.offload.gguf.file import _TYPES

    for number, (name, *sizes) in _TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == tuple(sizes)


def test_numbers_are_what_was_written_before_float32(tmp_path):
    found = write_keys(tmp_path / "m.gguf", {"a": 1e-6, "b": 0.1, "c": 500000.0}).metadata
    assert (found["a"], found["b"], found["c"]) == (1e-6, 0.1, 500000.0)


# ---- what is damaged ----------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(
    version=3, tensors=b"", keys=b"", num_tensors=0, num_keys=0, magic=b"GGUF", data=b""
) -> bytes:
    start = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors
    return start + bytes(-len(start) % 32) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name=b"a", dims=(4,), kind=0, offset=0) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", d) for d in dims)
        + struct.pack("<IQ", kind, offset)
    )


def array(of: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", of, count) + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no GGUF file"),
        (b"GGUF", "is no GGUF file"),
        (header(magic=b"GGML"), "is no GGUF file"),
        (header(version=1), "of version 1; Ebbtide reads versions 2 and 3"),
        (header(version=3 << 24), "a GGUF file big-endian"),
        (header(num_keys=1 << 60), "states 1152921504606846976 keys in 32 bytes"),
        (header(num_tensors=1 << 63), "tensors in 32 bytes"),
        (header(num_keys=1, keys=key(b"a", 8, struct.pack("<Q", 1 << 62))), "at most"),
        (header(num_keys=1, keys=key(b"a", 8, struct.pack("<Q", 100)) + bytes(20)), "ends within"),
        (header(num_keys=1, keys=struct.pack("<Q", 70000) + bytes(70000)), "string of 70000"),
        (header(num_keys=1, keys=key(b"\xff", 0, b"1") + bytes(9)), "a string that is not text"),
        (header(num_keys=1, keys=key(b"a", 13, b"") + bytes(9)), "an unknown type, 13"),
        (header(num_keys=2, keys=2 * key(b"a", 0, b"1") + bytes(9)), "says 'a' twice"),
        (header(num_keys=1, keys=key(b"a", 9, array(5, 1 << 61))), "numbers in 64 bytes"),
        (header(num_keys=1, keys=key(b"a", 9, array(8, 1 << 40))), "strings in 64 bytes"),
        (header(num_keys=1, keys=key(b"a", 9, array(9, 1, array(9, 1)))), "of values of type 9"),
        (
            header(num_keys=1, keys=key(b"a", 9, array(8, 2, string(b"x") + bytes([255] * 8)))),
            "ends within its header",
        ),
        (
            header(num_keys=1, keys=key(b"general.alignment", 4, bytes(4)) + bytes(9)),
            "an alignment of 0",
        ),
        (
            header(num_keys=1, keys=key(b"general.alignment", 8, string(b"32")) + bytes(9)),
            "an alignment of '32'",
        ),
        (header(num_tensors=1, tensors=tensor(dims=(1,) * 5)), "5 dimensions"),
        (header(num_tensors=1, tensors=tensor(dims=(4,))), "'a' does not lie within the file"),
        (
            header(num_tensors=1, tensors=tensor(dims=(1 << 62,) * 4), data=bytes(64)),
            "does not lie within",
        ),
        (
            header(num_tensors=1, tensors=tensor(offset=(1 << 64) - 1), data=bytes(64)),
            "does not lie within",
        ),
        (
            header(num_tensors=1, tensors=tensor(dims=(33,), kind=8), data=bytes(64)),
            "rows of 33 numbers in Q8_0",
        ),
        (header(num_tensors=2, tensors=2 * tensor(), data=bytes(64)), "names a tensor twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, says):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    message = refusal(path)
    assert says in message and str(path) in message


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("KEYS", header(num_keys=21, keys=b"".join(key(b"%d" % i, 0, b"1") for i in range(21)))),
        ("STRINGS", header(num_keys=1, keys=key(b"a", 9, array(8, 21, 21 * string(b""))))),
        (
            "TENSORS",
            header(
                num_tensors=21,
                tensors=b"".join(tensor(b"%d" % i) for i in range(21)),
                data=bytes(16),
            ),
        ),
    ],
)
def test_what_a_file_says_is_counted(tmp_path, monkeypatch, what, content):
    """Each takes time: a million keys would take seconds."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert read_header(path).path == path
    monkeypatch.setattr(gguf_file, f"_MOST_{what}", 20)
    assert f"has 21 {what.lower()} where at most 20 can be" in refusal(path)


def test_a_million_keys_are_not_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 10**6) + bytes(13 * 10**6))
    assert "has 1000000 keys" in refusal(path)


def test_types_that_are_not_known_are_nobodys(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(num_tensors=1, tensors=tensor(kind=99), data=bytes(16)))
    assert read_header(path).tensors["a"].kind == "99"


def test_what_cannot_be_opened(tmp_path):
    assert "cannot be opened" in refusal(tmp_path / "gone.gguf")
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "gone")


@pytest.fixture(scope="module")
def small(checkpoint, tmp_path_factory):
    return write(checkpoint("mixtral"), tmp_path_factory.mktemp("small") / "m.gguf", "Q4_0")


def opened(path, tmp_path) -> str:
    """What opening a file and asking for logits ends with."""
    try:
        with open_small(path, tmp_path, "8", weight_bits="auto", **TINY) as llm:
            llm.tokenizer  # noqa: B018 - made when it is asked for
            llm.logits(IDS)
    except (ModelError, DoesNotFit) as error:
        assert str(error)
        return type(error).__name__
    return "opened"


def test_a_file_cut_short_anywhere_is_refused(small, tmp_path):
    content = small.read_bytes()
    parsed = read_header(small)
    data_at = min(t.offset for t in parsed.tensors.values())
    places = [*range(0, 200, 7), *range(200, data_at, 499), data_at - 1, data_at, data_at + 1]
    places += [t.offset for t in parsed.tensors.values()]
    places += [t.offset + t.num_bytes - 1 for t in parsed.tensors.values()]
    path = tmp_path / "cut.gguf"
    for place in places:
        path.write_bytes(content[:place])
        refusal(path)


def test_a_file_that_shrinks_while_it_is_used(small, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(small.read_bytes())
    with open_small(path, tmp_path, "8", **TINY) as llm:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(BadCheckpoint, match="changed while it was open"):
            llm.logits(IDS)


def damage(content: bytes, end: int, chance: random.Random) -> bytes:
    """One to three edits of the header, mostly; of lengths, counts and types as well."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(end if chance.random() < 0.9 else len(content))
        kind = chance.choice([0, 0, 0, 0, 1, 2, 3])
        if kind == 0:
            damaged[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            odd = chance.choice([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 64) - 1])
            damaged[at : at + 8] = struct.pack("<Q", odd)
        elif kind == 2:
            del damaged[at : at + chance.randrange(1, 40)]
        else:
            damaged[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
    return bytes(damaged)


def test_a_damaged_file_is_refused_by_name_or_answers(small, tmp_path):
    content = small.read_bytes()
    end = min(t.offset for t in read_header(small).tensors.values())
    chance, ends = random.Random(0), Counter()
    path = tmp_path / "damaged.gguf"
    tracemalloc.start()
    for _ in range(150):
        path.write_bytes(damage(content, end, chance))
        ends[opened(path, tmp_path)] += 1
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 << 20
    # Were all refused, or none, the edits would show nothing.
    assert ends["BadCheckpoint"] > 30 and ends["opened"] > 15, ends


# ---- several files ------------------------------------------------------------------------------


def split(path, folder, count=3, **changes):
    """A model's file as several, as llama.cpp splits it: the first has no tensors."""
    reader = gguf.GGUFReader(path)
    parts = [reader.tensors[i :: count - 1] for i in range(count - 1)]
    folder.mkdir()
    paths = []
    for number, tensors in enumerate([[], *parts]):
        writer = gguf.GGUFWriter(None, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kinds = field.types
                    sub = kinds[-1] if len(kinds) > 1 else None
                    writer.add_key_value(field.name, field.contents(), kinds[0], sub)
        writer.add_uint16("split.no", changes.get("no", number))
        writer.add_uint16("split.count", changes.get("count", count))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        paths.append(folder / f"m-{number + 1:05}-of-{count:05}.gguf")
        writer.write_header_to_file(paths[-1])
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_model_in_several_files_opens_by_any_of_them(small, tmp_path):
    paths = split(small, tmp_path / "split")
    with open_small(small, tmp_path, "8", **TINY) as llm:
        expected = llm.logits(IDS)
        fingerprint = llm.fingerprint
    for path in paths:
        with open_small(path, tmp_path, "8", **TINY) as llm:
            assert (llm.logits(IDS) == expected).all()
            assert llm.fingerprint != fingerprint


def test_files_that_are_missing_or_others_are_named(small, tmp_path):
    paths = split(small, tmp_path / "split")
    paths[1].rename(paths[1].with_name("other"))
    assert "lacks 1 of 3 files of the model: m-00002-of-00003.gguf" in refusal(paths[2])
    paths[2].with_name("other").rename(paths[1])
    renamed = paths[0].rename(paths[0].with_name("renamed.gguf"))
    assert "their names must end in -00001-of-00003.gguf" in refusal(renamed)
    renamed.rename(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    assert "m-00002-of-00003.gguf is not file 2 of 3 by its own word" in refusal(paths[0])
    paths = split(small, tmp_path / "wrong", no=0)
    assert "is not file 2 of 3" in refusal(paths[0])


def test_tensors_of_all_files_are_counted(small, tmp_path, monkeypatch):
    paths = split(small, tmp_path / "split")
    count = len(read_header(paths[0]).tensors)
    monkeypatch.setattr(gguf_file, "_MOST_TENSORS", count)
    read_header(paths[0])
    monkeypatch.setattr(gguf_file, "_MOST_TENSORS", count - 1)
    message = refusal(paths[0])
    assert f"{paths[2]}: the files up to this one have {count} tensors" in message


def test_errors_are_ebbtides():
    assert issubclass(BadCheckpoint, EbbtideError)
