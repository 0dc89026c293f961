"""What a process may not have, memory and open files, is said by name, with the exit code of what
does not fit or cannot be stored: it is no fault of Ebbtide."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbtide.cli import failure
from ebbtide.offload import builtin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux enforces them")

# Sets a limit, this much above what is in use, and runs the command line.
_LIMITED = """
import resource, sys
limit, more, imports, *args = sys.argv[1:]
from ebbtide.cli import app, main
app.build_command()
if imports == "all":
    import pydantic_core, tokenizers, torch
    import ebbtide
    ebbtide.LLM
if limit == "AS":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
else:
    import os
    used = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (used + int(more),) * 2)
sys.exit(main.main(args))
"""
MIB = 2**20


def limited(tmp_path, limit, more, args, *, imports="all"):
    """(exit code, standard output, standard error)"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EBBTIDE_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, limit, str(more), imports, *map(str, args)],
        input="a few words",
        capture_output=True,
        text=True,
        env={**kept, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("imports", "mib"), [("few", 1), ("few", 96), ("all", 1), ("all", 96)])
def test_memory_that_the_process_may_not_have(tmp_path, imports, mib):
    """Before torch is there, when its libraries are mapped, and when weights are loaded."""
    args = ["ask", "who", "-n", "3", "--prefix-cache", "off"]
    code, out, err = limited(tmp_path, "AS", mib * MIB, args, imports=imports)
    assert (code, out) == (3, "")
    assert "no more memory" in err
    assert "fault of Ebbtide" not in err and "Traceback" not in err


def many_files(folder, to, num_files):
    """The same model, its tensors in so many files."""
    tensors = load_file(folder / "model.safetensors")
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (to / path.name).write_bytes(path.read_bytes())
    names, weight_map = sorted(tensors), {}
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in names[number::num_files]}
        save_file(part, to / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


def test_files_that_the_process_may_not_have_open(tmp_path):
    model = many_files(builtin.model_folder(), tmp_path / "model", 12)
    args = ["ask", "who", "-m", model, "-n", "2", "--prefix-cache", "off"]
    assert limited(tmp_path, "NOFILE", 64, args)[0] == 0
    code, out, err = limited(tmp_path, "NOFILE", 8, args)
    assert (code, out) == (4, "")
    assert ".safetensors cannot be opened: Too many open files" in err and "ulimit -n" in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        SystemError("<built-in function compile> returned NULL without setting an exception"),
    ],
)
def test_no_memory_however_it_is_said(error):
    fields, lines, code = failure.describe(error)
    assert (fields["type"], code) == ("MemoryError", 3)
    assert "ulimit -v" in lines[0] and "--host-memory" in lines[0]


def test_no_memory_as_torch_says_it():
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**62, dtype=torch.uint8)
    assert failure.describe(told.value)[2] == 3


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_files_however_they_are_opened(number):
    error = OSError(number, os.strerror(number), "a.safetensors")
    fields, lines, code = failure.describe(error)
    assert (fields["type"], code) == ("StorageError", 4)
    assert "a.safetensors cannot be opened" in lines[0] and "ulimit -n" in lines[0]
