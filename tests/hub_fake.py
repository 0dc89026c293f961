"""The hub as the tests need it: played by its own exception classes; nothing is reached."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from ebbtide.offload.errors import ModelError
from ebbtide.offload.models.hub import resolve_model

FILES = {
    "config.json": 700,
    "tokenizer.json": 5_000,
    "chat_template.jinja": 300,
    "model-00001-of-00002.safetensors": 4 * 2**30,
    "model-00002-of-00002.safetensors": 2**30,
    "README.md": 9_000,
    "consolidated.safetensors": 5 * 2**30,
    "original/params.json": 100,
    "original/consolidated.00.pth": 5 * 2**30,
    "onnx/model.safetensors": 5 * 2**30,
    "modeling_evil.py": 66,
}
WANTED = [
    name for name in FILES if "/" not in name and not name.startswith(("cons", "R", "modeli"))
]
WANTED_BYTES = sum(FILES[name] for name in WANTED)


def http_library():
    """httpx under whichever name this huggingface_hub uses it, or requests."""
    return sys.modules[hub_errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]


def http_error(kind, status):
    """One of huggingface_hub's exceptions, with a response as the hub would have sent it."""
    library = http_library()
    request = library.Request("GET", "https://huggingface.co/api/models/org/name")
    response = library.Response(status, request=request)
    return kind(f"{status} error.\n\nmore lines", response=response)


def network_error():
    return http_library().ConnectError("[Errno -2] Name or service not known")


class Hub:
    """Stands in for HfApi and snapshot_download; `info` or `download` may be an exception."""

    def __init__(self, monkeypatch, tmp_path):
        self.files = dict(FILES)
        self.cached: set[str] = set()
        self.info_error: Exception | None = None
        self.download_error: Exception | None = None
        self.snapshot = tmp_path / "snapshot"
        self.calls: list[dict] = []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.try_to_load)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no" / "c"))

    def model_info(self, model, *, revision, files_metadata, timeout):
        assert files_metadata
        if self.info_error is not None:
            raise self.info_error
        siblings = [SimpleNamespace(rfilename=n, size=s) for n, s in self.files.items()]
        return SimpleNamespace(sha="0" * 40, siblings=siblings)

    def try_to_load(self, model, name, *, revision):
        assert revision == "0" * 40
        return f"/cache/{name}" if name in self.cached else None

    def snapshot_download(self, model, **options):
        self.calls.append({"model": model, **options})
        if self.download_error is not None:
            raise self.download_error
        self.snapshot.mkdir(exist_ok=True)
        return str(self.snapshot)


def refusal(*args, kind=ModelError, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        resolve_model(*args, **kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def make_gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + bytes(20))
    return path
