"""What config.json says about weights that are quantised in the files: which format they have, and
which formats are refused, with what to do instead.

Sizes of groups, and which modules are quantised, say the tensors themselves: packed_modules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import BadCheckpoint, UnsupportedModel
from .config_fields import MOST_ROWS, load_json

_READ = (
    "Ebbtide reads AWQ (gemm), GPTQ of 4 or 8 bits, compressed-tensors (integers of 4 or 8 bits, "
    "float8) and FP8. Use the model in one of these, or the unquantised one: --weight-bits 8 or 4 "
    "quantises it while loading"
)
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")


@dataclass(frozen=True)
class Quantisation:
    """How the quantised tensors of a folder are packed.

    method: awq, gptq, compressed-tensors or fp8. bits: of codes; 0 where each tensor tells.
    group_size: inputs that share a scale; 0: all, or each tensor tells. is_symmetric: zeros are the
    middle of the codes. has_order: inputs belong to groups in an order of their own. zeros_less:
    what was taken from a zero before it was written. block: outputs and inputs that share a scale
    of float8, where that is neither all of them nor one.
    """

    method: str
    bits: int = 0
    group_size: int = 0
    is_symmetric: bool = False
    has_order: bool = False
    zeros_less: int = 0
    block: tuple[int, int] | None = None


def read_quantisation(raw: dict, path: Path, own: str | None) -> Quantisation | None:
    """Of a config.json; None where nothing is quantised, or only by the family's `own` method.
    Raises UnsupportedModel, BadCheckpoint.
    """
    said = raw.get("quantization_config") or raw.get("compression_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else said
    if method == own and own is not None:
        return None
    if not isinstance(said, dict) or not isinstance(method, str) or method not in _METHODS or own:
        raise _refused(path, str(method))
    return _METHODS[method](said, path)


def _refused(path: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{path}: the checkpoint is already quantised ({what[:80]}). {_READ}.")


def _awq(said: dict, path: Path) -> Quantisation:
    version = str(said.get("version") or said.get("format") or "gemm").lower()
    bits = said.get("bits", said.get("w_bit"))
    if version != "gemm" or bits != 4:
        raise _refused(path, f"awq, version {version}, {bits} bits")
    size = said.get("group_size", said.get("q_group_size"))
    return Quantisation("awq", 4, _group_size(size, path))


def _gptq(said: dict, path: Path) -> Quantisation:
    bits, size = said.get("bits"), _group_size(said.get("group_size"), path)
    layout = said.get("checkpoint_format") or said.get("format") or "gptq"
    if bits not in (4, 8) or layout not in ("gptq", "gptq_v2") or said.get("dynamic"):
        dynamic = ", dynamic" if said.get("dynamic") else ""
        raise _refused(path, f"gptq, {layout}, {bits} bits{dynamic}")
    flags = {
        name: said.get(name, default) for name, default in (("sym", True), ("desc_act", False))
    }
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise BadCheckpoint(f"{path}: {name} is {flag!r}; expected true or false.")
    return Quantisation(
        "gptq", int(bits), size, flags["sym"], flags["desc_act"], int(layout == "gptq")
    )


def _group_size(said, path: Path) -> int:
    """0 for all inputs."""
    size = -1 if said is None else said
    if type(size) is not int or size == 0 or not -1 <= size <= MOST_ROWS:
        raise BadCheckpoint(f"{path}: group_size is {size!r}; expected a whole number, or -1.")
    return max(size, 0)


def _compressed(said: dict, path: Path) -> Quantisation:
    groups = said.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    groups = [group for group in groups if isinstance(group, dict)]
    formats = {str(of["format"]) for of in (said, *groups) if of.get("format") is not None}
    if len(groups) > 1:
        formats.discard("mixed-precision")
    weights = [group.get("weights") for group in groups]
    weights = [w for w in weights if isinstance(w, dict)]
    for other in sorted(formats):
        if other not in _FORMATS:
            raise _refused(path, f"compressed-tensors, {other}")
    for w in weights:
        bits = w.get("num_bits", 8)
        if bits != 8 and (bits != 4 or w.get("type") != "int"):
            raise _refused(path, f"compressed-tensors, {w.get('type')} of {bits} bits")
    sparsity = said.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise _refused(path, f"compressed-tensors, {sparsity.get('format')}")
    transforms = said.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise _refused(path, "compressed-tensors, with transforms of activations")
    ints = {int(w.get("num_bits", 8)) for w in weights if w.get("type", "int") == "int"}
    if len(ints) > 1:
        raise _refused(path, "compressed-tensors, integers of 4 and of 8 bits")
    blocks = {_block(w.get("block_structure"), path) for w in weights} - {None}
    if len(blocks) > 1:
        raise _refused(path, "compressed-tensors, blocks of several sizes")
    sizes = {_group_size(w.get("group_size") or None, path) for w in weights}
    return Quantisation(
        "compressed-tensors",
        ints.pop() if ints else 0,
        sizes.pop() if len(sizes) == 1 else 0,
        block=blocks.pop() if blocks else None,
    )


def _fp8(said: dict, path: Path) -> Quantisation:
    kind = said.get("fmt") or "e4m3"
    if kind not in ("e4m3", "float8_e4m3fn"):  # MiniMax spells it out
        raise _refused(path, f"fp8, {kind}")
    return Quantisation("fp8", 8, block=_block(said.get("weight_block_size"), path))


def _block(said, path: Path) -> tuple[int, int] | None:
    if said is None:
        return None
    if (
        not isinstance(said, list)
        or len(said) != 2
        or not all(type(n) is int and 0 < n <= MOST_ROWS for n in said)
    ):
        raise BadCheckpoint(f"{path}: blocks of weights are {said!r}; expected two whole numbers.")
    return said[0], said[1]


def _modelopt(said: dict, path: Path) -> Quantisation:
    algorithm = said.get("quant_algo")
    if algorithm != "FP8":
        raise _refused(path, f"modelopt, {algorithm}")
    return Quantisation("fp8", 8)


def with_modelopt(raw: dict, path: Path) -> dict:
    """A config.json's contents, with what ModelOpt writes beside that file where it says nothing of
    quantisation itself. Raises BadCheckpoint."""
    beside = path.with_name("hf_quant_config.json")
    if raw.get("quantization_config") or raw.get("compression_config") or not beside.exists():
        return raw
    said = load_json(beside).get("quantization")
    if not isinstance(said, dict):
        return raw
    return {**raw, "quantization_config": {**said, "quant_method": "modelopt"}}


_METHODS = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
}
