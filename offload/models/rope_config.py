"""Which rotary position embedding a model has: read from config.json, fixed for a context length.

Both layouts: `rope_theta` with `rope_scaling`, and `rope_parameters`, which may hold one object for
each kind of layer. Two scalings depend on the length of the text (dynamic, longrope): `fixed_for`
turns them into ones that do not, once, when a session opens. Computes no angle; rope.py does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..errors import BadCheckpoint, UnsupportedModel
from .config_fields import Fields, is_number

_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor", "max_position_embeddings"),
    "proportional": (),
    "longrope": ("original_max_position_embeddings", "max_position_embeddings"),
}
_YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class RopeConfig:
    """kind: default, linear, llama3, yarn, proportional (the first pairs of a whole head turn, the
    others stay), or factors (one divisor for each frequency); dynamic and longrope until they are
    fixed. parameters: that kind's own, by Hugging Face's names.

    share: the part of a head's elements that turn, the first ones. interleaved: element 2i pairs
    with 2i + 1, and not i with i + half. backwards: pairs turn the other way.
    """

    kind: str
    theta: float
    parameters: dict = field(default_factory=dict)
    share: float = 1.0
    interleaved: bool = False
    backwards: bool = False

    def width(self, head_dim: int) -> int:
        """How many elements of a head turn."""
        return int(head_dim * self.share)

    def fixed_for(self, context: int, head_dim: int) -> RopeConfig:
        """The embedding of a text that may reach `context` tokens: a function of the position
        alone. Sources: NTK-aware scaling with a dynamic length; LongRoPE (2402.13753).
        """
        p = self.parameters
        if self.kind == "dynamic":
            most, width = p["max_position_embeddings"], self.width(head_dim)
            times = p["factor"] * max(context, most) / most - (p["factor"] - 1)
            theta = self.theta * times ** (width / (width - 2))
            return replace(self, kind="default", theta=theta, parameters={})
        if self.kind == "longrope":
            original = p["original_max_position_embeddings"]
            length = "long" if context > original else "short"
            factors = p[f"{length}_factor"]
            amplitude = p.get(f"{length}_mscale", p.get("attention_factor"))
            if amplitude is None:
                times = p.get("factor") or p["max_position_embeddings"] / original
                amplitude = math.sqrt(1 + math.log(max(times, 1.0)) / math.log(original))
            fixed = {"factors": tuple(factors), "attention_factor": float(amplitude)}
            return replace(self, kind="factors", parameters=fixed)
        return self


def read_rope(
    get: Fields,
    head_dim: int,
    *,
    layers: str | None = None,
    theta: float = 10000.0,
    share: float | None = None,
    interleaved: bool = False,
) -> RopeConfig:
    """The embedding that config.json describes.

    layers: which object of a rope_parameters that holds one for each kind of layer. theta: where it
    says none. share: the part that turns where it says none; None where the family knows no part.
    Raises BadCheckpoint, UnsupportedModel.
    """
    raw, path = get.raw, get.path
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(given, dict) and layers is not None and isinstance(given.get(layers), dict):
        given = given[layers]
    if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
        raise UnsupportedModel(
            f"{path}: rope_parameters per layer type are not supported by this family: {given}"
        )
    if layers != "sliding_attention":  # which a scaling that stands apart is not of
        _check_one_scaling(get, given)
    kind = _kind(given)
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise UnsupportedModel(
            f"{path}: RoPE scaling {kind!r} is not supported. Supported: {', '.join(_NEEDED)}."
        )
    given_thetas = (given.get("rope_theta"), raw.get("rope_theta"), theta)
    theta = next(value for value in given_thetas if value is not None)
    if not is_number(theta) or theta <= 1:
        raise BadCheckpoint(f"{path}: rope_theta is {theta!r}; expected a number above 1.")
    parameters = {
        k: v
        for k, v in given.items()
        if k not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    }
    _fill_lengths(kind, parameters, raw)
    share = _share(get, given, 1.0 if kind == "proportional" else share)
    if kind == "proportional":
        parameters["partial_rotary_factor"], share = share, 1.0
    rope = RopeConfig(kind, float(theta), parameters, share, interleaved)
    _check(rope, path, head_dim)
    return rope


def _kind(given: dict):
    """What a scaling is called: Phi-3's files have another name for one, and positions of pictures
    and texts are one in a text."""
    kind = given.get("rope_type") or given.get("type") or "default"
    return {"su": "longrope", "mrope": "default"}.get(kind, kind) if isinstance(kind, str) else kind


def _check_one_scaling(get: Fields, given: dict) -> None:
    """Raises UnsupportedModel for a rope_scaling that says other things than the parameters that
    count: it would be passed over without a word."""
    apart = get.raw.get("rope_scaling")
    if not isinstance(apart, dict) or not apart:
        return
    others = {k: v for k, v in apart.items() if k not in ("rope_type", "type")}
    if _kind(apart) != _kind(given) or any(given.get(k, v) != v for k, v in others.items()):
        raise UnsupportedModel(
            f"{get.path}: rope_scaling {apart} and rope_parameters {given} contradict each other. "
            "Say in rope_parameters what is meant, and take rope_scaling out."
        )


def ropes_by_theta(
    get: Fields, rope: RopeConfig, turns: Callable[[int], bool]
) -> tuple[RopeConfig | None, ...]:
    """The same in each layer with the base that layer_rope_theta says, of which 0 stands for no
    positions; without it, in the layers for which turns(layer) is true. Raises BadCheckpoint."""
    thetas = get.per_layer("layer_rope_theta")
    if thetas is None:
        return tuple(rope if turns(layer) else None for layer in range(get.num_layers))
    for theta in thetas:
        if not is_number(theta) or theta < 0 or 0 < theta <= 1:
            raise BadCheckpoint(
                f"{get.path}: layer_rope_theta has {theta!r}; expected 0 or numbers above 1."
            )
    return tuple(replace(rope, theta=float(theta)) if theta else None for theta in thetas)


def _fill_lengths(kind: str, parameters: dict, raw: dict) -> None:
    """Lengths that stand beside the scaling count before those in it; where no original one is
    given, it is the model's.
    """
    names = ("original_max_position_embeddings", "max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        places = (raw.get(names[0]), parameters.get(names[0]), raw.get(names[1]))
        parameters[names[0]] = next((length for length in places if length is not None), None)
    if kind in ("dynamic", "longrope"):
        parameters[names[1]] = raw.get(names[1])


def _share(get: Fields, given: dict, default: float | None) -> float:
    share = given.get("partial_rotary_factor", get.raw.get("partial_rotary_factor"))
    if share is None:
        return 1.0 if default is None else default
    if default is None and share != 1:
        raise UnsupportedModel(
            f"{get.path}: a partial rotary embedding is not supported by this family."
        )
    if not is_number(share) or not 0 < share <= 1:
        raise BadCheckpoint(
            f"{get.path}: partial_rotary_factor is {share!r}; expected a number up to 1."
        )
    return float(share)


def _check(rope: RopeConfig, path, head_dim: int) -> None:
    parameters = rope.parameters
    for name in _NEEDED[rope.kind]:
        value = parameters.get(name)
        if not is_number(value) or value <= 0:
            raise BadCheckpoint(
                f"{path}: RoPE scaling {rope.kind} needs {name} above 0, got {value!r}."
            )
    width = rope.width(head_dim)
    if width % 2 or width < (4 if rope.kind == "dynamic" else 2):
        raise BadCheckpoint(f"{path}: {width} of {head_dim} elements of a head cannot turn.")
    for name in _YARN_OPTIONS if rope.kind == "yarn" else ():
        value = parameters.get(name)
        if value is not None and (not is_number(value) or value < 0):
            raise BadCheckpoint(f"{path}: RoPE scaling yarn has {name} {value!r}.")
    if rope.kind == "dynamic" and parameters["factor"] < 1:
        raise BadCheckpoint(f"{path}: RoPE scaling dynamic has a factor below 1.")
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        value = parameters.get(name)
        if (
            not isinstance(value, list)
            or len(value) != width // 2
            or not all(is_number(x) and x > 0 for x in value)
        ):
            raise BadCheckpoint(
                f"{path}: RoPE scaling longrope needs {name}, {width // 2} numbers above 0."
            )
    scales = ("attention_factor", "factor", "short_mscale", "long_mscale")
    options = {"longrope": scales, "proportional": ("factor",)}
    for name in options.get(rope.kind, ()):
        value = parameters.get(name)
        if value is not None and (not is_number(value) or value <= 0):
            raise BadCheckpoint(f"{path}: RoPE scaling {rope.kind} has {name} {value!r}.")
    if rope.kind == "longrope" and parameters["original_max_position_embeddings"] < 2:
        raise BadCheckpoint(f"{path}: RoPE scaling longrope has an original length below 2.")
