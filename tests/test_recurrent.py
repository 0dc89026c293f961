"""Layers that keep a state in place of keys and values: whatever is interrupted has changed
nothing, going back costs no more than it must, and memory is what the plan says. That their logits
are those of transformers, in any cut and from any tier, stands in test_families.py, and sessions of
all kinds in test_prefix_sessions.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import platformdirs
import pytest
import torch
from interruptions import interrupted_after
from model_matrix import VARIANTS
from random_checkpoints import reference_logits
from safetensors.torch import load_file, save_file
from sessions_under_test import IDS
from small_llm import TINY, open_small

from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.errors import BadCheckpoint, UnsupportedModel
from ebbtide.offload.layers.decoder import Decoder
from ebbtide.offload.layers.recurrent import RecurrentLayer
from ebbtide.offload.layers.scan_layer import ScanLayer
from ebbtide.offload.layers.states import States
from ebbtide.offload.mode import Mode
from ebbtide.offload.models.layer_config import ScanShape
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.prefixes import keeper as prefix_keeper
from ebbtide.offload.prefixes.store import PrefixStore
from ebbtide.offload.running.engine import Engine
from ebbtide.offload.running.sequence import Sequence
from ebbtide.offload.running.sequences import Sequences
from ebbtide.offload.running.whole_token import WholeToken

HYBRIDS = ["qwen3.5", "granite4-h", "lfm2", "falcon-h1", "nemotron-h", "jamba", "kimi-linear-moe"]
CELL = TINY["cell_tokens"]
TEXT, ANSWER = IDS[:140], IDS[140:210]
TRACED = [
    *(Decoder.recur, Engine.prefill, Engine.decode, Sequences.settle, Sequences.rewind),
    *(Sequences.rewind_to, Sequences.begin_anew, Sequence.decoded, Sequence.prefilled),
    *(Sequence.resume_point, States.begin, States.end, States.of, States._free, States.name),
    *(WholeToken.run, States.places),
]
RECURRENT = [name for name, variant in VARIANTS.items() if variant.recurrent]


def opened(folder, place, *, sweep_cells: int = 1, **options):
    llm = open_small(folder, place, **TINY, **options)
    llm._context = 1024
    plan = llm.admission.plan
    llm.admission.plan = lambda *a, **k: replace(plan(*a, **k), sweep_cells=sweep_cells)
    return llm


@pytest.mark.parametrize("name", RECURRENT)
def test_a_row_in_one_call_has_the_bits_of_its_operations(checkpoint, tmp_path, name):
    """And leaves the same state behind."""
    generator = torch.Generator().manual_seed(6)
    with opened(checkpoint(name), tmp_path) as llm:
        llm.logits(TEXT[:3])
        weights, config = llm.admission.weights, llm.config
        for layer in config.state_layers:
            recurrence = config.recurrence_of(layer)
            is_scan = isinstance(recurrence.shape, ScanShape)
            kind = ScanLayer if is_scan else RecurrentLayer
            made = kind(config, layer, weights.layer(layer))
            x = torch.randn((1, config.hidden_size), generator=generator)
            states, found = States([recurrence], 3, CELL, x.device), []
            states.begin(0, [1])
            before, after = states.of(0, 0)
            for part in before:
                part.normal_(generator=generator)
            for step in (made.step, None):
                made.step = step
                out = made.run(x, slice(0, 1), before, after)
                found.append([out, *(part.clone() for part in after)])
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
            assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("sweep_cells", [1, 3])
@pytest.mark.parametrize("name", HYBRIDS)
def test_an_interrupted_reading_goes_on_to_the_bit(checkpoint, tmp_path, name, sweep_cells):
    """At every fifth line that a run of cells takes, within a cell and at its edges."""
    with opened(checkpoint(name), tmp_path, sweep_cells=sweep_cells) as llm:
        expected = []
        for at in range(1, 5000, 5):
            with llm.open_session(1024, sequences=1) as session:
                session.append(TEXT[:20], process=False)
                session.last_logits()
                session.append(TEXT[20:], process=False)
                is_interrupted = interrupted_after(at, TRACED, session.last_logits)
                expected.append(session.last_logits().clone())
                assert session._sequence.states.knows(len(TEXT))
            if not is_interrupted:
                break
        assert at > 50
    assert all(torch.equal(row, expected[-1]) for row in expected)


@pytest.mark.parametrize("mode", ["exact", "bounded"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_an_interrupted_token_is_decoded_anew_to_the_bit(checkpoint, tmp_path, name, mode):
    """At each line that decoding a token takes, and at another one for each token."""
    with opened(checkpoint(name), tmp_path, mode=Mode(mode)) as llm:

        def rows(interrupted: bool) -> list[torch.Tensor]:
            found, at = [], 0
            with llm.open_session(1024, sequences=1) as session:
                sequence, engine = session._sequence, session._engine
                session.append(TEXT, process=False)
                session.last_logits()
                for token in ANSWER:
                    sequence.tokens.append(token)
                    if interrupted:
                        at += 1
                        interrupted_after(at, TRACED, lambda: engine.decode(sequence))
                        engine.sequences.settle(sequence)
                    if sequence.length < len(sequence.tokens):
                        found.append(engine.logits(engine.decode(sequence))[0].clone())
                    else:  # it was done, and what came of it is lost
                        found.append(None)
            return found

        expected, got = rows(False), rows(True)
    compared = [torch.equal(a, b) for a, b in zip(expected, got, strict=True) if b is not None]
    assert all(compared) and len(compared) > 20


@pytest.mark.parametrize("deed", ["again", "truncate", "close"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_whatever_follows_an_interruption(checkpoint, tmp_path, monkeypatch, name, deed):
    """At every line of reading what ends an answer: asked again, taken back, or closed and
    resumed by name from what was kept."""
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(tmp_path / "state"))
    for setting in ("_LEAST_TOKENS", "_NEAR_ROWS"):
        monkeypatch.setattr(prefix_keeper, setting, CELL)
    monkeypatch.setattr("ebbtide.offload.prefixes.store._KEPT_FREE_BYTES", 0)
    with opened(checkpoint(name), tmp_path, sweep_cells=2) as llm:

        def last(session) -> torch.Tensor:
            session.find_kept()
            return session.last_logits().clone()

        def whole(tokens: list[int]) -> torch.Tensor:
            with llm.open_session(1024, sequences=1) as session:
                session.append(tokens, process=False)
                return session.last_logits().clone()

        llm._prefixes = None
        expected = {n: whole(TEXT[:n]) for n in (len(TEXT), 120)}
        llm._prefixes = PrefixStore(prefix_dir(tmp_path), 1 << 30)
        for at in range(1, 5000, 2):
            with llm.session("book") as session:
                session.truncate(0)
                session.append(TEXT[:40], process=False)
                session.last_logits()
                session.append(TEXT[40:], process=False)
                is_interrupted = interrupted_after(at, TRACED, session.last_logits)
                if deed == "again":
                    assert torch.equal(last(session), expected[len(TEXT)])
                elif deed == "truncate":
                    session.truncate(120)
                    assert torch.equal(last(session), expected[120])
            if deed == "close":
                with llm.session("book") as session:
                    assert torch.equal(last(session), expected[len(TEXT)])
            for file in prefix_dir(tmp_path).iterdir():
                file.unlink()
            if not is_interrupted:
                break
        assert at > 30


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_interrupted_way_back_forgets_what_was_taken_there(checkpoint, tmp_path, name):
    """A snapshot behind tokens that are others by now must not come back."""
    with opened(checkpoint(name), tmp_path) as llm, llm.session() as alone:
        for at in range(1, 500):
            with llm.session() as session:
                session.generate(TEXT, max_new_tokens=80)
                back = lambda s=session: s.truncate(len(TEXT))  # noqa: E731
                is_interrupted = interrupted_after(at, TRACED, back)
                session.truncate(100)
                session.append(ANSWER, process=False)
                got = session.last_logits().clone()
                session.append(TEXT, process=False)
                session.last_logits()
                session.truncate(len(TEXT))
                session.append(ANSWER[:3], process=False)
                went_on = session.last_logits().clone()
                held = session.tokens
            if not is_interrupted:
                break
            for tokens, logits in ((TEXT[:100] + ANSWER, got), (held, went_on)):
                alone.truncate(0)
                alone.append(tokens, process=False)
                assert torch.equal(alone.last_logits(), logits)
        assert at > 5


@pytest.mark.parametrize("name", HYBRIDS)
def test_going_back_costs_less_than_a_cell_as_long_as_cells_are_raw(checkpoint, tmp_path, name):
    with opened(checkpoint(name), tmp_path) as llm, llm.session() as session:
        session.append(TEXT, process=False)
        expected = session.last_logits().clone()
        within = len(TEXT) % CELL
        for back, recomputed in ((1, within - 1), (within, 0)):
            session.truncate(len(TEXT) - back)
            session.append(TEXT[len(TEXT) - back :], process=False)
            assert torch.equal(session.last_logits(), expected)
            assert session.take_recomputed() == recomputed
        session.truncate(len(TEXT) - 3 * CELL)
        session.append(TEXT[len(TEXT) - 3 * CELL :], process=False)
        assert torch.equal(session.last_logits(), expected)
        assert session.take_recomputed() == len(TEXT) - 3 * CELL  # from the start


@pytest.mark.parametrize("name", HYBRIDS)
def test_going_back_again_costs_no_more(checkpoint, tmp_path, name):
    """Behind a snapshot that was gone back to."""
    with opened(checkpoint(name), tmp_path) as llm, llm.session() as session:
        session.generate(TEXT, max_new_tokens=10)
        for _ in range(2):
            session.truncate(len(TEXT))
            session.generate(max_new_tokens=10)
        session.take_recomputed()
        session.truncate(len(TEXT) - 5)
        session.append(ANSWER[:2], process=False)
        session.last_logits()
        assert session.take_recomputed() == len(TEXT) % CELL - 5


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_answer_is_made_again_without_reading_anything(checkpoint, tmp_path, name):
    """The state behind a prompt is kept with the raw cells: the last two prompts can be gone back
    to from any distance."""
    with opened(checkpoint(name), tmp_path) as llm, llm.session() as session:
        first = session.generate(TEXT, max_new_tokens=100)
        held = session.tokens
        session.generate(ANSWER, max_new_tokens=50)
        session.undo()
        assert session.tokens == held
        session.truncate(len(TEXT))
        again = session.generate(max_new_tokens=100)
        assert again.token_ids == first.token_ids
        assert again.usage["recomputed_tokens"] == 0


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("sweep_cells", [1, 8])
@pytest.mark.parametrize("name", HYBRIDS)
def test_the_plan_counts_every_copy(checkpoint, tmp_path, name, sequences, sweep_cells):
    """Of a session, the snapshots of its last two answers and a fork, where there may be these."""
    with opened(checkpoint(name), tmp_path, sweep_cells=sweep_cells) as llm:
        request = Request(1024, sequences, sweep_cells=sweep_cells)
        plan = make_plan(llm.admission.facts, llm.geometry, llm.admission.limits, request)
        with llm.open_session(1024, sequences=sequences) as session:
            branches = [session]
            for _ in range(3):
                session.generate(ANSWER, max_new_tokens=2)
            if sequences > 1:
                branches.append(session.fork())
            held = [copy for branch in branches for copy in branch._sequence.states._copies]
            held += [snapshot.state for snapshot in session._sequence.snapshots]
            num_bytes = sum(copy.nbytes for copy in held)
            decoder, weights = session._engine.decoder, llm.admission.weights
            for layer in llm.config.state_layers:
                w = weights.layer(layer)
                made = decoder._with_state.of(layer, w)
                turned = {made._conv[0]: ("conv.weight", "conv1d.weight")}
                if isinstance(made, ScanLayer):
                    turned[made._rate] = ("A_log",)
                for of_kernels, names in turned.items():
                    of_file = next(w[n] for n in w if n.endswith(names))
                    assert of_kernels.data_ptr() != of_file.data_ptr()
                    num_bytes += of_kernels.nbytes + of_file.nbytes
    assert plan.host["recurrent states"] == num_bytes


def test_olmo_hybrid_opens_by_all_names_of_its_tensors(checkpoint, tmp_path):
    """Its convolution in the parts of published files, in thirds as transformers cuts them, and
    whole; its norms by their names in published files, and by transformers' own."""
    folder = checkpoint("olmo-hybrid")
    tensors = load_file(folder / "model.safetensors")
    shape = next(filter(None, read_model_config(folder).recurrences)).shape
    sizes = [shape.keys, shape.keys, shape.values]
    assert len(set(sizes)) > 1, "thirds would be the parts"
    published, own = {}, {}
    for name, tensor in tensors.items():
        named = name.replace("attention_layer_norm", "input_layernorm")
        named = named.replace("feedforward_layer_norm", "post_attention_layernorm")
        if "_conv1d" not in name:
            published[name] = own[named] = tensor
        elif "q_conv1d" in name:
            parts = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
            whole = torch.cat([tensors[part] for part in parts])
            own[name.replace("q_conv1d", "conv1d")] = whole
            split = map(torch.Tensor.clone, whole.split(sizes))
            published |= dict(zip(parts, split, strict=True))
    assert len(published) == len(tensors) > len(own) and not published.keys() <= own.keys()
    logits = []
    for number, written in enumerate((tensors, published, own)):
        other = shutil.copytree(folder, tmp_path / str(number))
        save_file(written, other / "model.safetensors", {"format": "pt"})
        with opened(other, tmp_path) as llm:
            logits.append(llm.logits(TEXT))
    assert all(torch.equal(part, logits[0]) for part in logits[1:])
    assert torch.equal(reference_logits(tmp_path / "1", TEXT), reference_logits(folder, TEXT))


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({}, True),
        ({"rope_theta": 5e5}, True),
        ({"rope_parameters": {"rope_theta": 5e5}}, True),
        ({"rope_parameters": {"rope_type": "default"}}, True),
        ({"rope_parameters": None, "rope_theta": 5e5}, True),
        ({"rope_parameters": None}, False),
        ({"rope_parameters": {"rope_theta": None}}, False),
        ({"rope_parameters": {"rope_type": None}}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, False),
    ],
)
def test_positions_of_olmo_hybrid(checkpoint, tmp_path, fields, turns):
    """Published files say in three ways that it has none, of which transformers reads two."""
    config = json.loads((checkpoint("olmo-hybrid") / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    ropes = read_model_config(tmp_path).ropes
    theta = 5e5 if "500000.0" in str(fields) else 1e4
    assert [rope and rope.theta for rope in ropes] == [theta if turns else None] * 5


@pytest.mark.parametrize(
    ("name", "field", "value", "says"),
    [
        ("qwen3.5", "linear_num_value_heads", 3, "cannot share"),
        ("qwen3.5", "linear_conv_kernel_dim", 1, "linear_conv_kernel_dim"),
        ("qwen3.5", "layer_types", ["linear_attention"] * 3, "no layer attends"),
        ("qwen3.5", "layer_types", ["linear_attention", "delta", "full_attention"], "'delta'"),
        ("granite4-h", "mamba_d_head", 24, "do not make"),
        ("granite4-h", "mamba_n_groups", 3, "cannot share"),
        ("granite4-h", "time_step_limit", [1.0], "time_step_limit"),
        ("granite4-h", "time_step_limit", [float("nan"), 1.0], "time_step_limit"),
        ("granite4-h", "time_step_limit", [1.5, 0.3], "ascending"),
        ("granite4-h", "time_step_limit", [0, 10**400], "time_step_limit"),
        ("granite4-h", "hidden_act", "gelu", "convolutions have silu"),
        ("qwen3.5", "linear_conv_kernel_dim", 17, "linear_conv_kernel_dim"),
        ("lfm2", "conv_L_cache", 0, "conv_L_cache"),
        ("falcon-h1", "ssm_multipliers", [1.0], "ssm_multipliers"),
        ("falcon-h1", "mlp_multipliers", [1.0, "a"], "mlp_multipliers"),
        ("falcon-h1", "mamba_rms_norm", True, "mamba_norm_before_gate"),
        ("falcon-h1", "attention_bias", True, "attention_in_multiplier"),
        ("falcon-h1", "mamba_d_ssm", 100, "do not make"),
        ("kimi-linear-moe", "moe_router_activation_func", "softmax", "chosen by sigmoids"),
        ("kimi-linear-moe", "linear_attn_config", [2], "expected an object"),
        (
            *("kimi-linear-moe", "linear_attn_config"),
            *({"full_attn_layers": [2], "kda_layers": [1, 2]}, "each of the 3 layers once"),
        ),
        (
            *("kimi-linear-moe", "linear_attn_config"),
            *({"full_attn_layers": 2, "kda_layers": [1, 2, 3]}, "each of the 3 layers once"),
        ),
        (
            *("kimi-linear-moe", "linear_attn_config"),
            *({"full_attn_layers": [2, None], "kda_layers": [True, 3]}, "layers once"),
        ),
        ("ling3-moe", "kda_lower_bound", 2.0, "kda_lower_bound"),
        ("ling3-moe", "kda_lower_bound", 0, "kda_lower_bound"),
        ("ling3-moe", "kda_lower_bound", float("nan"), "kda_lower_bound"),
        ("ling3-moe", "kda_lower_bound", "low", "kda_lower_bound"),
        ("ling3-moe", "expert_swiglu_limit_list", [None, 7.0, None], "bounds experts"),
        ("jamba", "attn_layer_offset", 3, "less than attn_layer_period"),
        ("jamba", "hidden_act", "gelu", "convolutions have silu"),
        ("jamba-moe", "num_experts_per_tok", 9, "cannot be chosen"),
        ("nemotron-h", "num_hidden_layers", 4, "must name 4 layers"),
        ("nemotron-h", "hybrid_override_pattern", "M-M*?", "'[?]'"),
        ("nemotron-h", "hybrid_override_pattern", ["M", 3, "-", "*", "-"], "not supported"),
        ("nemotron-h", "hybrid_override_pattern", "M-M--", "no layer attends"),
        ("nemotron-h", "mlp_hidden_act", "silu", "whose MLPs have relu2"),
        ("nemotron-h", "n_groups", 4, "cannot share"),
        ("nemotron-h-moe", "n_group", 3, "from 1 of 3 groups"),
        ("nemotron-h-moe", "num_experts_per_tok", 9, "cannot be chosen"),
        ("lfm2", "full_attn_idxs", 1, "full_attn_idxs"),
        ("olmo-hybrid", "linear_num_key_heads", 3, "cannot share"),
        ("olmo-hybrid", "linear_key_head_dim", 0, "linear_key_head_dim"),
        ("olmo-hybrid", "linear_allow_neg_eigval", 2, "linear_allow_neg_eigval"),
        ("olmo-hybrid", "rope_parameters", {"rope_type": "ntk"}, "'ntk'"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(checkpoint, tmp_path, name, field, value, says):
    config = json.loads((checkpoint(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises((BadCheckpoint, UnsupportedModel), match=says):
        read_model_config(tmp_path)


def test_a_usual_name_of_a_field_counts_before_a_models_own(checkpoint, tmp_path):
    config = json.loads((checkpoint("kimi-linear-moe") / "config.json").read_text())
    for fields in ({"max_position_embeddings": 512, **config}, {**config}):
        fields["max_position_embeddings"] = 512
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert config["model_max_length"] != 512 == read_model_config(tmp_path).max_positions


def test_a_bound_that_does_not_hold_may_be_anything(checkpoint, tmp_path):
    config = json.loads((checkpoint("ling3-moe-unbounded") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kda_lower_bound": 0}))
    assert read_model_config(tmp_path) == read_model_config(checkpoint("ling3-moe-unbounded"))


def test_ling_3_has_two_names(checkpoint, tmp_path):
    config = json.loads((checkpoint("ling3-moe") / "config.json").read_text())
    made = read_model_config(checkpoint("ling3-moe"))
    config["architectures"] = ["BailingMoeV3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert replace(read_model_config(tmp_path), architecture=made.architecture) == made


@pytest.mark.parametrize("name", RECURRENT)
def test_a_field_that_is_left_out_means_what_it_means_to_transformers(checkpoint, tmp_path, name):
    """Each field of a configuration is left out in turn; transformers fills it in."""
    import transformers

    text = "Text" if name.startswith("qwen3.5") else ""
    kind = getattr(transformers, f"{VARIANTS[name].architecture}{text}Config")
    folder = checkpoint(name, layout="transformers5")
    written, whole = json.loads((folder / "config.json").read_text()), kind.from_pretrained(folder)
    whole = {**json.loads(whole.to_json_string(use_diff=False)), "head_dim": 16}
    whole |= {k: written[k] for k in ("architectures", "dtype")}

    def understood(fields: dict):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            return read_model_config(tmp_path)
        except (BadCheckpoint, UnsupportedModel) as error:
            return type(error)

    num_compared = 0
    for field in whole.keys() - {"architectures", "dtype", "head_dim", "model_type"}:
        fields = {k: v for k, v in whole.items() if k != field}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            filled = json.loads(kind.from_pretrained(tmp_path).to_json_string(use_diff=False))
        except Exception:  # of any kind: it makes no model without the field
            continue
        filled |= {k: written[k] for k in ("architectures", "dtype")} | {"head_dim": 16}
        # What every model says is not made up for it.
        if not isinstance(found := understood(fields), type):
            assert found == understood(filled), field
            num_compared += 1
    assert num_compared > 15
