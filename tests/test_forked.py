"""Processes that are forked from one with an open model, as multiprocessing does on Linux.

Each test runs in a process of its own: torch's threads, once begun, are there for good.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked here")

BEGIN = """
import asyncio, os, sys, torch
from ebbtide import LLM, Budget, errors
llm = LLM.open(threads=2, spill_dir=sys.argv[1])
torch.ones(1 << 22).cos().sum()  # torch's threads are there
expected = llm.generate("Once upon a time", max_new_tokens=4, temperature=0)
asked = dict(max_new_tokens=4, temperature=0)
"""
END = """
if os.fork() == 0:
    try:
        in_child()
    except BaseException as error:
        print(repr(error))
        os._exit(1)
    os._exit(0)
_, status = os.wait()
assert status == 0
"""


def run(child: str, folder, end: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}{child}{END}{end}", str(folder)],
        timeout=50,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_child_answers_with_the_parents_weights_and_with_a_model_of_its_own(tmp_path):
    """It waited for ever for threads that it had not got."""
    run(
        """
def in_child():
    torch.ones(1 << 22).cos().sum()
    assert llm.generate("Once upon a time", **asked).token_ids == expected.token_ids
    output = asyncio.run(llm.agenerate("Once upon a time", **asked))
    assert output.token_ids == expected.token_ids
    with LLM.open(threads=2, spill_dir=sys.argv[1]) as own:
        assert torch.get_num_threads() == 1 and any("forked" in said for said in own.warnings)
        assert own.generate("Once upon a time", **asked).token_ids == expected.token_ids
""",
        tmp_path,
        "assert 'forked' not in str(llm.warnings) and torch.get_num_threads() == 2",
    )


def test_a_session_stays_its_own_processs(tmp_path):
    run(
        """
session = llm.session("kept")
session.append("Once upon a time")
stream = session.stream(", there was", **asked)
first = next(stream)

def in_child():
    for use in (lambda: next(stream), session.generate, lambda: session.append("x"), session.save):
        try:
            use()
        except errors.InputError as error:
            assert "another process" in str(error), error
        else:
            raise AssertionError("it was used")
    session.close()
    assert not session.is_open
    llm.close()
""",
        tmp_path,
        """
assert len(list(stream)) == 3
session.append("x")
session.close()
llm.close()
""",
    )
