"""gpt-oss: experts as its files have them, in MXFP4, against the same numbers in float32; and what
its configuration may say. The matrix compares the rest with transformers.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llm import TINY, hold, hold_few_experts, open_small

from ebbtide import errors
from ebbtide.kernels import matmul
from ebbtide.offload.planning.memory_at_hand import MemoryAtHand
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights import rereading
from ebbtide.offload.weights.packing import Mxfp4

IDS = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(5)).tolist()
# The format's definition: OCP Microscaling Formats 1.0, section 5.3.3.
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """The same model with its experts in float32, inputs by outputs, and in MXFP4."""
    source = checkpoint("gpt-oss")
    generator = torch.Generator().manual_seed(6)
    tensors = load_file(source / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        codes = torch.randint(0, 16, (experts, outputs, inputs), generator=generator)
        exponents = torch.randint(
            121, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8
        )
        scales = 2.0 ** (exponents.float() - 127)
        values = VALUES[codes].unflatten(-1, (-1, 32)) * scales.unsqueeze(-1)
        tensors[name] = values.flatten(-2).transpose(1, 2).contiguous()
        pairs = codes.to(torch.uint8).unflatten(-1, (-1, 16, 2))  # low half, high half
        packed[name + "_blocks"] = pairs[..., 0] | pairs[..., 1] << 4
        packed[name + "_scales"] = exponents
        del packed[name]
    made = []
    for kind, held in (("plain", tensors), ("packed", packed)):
        folder = tmp_path_factory.mktemp(kind)
        for file in source.iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        save_file(held, folder / "model.safetensors")
        made.append(folder)
    change(made[1], quantization_config={"quant_method": "mxfp4"})
    return made


def change(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_packed_experts_are_what_their_codes_say(folders, tmp_path, monkeypatch):
    """But for the rounding of activations, which is taken out here."""
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    monkeypatch.setattr(matmul, "rounded_rows", lambda x: x)
    logits = []
    for folder in folders:
        with open_small(folder, tmp_path, "full", **TINY) as llm:
            logits.append(llm.logits(IDS, prefill_tokens=100))
    # float32 rounding of sums in another order.
    assert (logits[0] - logits[1]).abs().max() <= 2e-4 * max(1.0, logits[0].abs().max().item())


def test_packed_experts_are_the_same_past_the_system_s_cache(folders, tmp_path, monkeypatch):
    """Through it, and past it from the first byte on."""
    monkeypatch.setattr(rereading, "_FEWEST_BYTES", 1)
    logits = []
    for available in (1 << 40, 0):
        found = MemoryAtHand(1 << 40, available)
        monkeypatch.setattr(rereading, "memory_at_hand", lambda found=found: found)
        with open_small(folders[1], tmp_path, **TINY) as llm:
            hold_few_experts(llm)
            logits.append(llm.logits(IDS))
    assert torch.equal(*logits)


@pytest.mark.parametrize("bits", ["full", "8"])
def test_packed_experts_are_kept_and_read_as_they_are(folders, tmp_path, bits):
    plain, packed = folders
    with open_small(plain, tmp_path, "8", **TINY) as llm:
        plain_logits = llm.logits(IDS, prefill_tokens=100).log_softmax(-1)
    with open_small(packed, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        resident = llm.logits(IDS, prefill_tokens=100)
        kept = llm.admission.weights._resident[0]["mlp.experts.0.down_proj.weight"]
        assert kept.bits == 4 and kept.is_float
        name = "model.layers.0.mlp.experts.0.down_proj.weight"
        assert llm.admission.facts.packings[name] == Mxfp4()
        assert llm.plan.disk["weights"] == 0
    other = resident.log_softmax(-1)
    kl = (plain_logits.exp() * (plain_logits - other)).sum(-1)
    # Activations of 8 bits, in some random rows another expert: no rounding of four bits.
    assert kl.median() < (2e-3 if bits == "full" else 1e-2)
    with open_small(packed, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        hold_few_experts(llm)
        assert torch.equal(llm.logits(IDS, prefill_tokens=100), resident)
        store = llm.admission.weights
        assert store._experts.misses > 0 and store._scratch is None  # from the files themselves
    with open_small(packed, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        hold(llm, Loaded(0, False, llm.admission.facts.fewest_expert_slots))
        assert torch.equal(llm.logits(IDS, prefill_tokens=100), resident)
        # The head is in a scratch file where it was quantised, and experts are not.
        assert (llm.admission.weights._scratch is not None) == (bits == "8")


def test_packed_layers_that_are_streamed_change_no_bit(folders, tmp_path):
    with open_small(folders[1], tmp_path, "8", **TINY) as llm:
        resident = llm.logits(IDS)
    with open_small(folders[1], tmp_path, "8", **TINY) as llm:
        hold(llm, Loaded(3, True))
        assert torch.equal(llm.logits(IDS), resident)
        assert llm.admission.weights.bytes_streamed > 0


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("_scales", lambda t: None, "lacks 6 of .*gate_up_proj.weight"),
        ("_scales", lambda t: t[..., :1].contiguous(), "lacks 6 of .*gate_up_proj.weight"),
        ("_scales", lambda t: t.float(), "lacks 6 of"),
        ("_blocks", lambda t: t[..., :8].contiguous(), "lacks 6 of"),
        ("_blocks", lambda t: t[:, :64].contiguous(), "lacks 6 of"),
        ("_scales", lambda t: t.fill_(255), "scales of MXFP4 weights are not numbers"),
    ],
)
def test_damaged_experts_are_named(folders, tmp_path, name, make, says):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in folders[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.experts.gate_up_proj{name}"
    changed = make(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(errors.BadCheckpoint, match=says):
        with open_small(folder, tmp_path) as llm:
            llm.logits(IDS[:3])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit is not 7.0"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantised .fp8"),
        ({"quantization_config": "mxfp4x"}, "already quantised .mxfp4x"),
        ({"num_experts_per_tok": 9}, "9 of 6 experts cannot be chosen"),
    ],
)
def test_what_it_cannot_run_it_says(folders, tmp_path, fields, says):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in folders[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder, **fields)
    with pytest.raises(errors.ModelError, match=says):
        open_small(folder, tmp_path)
