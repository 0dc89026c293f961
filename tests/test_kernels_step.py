"""A layer's decode step in two calls computes what its operations compute one after the other, and
the number of threads, or who else computes, changes no bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from affine_files import drawn_affine
from mxfp4_files import drawn_weight

from ebbtide.kernels import dispatch
from ebbtide.kernels.gate import factors
from ebbtide.kernels.matmul import linear, linear_heads
from ebbtide.kernels.norm import Norm, normed
from ebbtide.kernels.quantised import QuantisedWeight, quantise_weight
from ebbtide.kernels.step import BlockProduct, LayerStep, StepShape
from ebbtide.offload.layers.rope import Rope
from ebbtide.offload.models.rope_config import RopeConfig

HIDDEN, INNER = 200, 424  # neither whole strips nor whole vectors
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40
SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
GIVEN = 104  # numbers that a state gives beside attention
INPUTS = 72  # that a layer is given besides the residual
RANK = 24  # of latents and of a learnt residual
FEW, EACH = 56, 30  # numbers that a latent's queries are made of, and those of each head
LATENT = {"q": (HEADS * EACH, HIDDEN), "k": (HEAD_DIM, HIDDEN), "o": (HIDDEN, HEADS * 8)}
LATENT |= {"head_keys": (HEADS * RANK, EACH - 16), "head_values": (HEADS * 8, RANK)}
POSITION = 1234

VARIANTS = {
    "plain": {},
    "biases": {"has_biases": True},
    "heads normed, halves of heads turned, interleaved": {
        "qk_norm": "head",
        "rotary": 20,
        "interleaved": True,
    },
    "all heads normed, norms after, none before": {
        "qk_norm": "all",
        "norms": ("after_attention", "after_mlp"),
        "activation": "gelu",
    },
    "all norms, of 1 + w, no positions": {
        "norms": ("before_attention", "after_attention", "before_mlp", "after_mlp"),
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "rotary": 0,
    },
    "residuals times something": {"residual_multiplier": 0.22, "mlp_multiplier": 0.22},
    "a gate beside the queries, of heads normed": {"output_gate": "beside", "qk_norm": "head"},
    "a gate of each number, biases": {"output_gate": "number", "has_biases": True},
    "a gate of each head": {"output_gate": "head"},
    "an MLP without a gate": {"without": ("gate",), "activation": "relu2"},
    "no MLP": {"without": ("gate", "up", "down")},
    "queries, keys, values within bounds, a gate of ReLU": {"qkv_clip": 0.7, "activation": "relu"},
    "heads normed, and values, within bounds": {"qkv_clip": 0.7, "qk_norm": "head"},
    "all heads normed, and values, within bounds": {"qkv_clip": 0.7, "qk_norm": "all"},
    "heads of 36, normed by their own, a gate of each head": {
        "head_dim": 36,
        "rotary": 36,
        "qk_norm": "each",
        "output_gate": "head",
    },
    "heads of 33, all normed, a gate beside the queries, within bounds, biases": {
        "head_dim": 33,
        "rotary": 20,
        "qk_norm": "all",
        "output_gate": "beside",
        "qkv_clip": 0.7,
        "has_biases": True,
    },
    "heads of 4, normed once they are turned, values too, a gate of each number": {
        "head_dim": 4,
        "rotary": 4,
        "qk_norm": "turned",
        "norms_values": True,
        "output_gate": "number",
    },
    "heads normed once they are turned": {"qk_norm": "turned"},
    "few numbers of the gate count": {"gate_cutoff": 0.7, "gate_multiplier": 1.5},
    "a learnt residual, normed": {
        "norms": ("before_attention", "before_mlp", "after_laurel"),
        "has_laurel": True,
    },
    "keys and values of another layer": {"without": ("k", "v"), "qk_norm": "head"},
    "values are keys, normed": {"without": ("v",), "qk_norm": "head", "norms_values": True},
    "values normed, biases": {"has_biases": True, "norms_values": True},
    "inputs of its own, normed, all times something": {
        "norms": ("before_attention", "before_mlp", "after_inputs"),
        "activation": "gelu_tanh",
        "has_inputs": True,
        "layer_multiplier": 0.7,
    },
    "a state beside attention, multipliers": {
        "has_beside": True,
        "residual_multiplier": 0.5,
        "beside_multiplier": 0.7,
        "gate_multiplier": 1.5,
        "mlp_multiplier": 0.3,
    },
    "layer norms, biases": {"takes_mean": True, "has_biases": True},
    "layer norms of 1 + w, an MLP without a gate beside attention, heads normed by their own": {
        "takes_mean": True,
        "norms": ("before_attention",),
        "norm_offset": 1.0,
        "parallel_mlp": True,
        "without": ("gate",),
        "activation": "gelu_tanh",
        "qk_norm": "each",
    },
    "an MLP beside attention, turned heads normed": {"parallel_mlp": True, "qk_norm": "turned"},
    "a latent": {"rank": RANK, "rotary": HEAD_DIM - RANK},
    "a latent of interleaved pairs, few queries, biases": {
        "rank": RANK,
        "rotary": HEAD_DIM - RANK,
        "interleaved": True,
        "few_queries": True,
        "has_biases": True,
    },
}


def apply(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """`normed` as its definition has it."""
    x = x - x.mean(-1, keepdim=True) if norm.takes_mean else x
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight + norm.offset)
    return x if norm.bias is None else x + norm.bias


class Layer:
    """Random tensors of a layer, its step, and the same arithmetic operation by operation."""

    def __init__(
        self,
        kind: str,
        *,
        head_dim=HEAD_DIM,
        qk_norm="",
        norms=("before_attention", "before_mlp"),
        activation="silu",
        rotary=HEAD_DIM,
        interleaved=False,
        has_biases=False,
        norm_offset=0.0,
        takes_mean=False,
        output_gate="",
        has_beside=False,
        has_inputs=False,
        has_laurel=False,
        norms_values=False,
        few_queries=False,
        without=(),
        **more,
    ):
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * spread

        kv_heads = 1 if "rank" in more else KV_HEADS
        queries, keys = HEADS * head_dim, KV_HEADS * head_dim
        self.shape = StepShape(
            HIDDEN,
            head_dim,
            HEADS,
            kv_heads,
            activation,
            qk_norm,
            output_gate=output_gate,
            **more,
        )
        self.rotary, self.interleaved = rotary, interleaved
        sizes = {name: (HIDDEN,) for name in norms}
        if qk_norm == "each":
            sizes |= {"q": (HEADS, head_dim), "k": (KV_HEADS, head_dim)}
        elif qk_norm == "all":
            sizes |= {"q": (queries,), "k": (keys,)}
        elif qk_norm:
            sizes |= dict.fromkeys("qk", (head_dim,))
        if self.shape.rank:
            sizes |= {"latent": (RANK,)} | ({"few_queries": (FEW,)} if few_queries else {})
        has_bias = takes_mean and has_biases
        self.norms = {
            name: Norm(
                normal(*size), norm_offset, 1e-5, normal(*size) if has_bias else None, takes_mean
            )
            for name, size in sizes.items()
        }
        if norms_values:
            self.norms["v"] = Norm(torch.ones(head_dim), 0.0, 1e-5)
        shapes = SHAPES | {"q": (queries, HIDDEN), "o": (HIDDEN, queries)}
        shapes |= dict.fromkeys("kv", (keys, HIDDEN))
        shapes = {name: shape for name, shape in shapes.items() if name not in without}
        if output_gate:
            name = "q" if output_gate == "beside" else "attention_gate"
            gates = {"beside": 2 * queries, "number": queries, "head": HEADS}
            shapes[name] = gates[output_gate], HIDDEN
        if self.shape.rank:
            shapes = {n: shape for n, shape in shapes.items() if n != "v"} | LATENT
        if few_queries:
            shapes |= {"few_queries": (FEW, HIDDEN), "q": (HEADS * EACH, FEW)}
        if has_beside:
            shapes["beside"] = HIDDEN, GIVEN
        if has_inputs:
            shapes |= {"input_gate": (INPUTS, HIDDEN), "input_output": (HIDDEN, INPUTS)}
        if has_laurel:
            shapes |= {"laurel_left": (RANK, HIDDEN), "laurel_right": (HIDDEN, RANK)}
        self.products = {}
        for name, shape in shapes.items():
            weight = normal(*shape, spread=shape[1] ** -0.5)
            weight = (
                quantise_weight(weight, int(kind))
                if kind.isdigit()
                else weight.to(getattr(torch, kind))
            )
            bias = normal(shape[0]) if has_biases and not name.startswith("head_") else None
            self.products[name] = weight, bias
        if self.shape.gate_cutoff:
            self.products["mean"] = torch.ones(1, INNER), None
        share = rotary / head_dim
        config = RopeConfig("default", 1e4, {}, share, interleaved) if rotary else None
        self.rope = Rope(config, head_dim, torch.device("cpu"))
        native = dispatch.compiled_for()
        arguments = self.norms, self.products, rotary, interleaved
        self.step = LayerStep(native, self.shape, *arguments)

    def project(self, x, dtype) -> tuple[torch.Tensor, ...]:
        h = self._norm("before_attention", x)
        if self.shape.rank:
            return self._project_latent(h, dtype)
        q, *kv = (self._multiply(name, h, dtype) for name in "qkv" if name in self.products)
        k, v = kv if len(kv) == 2 else kv * 2 or (q, q)  # without keys: of no use
        how, gate, dim = self.shape.output_gate, [], self.shape.head_dim
        if how == "beside":
            q, *gate = (part.flatten()[None] for part in q.view(HEADS, 2, dim).unbind(1))
        elif how:
            each = dim if how == "head" else 1
            gate = [self._multiply("attention_gate", h, dtype).repeat_interleave(each, -1)]
        if self.shape.qk_norm == "all":
            q, k = self._norm("q", q), self._norm("k", k)
        q, k, v = (part.view(1, -1, dim) for part in (q, k, v))
        if self.shape.qk_norm in ("head", "each"):
            q, k = self._norm("q", q), self._norm("k", k)
        v, most = self._norm("v", v), self.shape.qkv_clip or torch.inf
        q, k, v = (part.clamp(-most, most) for part in (q, k, v))
        q, k = (self.rope.turn(part, POSITION) for part in (q, k))
        if self.shape.qk_norm == "turned":
            q, k = self._norm("q", q), self._norm("k", k)
        # Behind each head zeros, up to eights.
        q, k, v = (torch.nn.functional.pad(part, (0, -dim % 8)) for part in (q * 0.125, k, v))
        return q.view(KV_HEADS, -1, q.shape[-1]), *((k, v) if kv else ()), *gate

    def _project_latent(self, h, dtype) -> tuple[torch.Tensor, ...]:
        latent, turning = self._multiply("k", h, dtype).split((RANK, HEAD_DIM - RANK), -1)
        if "few_queries" in self.products:
            h = self._norm("few_queries", self._multiply("few_queries", h, dtype))
        heads = self._multiply("q", h, dtype).view(1, HEADS, EACH)
        plain, first = heads.split((EACH - 16, 16), -1)
        weight, _ = self.products["head_keys"]
        if dtype == torch.float32:
            keys = linear_heads(plain, weight)
        else:
            keys = torch.einsum("rhi,hoi->rho", plain, weight.to(dtype).view(HEADS, RANK, -1))
        k = torch.cat((turning, self._norm("latent", latent)), -1).view(1, 1, HEAD_DIM)
        k, q = self.rope.turn(k, POSITION), self.rope.turn(torch.cat((first, keys), -1), POSITION)
        return (q * 0.125).view(1, HEADS, HEAD_DIM), k, k

    def add_attention(self, x, attended, dtype, name="o") -> torch.Tensor:
        o = self._norm("after_attention", self._multiply(name, attended, dtype))
        return x + o * getattr(self.shape, f"{'residual' if name == 'o' else name}_multiplier")

    def add_mlp(self, x, entered, dtype) -> torch.Tensor:
        if "down" not in self.products:
            return x
        is_parallel, has_gate = self.shape.parallel_mlp, "gate" in self.products
        h = self._norm("before_attention", entered) if is_parallel else self._norm("before_mlp", x)
        up = self._multiply("up", h, dtype)
        gate = self._multiply("gate", h, dtype) * self.shape.gate_multiplier if has_gate else up
        times = up if has_gate else torch.ones_like(up)
        if self.shape.gate_cutoff:
            above = gate - gate.mean()
            gate = (above - above.square().mean().sqrt() * self.shape.gate_cutoff).clamp(min=0)
        inner = torch.mul(*factors(gate, times, self.shape.activation))
        down = self._multiply("down", inner, dtype)
        return x + self._norm("after_mlp", down) * self.shape.mlp_multiplier

    def run(self, x, attended) -> list[torch.Tensor]:
        """Everything that the step gives."""
        q, kv, gate = self.step.project(x, *self.rope.angles(POSITION, 1), 0.125)
        mixed = [attended, x[:, :GIVEN]] if "beside" in self.products else [attended]
        parts = [self.step.add_attention(x, attended), self.step.mix(x, *mixed)]
        if "down" in self.products:
            parts += [self.step.add_mlp(x, x.flip(1)), self.step.mix(x)]
        parts.append(self.step.end(x, attended[:, :INPUTS].contiguous()))
        return [q, *(kv or ()), *([] if gate is None else [gate]), *parts]

    def expected(self, x, attended, dtype=torch.float64) -> list[torch.Tensor]:
        x, attended = x.to(dtype), attended.to(dtype)
        after = added = self.add_attention(x, attended, dtype)
        if "beside" in self.products:
            added = self.add_attention(added, x[:, :GIVEN], dtype, "beside")
        parts = [after, self.add_mlp(self.add_laurel(added, x, dtype), x, dtype)]
        if "down" in self.products:
            parts.append(self.add_mlp(x, x.flip(1), dtype))
            parts.append(self.add_mlp(self.add_laurel(x, x, dtype), x, dtype))
        return [*self.project(x, dtype), *parts, self.end(x, attended[:, :INPUTS], dtype)]

    def add_laurel(self, x, entered, dtype) -> torch.Tensor:
        if "laurel_left" not in self.products:
            return x
        h = self._norm("before_attention", entered)
        inner = self._multiply("laurel_left", h, dtype)
        learnt = self._norm("after_laurel", self._multiply("laurel_right", inner, dtype))
        return (x + h + learnt) * 0.5**0.5

    def end(self, x, inputs, dtype) -> torch.Tensor:
        if "input_gate" in self.products:
            gate = self._multiply("input_gate", x, dtype)
            inner = torch.mul(*factors(gate, inputs, self.shape.activation))
            x = x + self._norm("after_inputs", self._multiply("input_output", inner, dtype))
        return x * self.shape.layer_multiplier

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return apply(self.norms[name], x) if name in self.norms else x

    def _multiply(self, name: str, x: torch.Tensor, dtype) -> torch.Tensor:
        weight, bias = self.products[name]
        if dtype == torch.float32:
            return linear(x, weight, bias)
        out = x @ weight.to(dtype).T
        return out if bias is None else out + bias


def rows(values: str = "normal", layer: Layer | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual row and what was attended, as a layer's output projection takes it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((1, HIDDEN), generator=generator)
    size = HEADS * HEAD_DIM if layer is None else layer.products["o"][0].shape[1]
    attended = torch.randn((1, size), generator=generator)
    if values == "one huge channel":
        x[0, 77] = 3e4
    elif values == "all equal":
        x[:] = attended[:] = 0.7
    elif values == "zeros":
        x[:] = attended[:] = 0
    elif values == "denormal":
        x, attended = x * 1e-40, attended * 1e-40
    return x, attended


def skip_without(kernels: str) -> None:
    if kernels == "reference":
        pytest.skip("the reference has no step of its own")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_step_is_its_operations(kernels, kind, name):
    """Against float64: float32 rounds some thousand times on the way."""
    skip_without(kernels)
    layer = Layer(kind, **VARIANTS[name])
    x, attended = rows(layer=layer)
    for got, expected in zip(layer.run(x, attended), layer.expected(x, attended), strict=True):
        assert got.shape == expected.shape
        # Angles of float32 positions around a thousand are 1e-4 off in the fastest pair.
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("values", ["one huge channel", "all equal", "zeros", "denormal"])
def test_a_step_takes_any_row(kernels, values):
    skip_without(kernels)
    layer = Layer("float32")
    x, attended = rows(values)
    for got, expected in zip(layer.run(x, attended), layer.expected(x, attended), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_quantised_weights_are_multiplied_as_linear_does(kernels, bits, name):
    """A sum in another order may round a row's code to its neighbour: one input of hundreds by a
    127th of its group's greatest, some 1e-6 of the mean square, in either of two products in a row.
    Another weight's codes or scales would cost a hundred times it.
    """
    skip_without(kernels)
    layer = Layer(bits, **VARIANTS[name])
    x, attended = rows(layer=layer)
    expected = layer.expected(x, attended, torch.float32)
    for got, one in zip(layer.run(x, attended), expected, strict=True):
        assert (got - one).square().mean() <= 2e-6 * one.square().mean()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8", "4"])
def test_threads_change_no_bit(kernels, kind):
    """Also where several callers want the threads at once."""
    skip_without(kernels)
    layer, (x, attended) = Layer(kind, has_biases=True), rows()
    expected = layer.run(x, attended)
    before = torch.get_num_threads()

    def run(_: int) -> bool:
        results = (layer.run(x, attended) for _ in range(20))
        return all(torch.equal(a, b) for got in results for a, b in zip(got, expected, strict=True))

    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert run(0)
        with ThreadPoolExecutor(3) as callers:
            assert all(callers.map(run, range(3)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "8", "4", "mxfp4", "affine"])
def test_a_product_of_blocks_is_that_of_each(kernels, kind):
    skip_without(kernels)
    whole = torch.randn((1000, HIDDEN), generator=torch.Generator().manual_seed(1))
    blocks = [whole[start : start + 401] for start in range(0, 1000, 401)]
    if kind.isdigit():
        blocks = [quantise_weight(block, int(kind)) for block in blocks]
    if kind == "mxfp4":
        blocks = [drawn_weight(tuple(block.shape)) for block in blocks]
    if kind == "affine":
        blocks = [drawn_affine(tuple(block.shape)) for block in blocks]
    x, _ = rows()
    native = dispatch.compiled_for()
    got = BlockProduct(native, blocks).run(x)
    assert torch.equal(got, torch.cat([linear(x, block) for block in blocks], 1))
    weight = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    for norm in (Norm(weight, 1.0, 1e-5), Norm(weight, 0.0, 1e-5, weight, takes_mean=True)):
        got = BlockProduct(native, blocks, norm).run(x)
        assert torch.equal(got, torch.cat([linear(normed(x, norm), block) for block in blocks], 1))
    assert isinstance(blocks[0], QuantisedWeight) == (kind != "float32")


@pytest.mark.parametrize("takes_mean", [False, True])
@pytest.mark.parametrize("size", [1, 15, 64, 200, 1000])
def test_rows_are_normed_each_on_its_own(kernels, size, takes_mean):
    """Sums of float32 in whatever order: a few roundings of a thousand terms."""
    x = torch.randn((5, size), generator=torch.Generator().manual_seed(8))
    x[1], x[2], x[3] = 0, x[2] * 1e-20, x[3] * 1e15
    weight, bias = torch.randn((2, size), generator=torch.Generator().manual_seed(9))
    norm = Norm(weight, 1.0, 1e-6, bias if takes_mean else None, takes_mean)
    got = normed(x, norm)
    expected = apply(norm._replace(weight=weight.double()), x.double())
    # A mean is as far off as its terms are great.
    atol = 4e-6 if takes_mean else 1e-25
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=atol)
    for row in range(len(x)):
        assert torch.equal(normed(x[row : row + 1], norm), got[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", ["normal", "one huge channel", "denormal", "not a number"])
def test_keys_and_values_are_stored_as_torch_converts_them(kernels, dtype, values):
    """Also beyond float16's range, below it, and what is no number; around it nothing changes."""
    skip_without(kernels)
    layer = Layer("float32", norms=())
    x, _ = rows(values)
    if values == "not a number":
        x[0, 5] = torch.nan
    elif values == "one huge channel":
        x *= 1e3
    angles = layer.rope.angles(POSITION, 1)
    q, (k, v), _ = layer.step.project(x, *angles, 0.125)
    keys, values_ = (torch.zeros(KV_HEADS, 3, HEAD_DIM, dtype=dtype) for _ in range(2))
    places = [part[0, 1].data_ptr() for part in (keys, values_)]
    place = [*places, 3 * HEAD_DIM * dtype.itemsize]
    got_q, _ = layer.step.project_into(x, *angles, 0.125, place, dtype)
    assert torch.equal(got_q.view(torch.int32), q.view(torch.int32))
    for got, given in ((keys, k), (values_, v)):
        expected = torch.zeros_like(got)
        expected[:, 1] = given[0].to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own():
    """It inherits none; waiting for its parent's would last for ever."""
    code = """
import os, torch
from ebbtide.kernels.matmul import linear
torch.set_num_threads(2)
x, w = torch.ones(1, 512), torch.ones(1024, 512)
before = linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(x, w), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
