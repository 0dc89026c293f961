"""Damaged model folders: only errors with names of ours, in bounded memory.

Some hundreds here, or more (fault_counts.py); `python tests/mutations.py` says how they ended.
"""

from __future__ import annotations

import psutil
import pytest
from fault_counts import TIMES
from mutations import make_models, run

COUNT = 250 * TIMES


@pytest.mark.timeout(300 * TIMES)  # a second or two for each hundred, on a quiet machine
def test_a_damaged_model_is_refused_by_name(tmp_path):
    models = make_models(tmp_path / "models")
    run(models, 20, 1, tmp_path)  # what grows once, has grown
    before = psutil.Process().memory_info().rss
    ends = run(models, COUNT, 0, tmp_path)
    grown_bytes = psutil.Process().memory_info().rss - before
    # A mutant may state sizes of any kind; believing one of them would take gigabytes. What is
    # allowed is what an allocator keeps after hundreds of small models.
    assert grown_bytes < 64 << 20
    assert sum(ends.values()) == COUNT
    # Were all refused, or none, the edits would show nothing.
    assert ends["opened"] > COUNT // 20 and ends["BadCheckpoint"] > COUNT // 4
    assert ends["UnsupportedModel"] > 0
