"""What a layer of a model may be made of: norms, experts, states, compressed keys and values; and
how files name them. What a whole model is made of stands in model_config.py. Reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod

from ...kernels.layout import padded_head_dim
from ...kernels.recurrence import RecurrentShape
from ...kernels.routing import Groups, Routing

XIELU_PARAMETERS = ("alpha_p", "alpha_n", "beta", "eps")  # of each MLP, mlp.act_fn has them


@dataclass(frozen=True)
class Norms:
    """Where a layer has a norm, by the names that the files give them; None: it has none there."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # of the attention's output, before it joins the residual
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


PLAIN_NORMS = Norms()  # Llama's


@dataclass(frozen=True)
class QueryGrowth:
    """Queries at `position` are multiplied by 1 + beta * log(1 + (position + ahead) // every).
    unturned: only those of layers without positions."""

    beta: float
    every: int
    ahead: int = 0
    unturned: bool = False


@dataclass(frozen=True)
class BesideMlp:
    """Norms of routed experts that stand beside a dense MLP, by the files' names: of what they are
    given, of what they give, and of what the MLP gives, before both are added."""

    before: str
    after: str
    after_mlp: str


@dataclass(frozen=True)
class ExpertLatent:
    """What routed experts are given in place of the residual, and give: `size` numbers. into, out:
    the files' names of the projections before and behind all of them."""

    size: int
    into: str
    out: str

    @property
    def projections(self) -> tuple[str, str]:
        return self.into, self.out


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer: a router chooses some of them for each token.

    count: how many there are; chosen: how many a token goes through; normalised: whether the
    weights of the chosen ones are made to sum to 1. router, gate, up, down: the files' names, {}
    standing for the expert's number. by_sigmoid: scores are sigmoids, each on its own, not shares
    of one whole; bias: the files' name of what is added to them for the choice alone, a matrix of
    one row if bias_is_row; bias_of_scores: whether the choice is by what sigmoids are of, and a
    bias added to that; groups: which limit the choice, None: nothing does; scaling: of the chosen
    ones' weights; least_sum: added to the sum that normalised sigmoids are divided by. shared_size:
    of the expert that every token goes through besides, 0 without one; shared: what its
    projections' names begin with; shared_gate: what says, for each token, how much of it counts,
    None: all; shared_scaling: of what it gives. gate_up: gate and up in one, their rows in turn, in
    place of both; biases: whether router and experts have them. gate is None where MLPs have no
    gates. router_scale: the files' name of what the router's own norm of the residual is multiplied
    with, over sqrt(hidden_size); None: it sees what the experts see. expert_scale: of a factor for
    each chosen expert's weight. beside: None where experts are in the MLP's place. weighs_input:
    whether a chosen expert's weight is of what it is given, not of what it gives.
    """

    count: int
    chosen: int
    intermediate_size: int
    normalised: bool = True
    router: str = "mlp.gate"
    gate: str | None = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    by_sigmoid: bool = False
    bias: str | None = None
    bias_is_row: bool = False
    bias_of_scores: bool = False
    scaling: float = 1.0
    groups: Groups | None = None
    shared_size: int = 0
    shared: str = "mlp.shared_expert"
    shared_gate: str | None = "mlp.shared_expert_gate"
    shared_scaling: float = 1.0
    gate_up: str | None = None
    biases: bool = False
    least_sum: float = 1e-6
    router_scale: str | None = None
    expert_scale: str | None = None
    beside: BesideMlp | None = None
    latent: ExpertLatent | None = None
    sparse_mixer: float | None = None
    weighs_input: bool = False

    @cached_property
    def routed_alone(self) -> Experts:
        """The same without a shared expert and without projections to a latent."""
        return replace(self, latent=None, shared_size=0)

    @cached_property
    def routing(self) -> Routing:
        """How they are chosen."""
        names = (field.name for field in fields(Routing))
        return Routing(**{name: getattr(self, name) for name in names})

    @property
    def inward(self) -> dict[str, int]:
        """What an expert's input is multiplied with: names, and how many outputs each has."""
        if self.gate_up is not None:
            return {self.gate_up: 2 * self.intermediate_size}
        names = (self.up,) if self.gate is None else (self.gate, self.up)
        return dict.fromkeys(names, self.intermediate_size)


@dataclass(frozen=True)
class Stacked:
    """A tensor in which the files hold one of every expert.

    end: of its name; names: ends of those of an expert's own, {} standing for its number, which
    share its rows evenly. by_columns: each expert's rows are inputs, its columns outputs; or the
    files hold it in MXFP4, outputs by inputs, its codes and scales by names that go on with _blocks
    and _scales.
    """

    end: str
    names: tuple[str, ...]
    by_columns: bool = False


@dataclass(frozen=True)
class HeadRows:
    """A tensor in which the files hold rows of every head, some of which are a tensor of ours.

    end: of its name; name: end of ours; shape: of the files'. rows: from .. to, of each head's.
    turned: each head's rows are inputs there and outputs here.
    """

    end: str
    name: str
    shape: tuple[int, int]
    heads: int
    rows: tuple[int, int]
    turned: bool = False


@dataclass(frozen=True)
class Joined:
    """A tensor whose rows the files may hold in several, one behind the other; those of a matrix
    each in a vector. end: of its name; parts: ends of theirs."""

    end: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): a token's keys and values are made of
    `rank` numbers, normed, and of `rope_dim` that turn, which all heads share.

    Each head has nope_dim + rope_dim numbers for a query and value_dim for a value. query_rank: of
    what queries are made of, None: of the layer's input itself. bias: of the projections to those
    few numbers, and of the output. norm_eps: of the norms behind them.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None
    bias: bool = False
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Of the one head that pages hold: what turns, then the latent."""
        return self.rope_dim + self.rank

    @property
    def query_dim(self) -> int:
        """Of a head's query as it is projected."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class ScanShape:
    """Of Mamba's selective scan: each of `channels` has a state of `dim` numbers. rank: of what
    steps are made of. norms: the files' names of what norms that, keys and queries, or ()."""

    channels: int
    dim: int
    rank: int
    norms: tuple[str, ...] = ()

    @property
    def state(self) -> tuple[int, int]:
        return self.dim, self.channels

    @property
    def values(self) -> int:
        """Numbers of a token that it gives."""
        return self.channels


@dataclass(frozen=True)
class Recurrence:
    """What a layer has in place of attention, or beside it: a state of fixed size, which every
    token changes.

    module: the files' name for it. shape: None for a gated short convolution. conv_width: tokens
    that its convolution sees, of `channels` numbers each. by_heads: a token's projections lie head
    by head in two matrices, in_proj_qkvz and in_proj_ba. apart: queries, keys and values have a
    matrix each, in_proj_q, in_proj_k and in_proj_v. few: of how many numbers, by in_proj_z_few and
    in_proj_a_few, the gate and steps are made, 0: of what the layer is given. conv_bias,
    projection_bias, output_bias: whether the convolution and the projections before and behind it
    have biases. has_norm: whether the gated output is normed. input_multiplier: of what it reads;
    multipliers, Mamba-2's alone: of the parts of what is projected (gate, values, keys, queries,
    steps); output_multiplier: of what it adds to the residual, None: that of all that adds to it.
    """

    module: str
    channels: int
    conv_width: int
    shape: RecurrentShape | ScanShape | None = None
    by_heads: bool = False
    apart: bool = False
    few: int = 0
    conv_bias: bool = False
    projection_bias: bool = False
    output_bias: bool = False
    has_norm: bool = True
    input_multiplier: float = 1.0
    multipliers: tuple[float, ...] = ()
    output_multiplier: float | None = None

    @property
    def state_numbers(self) -> tuple[int, int]:
        """Of the convolution's last inputs, and of the matrices: float32 each."""
        matrices = 0 if self.shape is None else prod(self.shape.state)
        return (self.conv_width - 1) * self.channels, matrices

    @property
    def turned_numbers(self) -> int:
        """Of the tensors that the kernels take transposed: the convolution's, a scan's rates."""
        rates = prod(self.shape.state) if isinstance(self.shape, ScanShape) else 0
        return self.channels * self.conv_width + rates


@dataclass(frozen=True)
class AttentionShape:
    """Of one layer's keys and values. keys_are_values: the key projection gives both. num_heads: of
    its queries, None: the model's."""

    kv_heads: int
    head_dim: int
    keys_are_values: bool = False
    num_heads: int | None = None

    @property
    def page_dim(self) -> int:
        """What a head takes where it is attended: see padded_head_dim."""
        return padded_head_dim(self.head_dim)


@dataclass(frozen=True)
class PerLayerInputs:
    """What every layer is given of a token besides the residual: `size` numbers, of a table with so
    many rows and of the token's embedding. Tokens behind the table have its first row."""

    rows: int
    size: int


@dataclass(frozen=True)
class AltUp:
    """Residual streams beside each other, of which layers work on the first. scales_active: whether
    that is multiplied by learnt numbers before it gates a layer's own inputs."""

    streams: int
    scales_active: bool
