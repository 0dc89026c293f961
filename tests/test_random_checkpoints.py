"""The helper's own promises: both layouts mean the same model, and errors would show."""

from __future__ import annotations

import json

import pytest
import torch
from model_matrix import VARIANTS
from random_checkpoints import FAMILIES, reference_logits

IDS = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_and_shards_mean_the_same_model(checkpoint, name):
    hub = checkpoint(name)
    new = checkpoint(name, layout="transformers5", sharded=True)
    is_new = VARIANTS[name].hub.get("rope_parameters", ...) is not ...  # of transformers 5
    assert is_new == ("rope_parameters" in json.loads((hub / "config.json").read_text()))
    assert len(list(new.glob("*.safetensors"))) > 2
    assert (new / "model.safetensors.index.json").exists()
    assert torch.equal(reference_logits(hub, IDS), reference_logits(new, IDS))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_not_flat(checkpoint, name):
    logits = reference_logits(checkpoint(name), IDS)
    assert logits.shape == (len(IDS), 264) and logits.dtype == torch.float32
    # Flat logits would let any tolerance pass; exploding ones would make every tolerance luck.
    assert 1.0 < logits.std() < 5.0
    # The same tokens in another order before the last one: where they stand must matter.
    shuffled = reference_logits(checkpoint(name), [*reversed(IDS[:-1]), IDS[-1]])
    assert (shuffled[-1] - logits[-1]).abs().max() > 1.0


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("mistral", "sliding_window", None),
        ("qwen2-window", "use_sliding_window", False),
        ("llama3", "rope_scaling", None),
        ("llama-linear", "rope_scaling", None),
        ("qwen2-yarn", "rope_scaling", None),
    ],
)
def test_windows_and_scalings_show_within_a_short_text(checkpoint, tmp_path, name, field, value):
    folder = checkpoint(name)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    assert config[field] != value
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    difference = reference_logits(folder, IDS) - reference_logits(tmp_path, IDS)
    assert difference.abs().max() > 0.5
