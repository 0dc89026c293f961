"""GGUF models of repositories and folders: which of several is meant."""

from __future__ import annotations

import pytest
from hub_fake import FILES, Hub, make_gguf, refusal
from huggingface_hub import errors as hub_errors

from ebbtide.offload.errors import BadCheckpoint
from ebbtide.offload.models.hub import DownloadSize, resolve_model


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return Hub(monkeypatch, tmp_path)


GGUF = {
    "README.md": 9_000,
    "config.json": 10,
    "mmproj-model-f16.gguf": 2**20,
    "Model-Q4_K_M.gguf": 2**30,
    "Model-Q8_0.gguf": 2**31,
    "BF16/Model-BF16-00001-of-00002.gguf": 2**32,
    "BF16/Model-BF16-00002-of-00002.gguf": 2**32,
}


@pytest.mark.parametrize("tag", ["Q4_K_M", "q4_k_m"])
def test_a_quantisation_of_a_repository_is_fetched_alone(fake, tag):
    fake.files = dict(GGUF)
    told = []
    path = resolve_model(f"org/name:{tag}", "v1", told.append)
    assert path == fake.snapshot / "Model-Q4_K_M.gguf"
    assert told == [DownloadSize("org/name", 1, 2**30, 2**30)]
    (call,) = fake.calls
    assert (call["model"], call["revision"]) == ("org/name", "v1")
    assert call["allow_patterns"] == ["Model-Q4_K_M.gguf"]


def test_all_files_of_a_model_are_fetched(fake):
    fake.files = dict(GGUF)
    path = resolve_model("org/name:BF16")
    assert path == fake.snapshot / "BF16/Model-BF16-00001-of-00002.gguf"
    assert len(fake.calls[0]["allow_patterns"]) == 2


def test_the_choice_is_listed(fake):
    fake.files = dict(GGUF)
    said = "org/name has 3 models; name one, as in org/name:BF16. It has BF16, Q4_K_M, Q8_0"
    assert refusal("org/name") == said
    assert "has no model 'Q5_0'; it has BF16, Q4_K_M, Q8_0" in refusal("org/name:Q5_0")
    for part in ("Q", "Q4", "K_M", "F16"):
        assert f"has no model {part!r}; it has BF16, Q4_K_M, Q8_0" in refusal(f"org/name:{part}")
    assert "has several models 'Model'" in refusal("org/name:Model")
    fake.files = {**GGUF, "model.safetensors": 5}
    assert "has no tokenizer.json" in refusal("org/name", kind=BadCheckpoint)
    fake.files = dict(FILES)
    assert "has no GGUF files, so that 'Q4_0' names none" in refusal("org/name:Q4_0")
    assert fake.calls == []


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("f16", "m-F16.gguf"),
        ("BF16", "m-BF16.gguf"),
        ("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        ("IQ4_XS", "m.iq4_xs.gguf"),
        ("other", "other/m-Q5_0-v2.gguf"),
        ("m-F16", "m-F16.gguf"),
        ("m-f16.gguf", "m-F16.gguf"),
        ("v2", "other/m-Q5_0-v2.gguf"),
    ],
)
def test_a_tag_is_a_whole_part_of_a_name(fake, tag, file):
    names = ("m-F16", "m-BF16", "m-UD-Q4_K_XL", "m.iq4_xs", "other/m-Q5_0-v2")
    fake.files = {f"{name}.gguf": 1 for name in names}
    assert resolve_model(f"org/name:{tag}") == fake.snapshot / file
    del fake.files["m-F16.gguf"]
    assert "has no model 'F16'; it has BF16" in refusal("org/name:F16")


COMPANIONS = (
    *("mmproj-m.gguf", "m.mmproj-f16.gguf", "m-mmproj-Q8_0.gguf", "mmproj.gguf", "M-MMPROJ.gguf"),
    *("imatrix.gguf", "m-imatrix.gguf", "m.imatrix.gguf", "imatrix_unsloth.gguf"),
)


@pytest.mark.parametrize("companion", COMPANIONS)
def test_the_only_gguf_model_needs_no_name(tmp_path, fake, companion):
    fake.files = {"m.gguf": 1, companion: 1}
    assert resolve_model("org/name") == fake.snapshot / "m.gguf"
    make_gguf(tmp_path / "m" / companion)
    assert "no GGUF file" in refusal(tmp_path / "m", kind=BadCheckpoint)
    made = make_gguf(tmp_path / "m" / "m.gguf")
    assert resolve_model(tmp_path / "m") == made


def test_a_gguf_file_in_the_cache_serves_offline(fake):
    fake.info_error = hub_errors.OfflineModeIsEnabled("offline")
    make_gguf(fake.snapshot / "Model-Q8_0.gguf")
    assert resolve_model("org/name:Q8_0") == fake.snapshot / "Model-Q8_0.gguf"
    assert resolve_model("org/name") == fake.snapshot / "Model-Q8_0.gguf"
    assert "has no model 'Q4_0'; it has Q8_0" in refusal("org/name:Q4_0")
    kind = getattr(hub_errors, "IncompleteSnapshotError", None)
    if kind is not None:  # what was not asked for is not there
        fake.download_error = kind("some files are missing", str(fake.snapshot))
        assert resolve_model("org/name:Q8_0") == fake.snapshot / "Model-Q8_0.gguf"
