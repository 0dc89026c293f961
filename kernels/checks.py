"""Whether the tensors given to a kernel fit its layout; ValueError says which does not, and how.

Knows shapes, dtypes and layouts, and no numbers but those of rows.
"""

from __future__ import annotations

import torch

from .layout import PageLayout


def check_tokens(k, v, layout: PageLayout) -> None:
    """Raises ValueError unless keys and values are those of whole records."""
    heads = (layout.kv_heads, layout.head_dim)
    if k.dim() != 3 or k.shape != v.shape or k.shape[1:] != heads:
        raise ValueError(
            f"keys are {tuple(k.shape)}, values {tuple(v.shape)}; "
            f"both must be (num_tokens, {heads[0]}, {heads[1]})"
        )
    if len(k) % layout.record_tokens:
        raise ValueError(
            f"{len(k)} tokens are not whole records of {layout.record_tokens} tokens each"
        )


def check_records(near, records, layout: PageLayout) -> int:
    """The number of tokens that the records hold. Raises ValueError where the layout differs."""
    num_records = len(records)
    for name, data, size in (
        ("near", near, layout.near_record_bytes),
        ("records", records, layout.record_bytes),
    ):
        if data.shape != (num_records, size) or data.dtype != torch.uint8:
            raise ValueError(
                f"{name} is {data.dtype} {tuple(data.shape)}; "
                f"it must be uint8 {(num_records, size)}"
            )
    return num_records * layout.record_tokens


def check_rows(name: str, frames, rows, record_bytes: int) -> None:
    """Raises ValueError unless `rows` (n,) int64 are rows of frames (num_frames, record_bytes)."""
    if frames.dim() != 2 or frames.shape[1] != record_bytes or frames.dtype != torch.uint8:
        raise ValueError(
            f"{name} is {frames.dtype} {tuple(frames.shape)}; "
            f"it must be uint8 (num_frames, {record_bytes})"
        )
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows of {name} are {rows.dtype} {tuple(rows.shape)}, not int64 (n,)")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(frames):
        raise ValueError(
            f"rows of {name} are {int(rows.min())}..{int(rows.max())}; it has {len(frames)} frames"
        )


def check_queries(q, layout: PageLayout, score_bias, num_tokens: int) -> None:
    """Raises ValueError unless q is (kv_heads, num_rows, head_dim) float32 and the bias fits."""
    if (
        q.dim() != 3
        or q.shape[::2] != (layout.kv_heads, layout.head_dim)
        or q.dtype != torch.float32
    ):
        raise ValueError(
            f"queries are {q.dtype} {tuple(q.shape)}; "
            f"they must be float32 ({layout.kv_heads}, num_rows, {layout.head_dim})"
        )
    shape = (*q.shape[:2], num_tokens)
    if score_bias is not None and score_bias.shape != shape:
        raise ValueError(f"score_bias is {tuple(score_bias.shape)}; it must be {shape}")


def check_same(name: str, given, shape) -> None:
    """Raises ValueError unless `given` is float32 of a shape."""
    if given.shape != tuple(shape) or given.dtype != torch.float32:
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)}; it must be float32 {tuple(shape)}"
        )


def check_positions(sources, num_records: int) -> None:
    """Raises ValueError unless the sources (frames, rows, positions) hold every record once."""
    found = sorted(at for _, _, positions in sources for at in positions.tolist())
    if found != list(range(num_records)) or any(len(s[1]) != len(s[2]) for s in sources):
        raise ValueError(
            f"sources must hold each of the {num_records} records once; their positions are {found}"
        )
