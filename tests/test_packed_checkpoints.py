"""Folders that were quantised by other programs: what their codes say is what is multiplied,
wherever it lies, and the plan counts it before.
"""

from __future__ import annotations

import json

import pytest
import torch
from packed_files import FORMATS, change, write
from random_checkpoints import reference_logits
from safetensors.torch import load_file, save_file
from small_llm import TINY, hold, hold_few_experts, open_small

from ebbtide import errors
from ebbtide.kernels import matmul
from ebbtide.kernels.quantised import QuantisedWeight
from ebbtide.offload.models.fingerprint import model_fingerprint
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.models.safetensors_files import open_folder
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights.packed_weights import Decoded
from ebbtide.offload.weights.skeleton import expected_shapes

IDS = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(5)).tolist()
# By format: bits and whether groups have offsets, as kept with bits full, and with 8.
KEPT = {
    "awq": ((4, True), (4, True)),
    "gptq": ((4, True), (4, True)),
    "gptq, symmetric": ((4, False), (4, False)),
    "gptq, groups in another order": (torch.float16, (8, False)),
    "gptq, 8 bits": ((8, False), (8, False)),
    "gptq, 8 bits with zeros": (torch.float16, (8, False)),
    "compressed-tensors": ((4, False), (4, False)),
    "compressed-tensors, zeros": ((4, True), (4, True)),
    "compressed-tensors, groups in another order": (torch.bfloat16, (8, False)),
    "compressed-tensors, bytes": ((8, False), (8, False)),
    "fp8": (torch.bfloat16, (8, False)),
    "modelopt": (torch.bfloat16, (8, False)),
}


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """packed, plain: a model in a format, and with the numbers that this means."""
    made = {}

    def get(name: str, model: str = "llama3"):
        if (name, model) not in made:
            more = {"moe_intermediate_size": 64} if "moe" in model else {}
            more |= {"intermediate_size": 128} if name == "awq, groups of 64" else {}
            source = checkpoint(model, **more)
            made[name, model] = write(source, name, tmp_path_factory.mktemp("packed"))
        return made[name, model]

    return get


def opened(folder):
    """The tensors of a folder, and where they lie."""
    config = read_model_config(folder)
    stacked = config.renamed, config.stacked, config.quantisation
    return open_folder(folder, expected_shapes(config), *stacked, in_parts=config.joined)


def reference(packed, plain, folder) -> torch.Tensor:
    """transformers' logits for the numbers that are kept where no bits are asked for: what is
    decoded is rounded to 16 bits."""
    tensors, checkpoint = load_file(plain / "model.safetensors"), opened(packed)
    parts = read_model_config(packed).renamed
    for name in list(tensors):
        ours = name
        for theirs, own in parts:
            ours = ours.replace(theirs, own)
        ref = checkpoint.refs.get(ours)  # of parts there is none
        if ref is not None and len(ref.shape) == 2 and isinstance(ref.packing, Decoded):
            tensors[name] = tensors[name].to(ref.packing.dtype).float()
    checkpoint.close()
    folder = copied(plain, folder)
    save_file(tensors, folder / "model.safetensors")
    return reference_logits(folder, IDS)


def tolerance(logits: torch.Tensor) -> float:
    """Two float32 programs that sum in another order differ by rounding alone."""
    return 2e-4 * max(1.0, logits.abs().max().item())


def loss(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row."""
    want, got = want.log_softmax(-1), got.log_softmax(-1)
    return (want.exp() * (want - got)).sum(-1)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_what_codes_say(folders, tmp_path, name, monkeypatch):
    """Against transformers with these numbers in float32. The rounding of activations to 8 bits,
    which products with codes have, is taken out here."""
    packed, plain = folders(name)
    expected = reference(packed, plain, tmp_path)
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    monkeypatch.setattr(matmul, "rounded_rows", lambda x: x)
    with open_small(packed, tmp_path, "full", **TINY) as llm:
        got = llm.logits(IDS, prefill_tokens=90)
    assert (got - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("awq", "phi3"),
        ("gptq", "qwen2"),
        ("gptq, symmetric", "qwen3.5"),
        ("compressed-tensors", "gemma3"),
        ("compressed-tensors, zeros", "mixtral"),
        ("gptq, 8 bits", "phi3"),
        ("fp8", "qwen3-moe"),
        ("awq", "qwen3-moe"),
        ("modelopt", "nemotron-h-moe"),
        ("fp8", "falcon-h1"),
        ("gptq", "starcoder2"),
        ("awq", "cohere2"),
        ("gptq", "phi"),
        ("awq", "laguna-moe-elements"),
        ("fp8", "hy-v3-moe"),
        ("modelopt", "nemotron-h-moe-latent"),
        ("gptq, symmetric", "lfm3-plain"),
        ("compressed-tensors", "phimoe"),
        ("gptq, 8 bits", "stablelm-parallel"),
        ("awq", "olmo-hybrid"),
    ],
)
def test_families_are_read_alike(folders, tmp_path, name, model, monkeypatch):
    """Fused projections, biases, states and experts."""
    packed, plain = folders(name, model)
    expected = reference(packed, plain, tmp_path)
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    monkeypatch.setattr(matmul, "rounded_rows", lambda x: x)
    with open_small(packed, tmp_path, "full", **TINY) as llm:
        got = llm.logits(IDS, prefill_tokens=90)
    assert (got - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize("scales", ["of blocks", "of experts"])
def test_experts_of_float8_in_one_tensor_are_the_same(folders, tmp_path, scales):
    """Scales lie in one tensor too: an expert has some of each of its matrices, or one of all."""
    packed, _ = folders("fp8", "glm4-moe")
    folder = copied(packed, tmp_path)
    tensors = load_file(packed / "model.safetensors")
    if scales == "of experts":
        for name in tensors:
            if ".experts." in name and name.endswith("_scale_inv"):
                expert = int(name.split(".experts.")[1].split(".")[0])
                tensors[name] = torch.tensor(0.001 * (expert + 1))
        save_file(tensors, folder / "model.safetensors")
    for prefix in sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n}):
        for end in ("weight", "weight_scale_inv"):
            gate, up, down = (
                torch.stack([tensors.pop(f"{prefix}.experts.{e}.{part}.{end}") for e in range(8)])
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            if scales == "of blocks" or end == "weight":
                both = torch.cat((gate.view(torch.uint8), up.view(torch.uint8)), 1).view(gate.dtype)
            else:
                both, down = gate.view(8, 1, 1), down.view(8, 1, 1)
            end = end.removeprefix("weight")
            tensors[f"{prefix}.experts.gate_up_proj{end}"] = both
            tensors[f"{prefix}.experts.down_proj{end}"] = down
    with open_small(folder, tmp_path, "full", **TINY) as llm:
        expected = llm.logits(IDS)
    save_file(tensors, folder / "model.safetensors")
    with open_small(folder, tmp_path, "full", **TINY) as llm:
        assert torch.equal(llm.logits(IDS), expected)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("bits", ["full", "8", "4"])
def test_what_is_kept_is_what_the_plan_counts(folders, tmp_path, name, bits):
    packed, plain = folders(name)
    want = {"full": KEPT[name][0], "8": KEPT[name][1]}.get(bits)
    if bits == "4":
        want = KEPT[name][1] if KEPT[name][1][0] == 4 else (4, False)
    with open_small(plain, tmp_path, "8", **TINY) as llm:
        plain_logits = llm.logits(IDS, prefill_tokens=90)
    with open_small(plain, tmp_path, "8", weight_bits="8", **TINY) as llm:
        eight_logits = llm.logits(IDS, prefill_tokens=90)
    with open_small(packed, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        logits = llm.logits(IDS, prefill_tokens=90)
        store, facts = llm.admission.weights, llm.admission.facts
        sizes = []
        for layer in range(llm.config.num_layers):
            kept = store._resident[layer]
            matrix = kept["mlp.down_proj.weight"]
            if isinstance(want, torch.dtype):
                assert matrix.dtype == want
            else:
                assert isinstance(matrix, QuantisedWeight)
                assert (matrix.bits, matrix.is_affine) == want
            sizes.append(sum(-(-n // 64) * 64 for t in kept.values() for n in _bytes(t)))
        assert sorted(sizes) == facts.layer_sizes
        said = "full" if isinstance(want, torch.dtype) else str(want[0])
        assert llm.plan.weight_bits == said
        said = "16" if said == "full" else said
        assert f"weights most in {said} bits; quantised in the files" in str(llm.plan)
    # No more than what rounding activations to 8 bits costs, which products with codes have.
    if bits != "4" or want == KEPT[name][0]:
        most = 1.5 * loss(plain_logits, eight_logits).median()
        assert loss(plain_logits, logits).median() < most


def _bytes(tensor) -> list[int]:
    if isinstance(tensor, QuantisedWeight):
        return [tensor.codes.nbytes, tensor.scales.nbytes]
    return [tensor.nbytes]


@pytest.mark.parametrize("name", ["fp8", "gptq, groups in another order", "awq"])
def test_bits_are_chosen_by_what_the_files_have(folders, tmp_path, name):
    with open_small(folders(name)[0], tmp_path, "8", weight_bits="auto", **TINY) as llm:
        assert llm.admission.facts.weight_bits == (None if name == "awq" else "auto")
        llm.logits([1, 2, 3])
        weights = llm.admission.weights
        # What the files have as numbers stays so, in small models.
        assert isinstance(weights.head.blocks[0], torch.Tensor)
        assert weights._resident[0]["self_attn.q_proj.weight"].bits == (4 if name == "awq" else 8)


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq, 8 bits", "compressed-tensors", "fp8"])
@pytest.mark.parametrize("bits", ["full", "8"])
def test_layers_that_are_streamed_change_no_bit(folders, tmp_path, name, bits):
    with open_small(folders(name)[0], tmp_path, "8", weight_bits=bits, **TINY) as llm:
        resident = llm.logits(IDS)
    with open_small(folders(name)[0], tmp_path, "8", weight_bits=bits, **TINY) as llm:
        hold(llm, Loaded(llm.config.num_layers, True))
        assert torch.equal(llm.logits(IDS), resident)
        assert llm.admission.weights.bytes_streamed > 0


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors", "gptq, 8 bits", "fp8"])
@pytest.mark.parametrize("bits", ["full", "8"])
def test_experts_that_are_read_change_no_bit(folders, tmp_path, name, bits):
    """Those of four bits from the files themselves."""
    packed, _ = folders(name, "qwen3-moe")
    with open_small(packed, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        resident = llm.logits(IDS, prefill_tokens=90)
    with open_small(packed, tmp_path, "8", weight_bits=bits, **TINY) as llm:
        hold_few_experts(llm)
        assert torch.equal(llm.logits(IDS, prefill_tokens=90), resident)
        store = llm.admission.weights
        assert store._experts.misses > 0
        assert (store._scratch is None) == (name in ("awq", "gptq", "compressed-tensors"))


def test_float8_is_what_transformers_reads(folders):
    """Its own reading of such a folder, without a GPU."""
    import transformers

    packed, _ = folders("fp8")
    config = transformers.FineGrainedFP8Config(weight_block_size=[32, 32], dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=config, dtype=torch.float32
    )
    held, checkpoint = model.state_dict(), opened(packed)
    for name, ref in checkpoint.refs.items():
        if len(ref.shape) == 2 and "layers" in name:
            assert torch.equal(checkpoint.read(name), held[name].to(torch.bfloat16)), name
    checkpoint.close()


def test_what_modelopt_writes_beside_is_read(folders, tmp_path):
    folder = copied(folders("modelopt")[0], tmp_path)
    want = read_model_config(folder).quantisation
    change(folder, quantization_config=None)
    assert read_model_config(folder).quantisation is None
    beside = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    assert read_model_config(folder).quantisation == want
    beside["quantization"]["quant_algo"] = "W4A16_AWQ"
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    with pytest.raises(errors.UnsupportedModel, match="modelopt, W4A16_AWQ"):
        read_model_config(folder)


def test_what_lies_beside_tells_a_model_from_others(folders, tmp_path):
    """It says how weights are read."""
    folder = copied(folders("modelopt")[0], tmp_path)
    before = model_fingerprint(folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize("name", ["awq", "gptq, second version", "compressed-tensors, zeros"])
def test_other_names_of_fields_are_known(folders, tmp_path, name):
    """As earlier and later programs wrote them."""
    folder = copied(folders(name)[0], tmp_path)
    want = read_model_config(folder).quantisation
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if name == "awq":
        said["format"] = said.pop("version").upper()
        said["q_group_size"] = said.pop("group_size")
    elif name == "compressed-tensors, zeros":
        change(folder, quantization_config=None, compression_config=said)
        assert read_model_config(folder).quantisation == want
        return
    else:
        said["format"] = said.pop("checkpoint_format")
    change(folder, quantization_config=said)
    assert read_model_config(folder).quantisation == want


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "end", "make", "says"),
    [
        ("awq", ".scales", lambda t: None, "down_proj has no tensor scales"),
        ("awq", ".qzeros", lambda t: t[:, :4].contiguous(), "down_proj has qzeros of"),
        ("awq", ".qweight", lambda t: t[:64].contiguous(), "has 3 groups of 32 inputs for 64"),
        ("awq", ".qweight", lambda t: t.float(), "down_proj has qweight of .* in torch.float32"),
        ("awq", ".scales", lambda t: t.fill_(torch.inf), "not numbers, or beyond float16"),
        ("gptq", ".qzeros", lambda t: None, "down_proj has no tensor qzeros"),
        ("gptq", ".g_idx", lambda t: t.flip(0), "in an order that config.json does not say"),
        ("gptq", ".g_idx", lambda t: t[:5].contiguous(), "down_proj has g_idx of"),
        ("gptq", ".scales", lambda t: t[:2].contiguous(), "down_proj has qzeros of"),
        ("gptq, symmetric", ".qzeros", lambda t: t.fill_(5), "zeros are not in the middle"),
        ("gptq, groups in another order", ".g_idx", lambda t: t.fill_(7), "groups that are not"),
        ("gptq, groups in another order", ".g_idx", lambda t: -t, "groups that are not"),
        ("gptq, 8 bits", ".scales", lambda t: t.fill_(torch.nan), "not numbers, or beyond"),
        ("gptq, groups in another order", ".g_idx", lambda t: None, "has no tensor g_idx"),
        ("compressed-tensors", ".weight_scale", lambda t: None, "has no tensor weight_scale"),
        ("compressed-tensors, zeros", ".weight_zero_point", lambda t: t[:3], "weight_zero_point"),
        ("fp8", ".weight_scale_inv", lambda t: None, "has no tensor weight_scale"),
        ("fp8", ".weight_scale_inv", lambda t: t[:, :2].contiguous(), "has weight_scale of"),
        ("fp8", ".weight", lambda t: t.fill_(torch.nan), "weights are not numbers"),
        ("fp8", ".weight_scale_inv", lambda t: t.fill_(torch.nan), "not finite, or too large"),
    ],
)
def test_damaged_parts_are_named(folders, tmp_path, name, end, make, says):
    with pytest.raises(errors.ModelError, match=says):
        open_damaged(folders, tmp_path, name, end, make, "8")


@pytest.mark.parametrize(
    ("name", "end"),
    [("fp8", ".weight_scale_inv"), ("gptq, groups in another order", ".scales")],
)
def test_scales_that_are_no_numbers_are_named_where_numbers_are_kept(folders, tmp_path, name, end):
    with pytest.raises(errors.BadCheckpoint, match=r"down_proj\.weight: weights are not finite"):
        open_damaged(folders, tmp_path, name, end, lambda t: t.fill_(torch.nan), "full")


def open_damaged(folders, tmp_path, name, end, make, bits):
    folder = copied(folders(name)[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    changed = make(tensors.pop(NAME + end))
    if changed is not None:
        tensors[NAME + end] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with open_small(folder, tmp_path, weight_bits=bits) as llm:
        llm.logits(IDS[:3])


def copied(source, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_what_is_not_needed_may_be_packed_anyhow(folders, tmp_path):
    """A vision part, say."""
    folder = copied(folders("fp8")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["visual.patches.weight"] = torch.zeros(4, 3, 2).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with open_small(folder, tmp_path, **TINY) as llm:
        assert llm.logits(IDS[:3]).shape[0] == 3


def test_a_quantised_head_is_refused(folders, tmp_path):
    source, _ = folders("fp8", "phi3")
    folder = copied(source, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale_inv"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(errors.UnsupportedModel, match=r"lm_head\.weight is quantised"):
        open_small(folder, tmp_path)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised .bitsandbytes"),
        ({"quant_method": "hqq"}, "quantised .hqq.*Ebbtide reads AWQ"),
        ("gptq", "quantised .gptq"),
        ({"quant_method": "gptq", "bits": 3}, "gptq, gptq, 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq, marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": {}}}, "4 bits, dynamic"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "many"}, "group_size is 'many'"),
        ({"quant_method": "gptq", "bits": 4, "sym": 1}, "sym is 1"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq, version gemv"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8, e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "blocks of weights are"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "compressed-tensors, nvfp4-pack-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}},
            },
            "int of 3 bits",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "transform_config": {"config_groups": {"u": {}}},
            },
            "transforms of activations",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(folders, tmp_path, said, says):
    folder = copied(folders("awq")[0], tmp_path)
    change(folder, quantization_config=said)
    with pytest.raises(errors.ModelError, match=says):
        open_small(folder, tmp_path)
