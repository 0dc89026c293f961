"""How one page of keys and values lies in bytes: sizes, offsets and what they cost.

    near record   [page][head] [near code planes | key min fp16[d] | key scale fp16[d]
                                | mean of the values fp16[d], if value_means]
    record        [page][head] [far block, padded to 64 bytes | near block, if not resident]
                  padded to 4096 bytes, and to least_record_bytes

    far block, "quantised"   far key planes | value planes | value min fp16[P] | value scale fp16[P]
    far block, "full"        raw keys [P, d] | raw values [P, d]
    where values are the keys, a far block ends behind these

P is page_tokens, d is head_dim. A code of b bits is stored as planes whose widths are the powers of
two that make up b, widest first, the most significant bits in the first plane: 6 is 4 and 2, 3 is 2
and 1. A plane of width w is (P, D) bytes with D = d * w / 8; byte j of a token holds its elements
j, j + D, j + 2D, ..., element j in the lowest bits, so that one shift and mask yields D neighbours.
The near and far bits of a key are two such codes: code = near << far_bits | far.

Knows neither how codes come about (codec.py) nor where the bytes live.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_ALIGN_BYTES = 64  # a cache line
HEAD_ALIGN = 8  # head_dim is a multiple of it
RECORD_ALIGN_BYTES = 4096  # the largest block size that direct reads ask for
FULL_DIGEST_BITS = 8  # the scale in a full page's digest is the box's width over 2**8 - 1
RAW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plane_widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes that store codes of `bits` bits (0..8), most significant first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def align_up(size: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `size`."""
    return -(-size // alignment) * alignment


def padded_head_dim(head_dim: int) -> int:
    """What a head takes in pages, and wherever it is attended, with zeros behind its own numbers:
    these change neither scores nor outputs."""
    return align_up(head_dim, HEAD_ALIGN)


@dataclass(frozen=True)
class PageLayout:
    """The byte layout of one layer's pages. Raises ValueError for what cannot be laid out.

    codec        "quantised", or "full": raw keys and values, where the bits have no meaning
    near_bits    top bits of each key code that stay in the near block, 0..4, fewer than key_bits
    rotate       keys are multiplied by a Hadamard matrix before they are quantised
    near_resident  False: the near block lies in the record and near records are empty
    raw_dtype    what a full page's keys and values are stored as
    value_means  each near block ends with the mean of the page's values; quantised pages only
    shared_from  values are the keys, of which elements from this one on count: no values are stored
                 and value_bits has no meaning. Attention gives the others too, for nobody's use.
                 None: values are stored
    least_record_bytes  records are padded to it, so that layers of different bits share frames
    """

    kv_heads: int
    head_dim: int
    page_tokens: int
    pages_per_record: int = 1
    codec: str = "quantised"
    key_bits: int = 5
    value_bits: int = 4
    near_bits: int = 1
    rotate: bool = False
    near_resident: bool = True
    raw_dtype: torch.dtype = torch.bfloat16
    value_means: bool = False
    shared_from: int | None = None
    least_record_bytes: int = 0

    def __post_init__(self):
        if self.codec not in ("full", "quantised"):
            raise ValueError(f'codec is {self.codec!r}; known are "full" and "quantised"')
        if self.head_dim < 1 or self.head_dim % HEAD_ALIGN:
            raise ValueError(f"head_dim is {self.head_dim}; it must be a multiple of {HEAD_ALIGN}")
        for name in ("kv_heads", "page_tokens", "pages_per_record"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.raw_dtype not in RAW_DTYPES:
            raise ValueError(f"raw_dtype is {self.raw_dtype}; known are {RAW_DTYPES}")
        if self.least_record_bytes < 0 or self.least_record_bytes % RECORD_ALIGN_BYTES:
            raise ValueError(
                f"least_record_bytes is {self.least_record_bytes}; "
                f"it must be a multiple of {RECORD_ALIGN_BYTES}"
            )
        if self.shared_from is not None:
            if not 0 <= self.shared_from < self.head_dim:
                raise ValueError(
                    f"shared_from is {self.shared_from}; it must be 0..{self.head_dim - 1}"
                )
            if self.rotate:
                raise ValueError("values that are the keys are not rotated: rotate must be False")
        if self.codec == "full":
            if self.rotate:
                raise ValueError("full pages hold keys as they are: rotate must be False")
            if self.value_means:
                raise ValueError("full pages have no means of values: value_means must be False")
            return
        if not (1 <= self.key_bits <= 8 and 1 <= self.value_bits <= 8):
            raise ValueError(
                f"key_bits is {self.key_bits}, value_bits {self.value_bits}; both must be 1..8"
            )
        if not 0 <= self.near_bits <= min(4, self.key_bits - 1):
            raise ValueError(
                f"near_bits is {self.near_bits}; it must be 0..4, below key_bits {self.key_bits}"
            )

    @property
    def shares_values(self) -> bool:
        """Whether values are the keys."""
        return self.shared_from is not None

    # --- codes ------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether keys and values are raw, without codes."""
        return self.codec == "full"

    @property
    def box_bits(self) -> int:
        """[min, min + (2**box_bits - 1) * scale] holds every key of a channel."""
        return FULL_DIGEST_BITS if self.is_full else self.key_bits

    @property
    def near_code_bits(self) -> int:
        """Bits of each key code in the near block; 0 for full pages."""
        return 0 if self.is_full else self.near_bits

    @property
    def far_key_bits(self) -> int:
        """Key bits that only the far block holds; 0 for full pages, which hold no codes."""
        return 0 if self.is_full else self.key_bits - self.near_bits

    # --- near block of one page, one head ---------------------------------------------------------

    @property
    def near_codes_bytes(self) -> int:
        """What the codes take in a near block, which they begin."""
        return self._plane_bytes(self.near_code_bits)

    @property
    def key_min_offset(self) -> int:
        """Where key min fp16[d] starts in a near block; key scale fp16[d] follows it."""
        return self.near_codes_bytes

    @property
    def value_mean_offset(self) -> int:
        """Where the mean of the values, fp16[d], starts in a near block; without one, its end."""
        return self.key_min_offset + 4 * self.head_dim

    @property
    def near_head_bytes(self) -> int:
        """A near block: codes, key minimum and scale, and the mean of values if there is one."""
        return self.value_mean_offset + 2 * self.head_dim * self.value_means

    # --- far block of one page, one head ----------------------------------------------------------

    @property
    def value_offset(self) -> int:
        """Where values (planes, or raw) start in a far block; keys start at 0. Of raw ones that are
        the keys, there too."""
        if self.is_full:
            return 0 if self.shares_values else self.raw_bytes
        return self._plane_bytes(self.far_key_bits)

    @property
    def value_min_offset(self) -> int:
        """Where value min fp16[P] starts in a quantised far block; value scale fp16[P] follows."""
        return self.value_offset + self._plane_bytes(self.value_bits)

    @property
    def far_head_used_bytes(self) -> int:
        """A far block without its padding."""
        if self.is_full:
            return self.value_offset + self.raw_bytes
        if self.shares_values:
            return self.value_offset
        return self.value_min_offset + 4 * self.page_tokens

    @property
    def far_head_bytes(self) -> int:
        """A far block, padded to a cache line."""
        return align_up(self.far_head_used_bytes, HEAD_ALIGN_BYTES)

    @property
    def head_stride_bytes(self) -> int:
        """From one head's far block to the next; a near block that is not resident lies between."""
        if self.near_resident:
            return self.far_head_bytes
        return align_up(self.far_head_bytes + self.near_head_bytes, HEAD_ALIGN_BYTES)

    # --- records ----------------------------------------------------------------------------------

    @property
    def record_tokens(self) -> int:
        """Tokens of all pages of a record."""
        return self.pages_per_record * self.page_tokens

    @property
    def record_payload_bytes(self) -> int:
        """A record without the padding at its end."""
        return self.pages_per_record * self.kv_heads * self.head_stride_bytes

    @property
    def record_bytes(self) -> int:
        """A record as it lies in memory and on disk: what is read at once."""
        return max(align_up(self.record_payload_bytes, RECORD_ALIGN_BYTES), self.least_record_bytes)

    @property
    def near_record_bytes(self) -> int:
        """Bytes of one record's near blocks; 0 where they lie in the record."""
        return self.pages_per_record * self.kv_heads * self.near_head_bytes * self.near_resident

    # --- what it costs ----------------------------------------------------------------------------

    @property
    def padding_share(self) -> float:
        """The share of a record's bytes that hold nothing, alignment of heads included."""
        used = self.far_head_used_bytes + self.near_head_bytes * (not self.near_resident)
        return 1 - self.pages_per_record * self.kv_heads * used / self.record_bytes

    @property
    def bits_per_element(self) -> float:
        """Bits for each key or value element, with all parameters, both planes and padding."""
        kinds = 1 if self.shares_values else 2
        elements = kinds * self.record_tokens * self.kv_heads * self.head_dim
        return 8 * (self.record_bytes + self.near_record_bytes) / elements

    @property
    def near_bytes_per_token(self) -> float:
        """Of one layer."""
        return self.near_record_bytes / self.record_tokens

    @property
    def far_bytes_per_token(self) -> float:
        """Of one layer."""
        return self.record_bytes / self.record_tokens

    def _plane_bytes(self, bits: int) -> int:
        return self.page_tokens * self.head_dim * bits // 8

    @property
    def raw_bytes(self) -> int:
        """Of the raw keys of one page and head, or of its values."""
        return self.page_tokens * self.head_dim * self.raw_dtype.itemsize
