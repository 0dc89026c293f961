"""Which folder a model's name leads to, and what is said where none does.

The hub is played by its own exception classes; no test reaches it.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_fake import (
    FILES,
    WANTED,
    WANTED_BYTES,
    Hub,
    http_error,
    make_gguf,
    make_model,
    network_error,
    refusal,
)
from huggingface_hub import errors as hub_errors

from ebbtide.offload.errors import (
    BadCheckpoint,
    DoesNotFit,
    EbbtideError,
    InputError,
    StorageError,
)
from ebbtide.offload.models import hub
from ebbtide.offload.models.hub import DownloadSize, builtin_folder, resolve_model


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return Hub(monkeypatch, tmp_path)


# Folders


def test_a_folder_wins(tmp_path, monkeypatch, fake):
    folder = make_model(tmp_path / "org" / "name")
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_model("~/org/name") == folder
    assert fake.calls == []


def test_a_folder_without_config_is_no_model(tmp_path, monkeypatch, fake):
    assert f"{tmp_path} has no config.json" in refusal(tmp_path, kind=BadCheckpoint)
    # One that happens to have the name of an id does not hide it.
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == fake.snapshot


def test_a_file_that_is_no_gguf_is_no_model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK")
    assert f"{path} is a file, and no GGUF model" in refusal(path)


def test_a_gguf_file_is_a_model_by_its_first_bytes(tmp_path, fake):
    for name in ("model.gguf", "sha256-0123", "model-00002-of-00003.gguf"):
        path = make_gguf(tmp_path / name)
        assert resolve_model(path) == resolve_model(str(path)) == path
        assert "has no revisions" in refusal(path, "v1", kind=InputError)
    assert fake.calls == []


def test_the_one_gguf_model_of_a_folder_is_found(tmp_path):
    first = make_gguf(tmp_path / "m" / "model-00001-of-00002.gguf")
    make_gguf(tmp_path / "m" / "model-00002-of-00002.gguf")
    make_gguf(tmp_path / "m" / "mmproj-model-f16.gguf")
    (tmp_path / "m" / "no.gguf").write_bytes(b"GG")
    assert resolve_model(tmp_path / "m") == first
    make_gguf(tmp_path / "m" / "other.gguf")
    message = refusal(tmp_path / "m")
    assert "holds 2 GGUF models; name one: model-00001-of-00002.gguf, other.gguf" in message
    make_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").touch()
    assert resolve_model(tmp_path / "m") == tmp_path / "m"


def test_a_gguf_model_beside_a_config_is_taken_where_there_are_no_safetensors(tmp_path):
    """As repositories of GGUF files have them."""
    folder = make_model(tmp_path / "m")
    make_gguf(folder / "mmproj-model-f16.gguf")
    assert resolve_model(folder) == folder
    path = make_gguf(folder / "model-Q4_0.gguf")
    assert resolve_model(folder) == path
    assert f"the folder {folder} has no revisions" in refusal(folder, "v1", kind=InputError)
    make_gguf(folder / "model-Q8_0.gguf")
    assert "holds 2 GGUF models; name one" in refusal(folder)
    (folder / "model-00001-of-00002.safetensors").touch()
    assert resolve_model(folder) == folder


@pytest.mark.parametrize(
    "name",
    ["./model", "../model", "/nowhere/model", "~/nowhere", "a/b/c", "models/m.gguf", "M.GGUF"],
)
def test_what_looks_local_and_is_not_there_says_so(name, fake):
    assert refusal(name) == f"there is no folder or file {Path(name).expanduser()}"
    assert refusal(Path("model")) == "there is no folder or file model"
    assert fake.calls == []


@pytest.mark.parametrize("name", ["gpt2", "org name/x", "a..b/c", "org/na--me", "org/", "-x/y"])
def test_what_is_neither_folder_nor_id(name, fake):
    assert "neither a folder nor a GGUF file here, nor a Hugging Face id" in refusal(name)
    assert fake.calls == []


@pytest.mark.parametrize("name", ["", "a\0b", b"bytes"])
def test_what_is_no_name(name):
    assert "is not the name of a model" in refusal(name, kind=InputError)


def test_a_folder_has_no_revisions(tmp_path):
    message = refusal(make_model(tmp_path), revision="main", kind=InputError)
    assert "has no revisions" in message
    assert "built-in" in refusal(None, revision="main", kind=InputError)


def test_the_built_in_model(monkeypatch, tmp_path):
    builtin = pytest.importorskip("ebbtide.offload.builtin")
    monkeypatch.setattr(builtin, "model_folder", lambda: make_model(tmp_path / "model"))
    assert resolve_model(None) == builtin_folder() == tmp_path / "model"
    monkeypatch.setattr(builtin, "model_folder", lambda: tmp_path / "gone")
    assert "lacks the built-in model" in refusal(None)


# Downloads


def test_only_what_is_needed_is_fetched_and_its_size_told_first(fake):
    told = []

    def on_size(size):
        assert fake.calls == []
        told.append(size)

    assert resolve_model("org/name", on_size=on_size) == fake.snapshot
    assert told == [DownloadSize("org/name", len(WANTED), WANTED_BYTES, WANTED_BYTES)]
    assert str(told[0]) == "org/name: 5 files, 5.0 GiB"
    (call,) = fake.calls
    fetched = huggingface_hub.utils.filter_repo_objects(
        FILES, allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"]
    )
    assert sorted(fetched) == sorted(WANTED)
    assert call["revision"] is None


def test_what_is_in_the_cache_is_not_counted(fake):
    told = []
    fake.cached = set(WANTED) - {"model-00002-of-00002.safetensors"}
    resolve_model("org/name", "v1", told.append)
    assert told == [DownloadSize("org/name", 1, 2**30, WANTED_BYTES)]
    assert str(told[0]) == "org/name: 1 file, 1.0 GiB"
    assert fake.calls[0]["revision"] == "v1"
    fake.cached = set(WANTED)
    resolve_model("org/name", on_size=told.append)
    assert len(told) == 1


def test_a_disk_that_is_too_small_is_seen_before(fake, monkeypatch):
    usage = SimpleNamespace(free=WANTED_BYTES - 1)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DoesNotFit) as caught:
        resolve_model("org/name")
    assert fake.calls == []
    assert caught.value.tier == "disk"
    assert caught.value.needed_bytes == WANTED_BYTES
    assert caught.value.available_bytes == WANTED_BYTES - 1
    assert "HF_HOME" in str(caught.value)
    usage.free += 1
    resolve_model("org/name")


@pytest.mark.parametrize(
    ("left_out", "added", "said"),
    [
        (".safetensors", ["pytorch_model.bin"], ["pickled weights (pytorch_model.bin)", "convert"]),
        (".safetensors", ["model.pt"], ["pickled weights (model.pt)", "never"]),
        (".safetensors", [], ["has no safetensors", "and no GGUF files"]),
        ("config.json", [], ["has no config.json", "nothing was downloaded"]),
        ("tokenizer.json", [], ["has no tokenizer.json", "nothing was downloaded"]),
    ],
)
def test_repositories_without_a_model_for_us(fake, left_out, added, said):
    top = {n: s for n, s in FILES.items() if not n.endswith(left_out) and not n.endswith(".pth")}
    fake.files = {**top, **dict.fromkeys(added, 1)}
    message = refusal("org/name", kind=BadCheckpoint)
    assert all(part in message for part in ["org/name", *said])
    assert fake.calls == []


# GGUF files of the hub

# What the hub says no to


GATED = "org/name is gated: accept its terms at https://huggingface.co/org/name, then log in"
UNKNOWN = "there is no model org/name on Hugging Face"


@pytest.mark.parametrize("at_download", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        (hub_errors.GatedRepoError, 403, GATED),
        (hub_errors.RepositoryNotFoundError, 401, UNKNOWN),
        (hub_errors.RevisionNotFoundError, 404, "org/name has no revision 'v9'"),
        (hub_errors.HfHubHTTPError, 429, "org/name could not be fetched: 429 error"),
    ],
)
def test_answers_of_the_hub(fake, kind, status, said, at_download):
    error = http_error(kind, status)
    if at_download:
        fake.download_error = error
    else:
        fake.info_error = error
    message = refusal("org/name", "v9")
    assert message.startswith(said)
    assert "\n" not in message


def test_gated_unknown_and_offline_are_three_messages(fake):
    messages = set()
    for error in (
        http_error(hub_errors.GatedRepoError, 403),
        http_error(hub_errors.RepositoryNotFoundError, 404),
        hub_errors.OfflineModeIsEnabled("offline"),
    ):
        fake.info_error = error
        fake.download_error = hub_errors.LocalEntryNotFoundError("nothing cached")
        messages.add(refusal("org/name"))
    assert len(messages) == 3


# Without a network


OFFLINE = {
    "switched-off": hub_errors.OfflineModeIsEnabled("offline mode is enabled"),
    "connection": ConnectionError("refused"),
    "timeout": TimeoutError("timed out"),
    "http": network_error(),
    "out-of-order": http_error(hub_errors.HfHubHTTPError, 503),
}


@pytest.fixture(params=OFFLINE)
def offline(request, fake):
    fake.info_error = OFFLINE[request.param]
    return request.param


def test_a_cached_snapshot_serves_offline(fake, offline):
    make_model(fake.snapshot)
    (fake.snapshot / "model.safetensors").write_bytes(b"")
    told = []
    assert resolve_model("org/name", on_size=told.append) == fake.snapshot
    assert fake.calls[0]["local_files_only"] is True
    assert told == []


def test_offline_without_a_snapshot(fake, offline):
    fake.download_error = hub_errors.LocalEntryNotFoundError("nothing cached")
    message = refusal("org/name", "v2")
    assert message.startswith("org/name at revision v2 is not on this machine, and ")
    if offline == "switched-off":
        assert "HF_HUB_OFFLINE is set" in message
    else:
        assert "cannot be reached" in message and "check the connection" in message


def test_offline_with_half_a_snapshot(fake, offline):
    make_model(fake.snapshot)  # no weights
    assert "org/name is only in part on this machine" in refusal("org/name")
    kind = getattr(hub_errors, "IncompleteSnapshotError", None)
    if kind is not None:
        fake.download_error = kind("some files are missing", str(fake.snapshot))
        assert "only in part" in refusal("org/name")


def test_a_download_that_breaks_off(fake):
    fake.download_error = network_error()
    message = refusal("org/name")
    assert "broke off: [Errno -2] Name or service not known. Start again" in message


def test_a_disk_that_fills_up_while_downloading(fake):
    fake.download_error = OSError(errno.ENOSPC, "No space left on device")
    assert "disk is full" in refusal("org/name", kind=StorageError)


def test_anything_else_is_still_one_of_our_errors(fake):
    for error in (RuntimeError("odd"), OSError(errno.EIO, "Input/output error"), ValueError()):
        fake.info_error = error
        with pytest.raises(EbbtideError, match="org/name could not be fetched"):
            resolve_model("org/name")


def test_the_real_library_offline(monkeypatch, tmp_path):
    """Its own code, with an empty cache and the network switched off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("org/name")
    assert message == (
        "org/name is not on this machine, and HF_HUB_OFFLINE is set; unset it to download"
    )
    # A snapshot as huggingface_hub keeps it.
    repo = tmp_path / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = make_model(repo / "snapshots" / ("0" * 40))
    assert "only in part" in refusal("org/name")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert resolve_model("org/name") == snapshot


def test_folders_need_no_hub_library(tmp_path):
    make_model(tmp_path)
    code = (
        "import sys; from ebbtide.offload.models.hub import resolve_model; "
        f"resolve_model({str(tmp_path)!r}); "
        "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
