"""Sizes as people write them, and what `auto` leaves to the rest of the machine."""

from __future__ import annotations

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload.errors import InputError
from ebbtide.offload.planning.budget import Budget, format_size, parse_size, resolve


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512MiB", 512 << 20),
        ("6GiB", 6 << 30),
        ("2GB", 2 * 10**9),
        (" 1.5 gib ", 3 << 29),
        ("1TiB", 1 << 40),
        ("100B", 100),
        ("0", 0),
        ("00", 0),
        ("0.0", 0),
        ("0GiB", 0),
        ("auto", "auto"),
        (" AUTO ", "auto"),
    ],
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8", "did you mean 8GiB"),
        ("367001600", "did you mean 367001600B, which is 350.0 MiB"),
        ("8G", "did you mean 8GiB"),
        ("8QiB", "unknown unit 'QiB'; allowed are sizes"),
        ("-1GiB", "is not a size"),
        ("", "is not a size"),
        ("GiB", "is not a size"),
        ("1e3MiB", "is not a size"),
        ("nan", "is not a size"),
        ("0QiB", "unknown unit"),
        ("9" * 400 + "GiB", "more than any machine"),
        ("9999999TiB", "more than any machine"),
    ],
)
def test_what_is_no_size_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        parse_size(text)
    with pytest.raises(InputError, match="host_memory: "):
        Budget(host_memory=text)


def test_host_memory_has_no_off():
    for name, may_be_off in (("host", False), ("device", True), ("disk", True)):
        with pytest.raises(InputError) as caught:
            Budget(**{f"{name}_memory": "8"})
        assert ("0 to switch the tier off" in str(caught.value)) == may_be_off


@given(st.integers(1, 10**6), st.sampled_from(["KiB", "MiB", "kB", "MB", "GB"]))
def test_a_size_is_its_number_of_units(number, unit):
    assert parse_size(f"{number}{unit}") == number * parse_size(f"1{unit}")


@pytest.mark.parametrize("value", [-1, True, 1.5, None, [1]])
@pytest.mark.parametrize("name", ["device_memory", "host_memory", "disk_memory"])
def test_a_budget_names_what_is_no_size(name, value):
    with pytest.raises(InputError, match=f"{name} is .*allowed are sizes such as"):
        Budget(**{name: value})


def test_a_budget_holds_bytes():
    budget = Budget(device_memory=0, host_memory="1GiB", disk_memory=7)
    assert (budget.device_memory, budget.host_memory, budget.disk_memory) == (0, 1 << 30, 7)
    assert Budget() == Budget("auto", "auto", "auto")


def test_given_sizes_are_the_limits(tmp_path):
    limits = resolve(Budget("3GiB", "2GiB", "1GiB"), tmp_path, 8 << 30)
    assert (limits.device_bytes, limits.host_bytes, limits.disk_bytes) == (
        3 << 30,
        2 << 30,
        1 << 30,
    )
    assert 0 < limits.runtime_bytes <= psutil.virtual_memory().total


def test_what_the_caller_takes_is_no_model_s():
    limits = resolve(Budget(host_memory="3GiB", caller_bytes=2 << 30), None, None)
    assert limits.host_bytes == 3 << 30 and limits.runtime_bytes > 2 << 30
    for wrong in (-1, "1MiB", True, None):
        with pytest.raises(InputError, match="caller_bytes"):
            Budget(caller_bytes=wrong)


def test_a_tier_that_is_not_there_has_nothing():
    limits = resolve(Budget("3GiB", "2GiB", "1GiB"), None, None)
    assert limits.device_bytes is None and limits.disk_bytes == 0


def test_auto_stays_within_the_machine(tmp_path):
    before = psutil.virtual_memory()
    limits = resolve(Budget(), tmp_path, 8 << 30)
    assert limits.device_bytes == (8 << 30) - (8 << 30) // 10
    # The process's own share is in the budget, and 1.5 GiB or 15 % stay free; a GiB may come and
    # go while the test runs.
    most = before.available + limits.runtime_bytes - int(before.total * 0.15)
    assert 0 <= limits.host_bytes <= max(limits.runtime_bytes, most) + (1 << 30)
    disk = psutil.disk_usage(str(tmp_path))
    assert 0 <= limits.disk_bytes <= disk.total // 10


def test_auto_takes_nothing_of_what_is_too_small(tmp_path):
    assert resolve(Budget(), tmp_path, 100 << 20).device_bytes == 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 42, "4.0 TiB")],
)
def test_sizes_as_people_read_them(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize("value", [None, 5, b"1GiB"])
def test_sizes_are_read_from_texts(value):
    with pytest.raises(ValueError, match="is not a size; allowed are"):
        parse_size(value)
