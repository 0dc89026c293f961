"""How fast the CPU kernels for pages run, next to what memory allows; products.py has the rest.

    python benchmarks/kernels.py [--threads N] [--isa amx|avx512vnni|avx2|...|reference]

Prints the ceiling first: the read bandwidth of this machine, measured by summing a buffer far
larger than its caches. Then, for each kernel, the bytes it must move per second and the fraction of
the ceiling reached: above 1 where what it writes stays in the caches. For scoring, also what it
costs next to attending to the same tokens. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from chosen_kernels import add_options, choose

from ebbtide.kernels import attention, dispatch, pages
from ebbtide.kernels.layer_attention import Raw, Records, attend_layer
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.means import attend_left_out
from ebbtide.kernels.paged_attention import attend_pages
from ebbtide.kernels.score import score_pages
from ebbtide.kernels.selection import page_shares

BUFFER_BYTES = 512 << 20  # far above any cache


def best_s(call, repeats: int = 5, least_s: float = 0.05) -> float:
    """The best of several runs; each is long enough for the clock.

    With one thread that clock counts only while the thread runs: other programs then take memory
    bandwidth and caches, but no time.
    """
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    start = now()
    call()
    count = max(1, int(least_s / max(now() - start, 1e-9)))
    best = float("inf")
    for _ in range(repeats):
        start = now()
        for _ in range(count):
            call()
        best = min(best, (now() - start) / count)
    return best


def ceiling_bytes_per_s() -> float:
    """The better of a float32 sum of BUFFER_BYTES and a matrix-vector product of as many."""
    buffer = torch.ones(BUFFER_BYTES // 4)
    matrix, x = buffer.view(-1, 4096), torch.ones(4096)
    return BUFFER_BYTES / min(best_s(buffer.sum, 5), best_s(lambda: torch.mv(matrix, x), 5))


LAYOUTS = {
    "5+4 bits": PageLayout(8, 128, 32, 4, key_bits=5, value_bits=4, near_bits=1),
    "8+8 bits": PageLayout(8, 128, 32, 4, key_bits=8, value_bits=8, near_bits=2),
    "full bf16": PageLayout(8, 128, 32, 4, codec="full"),
}


def page_rates(tokens: int = 16384) -> dict[str, float]:
    """Bytes per second, read and written together; unpacked elements are four bytes each.

    A span at a time, into the same float32 buffers, as the engine does.
    """
    rates, span = {}, 1024
    generator = torch.Generator().manual_seed(1)
    for name, layout in LAYOUTS.items():
        k = torch.randn((tokens, layout.kv_heads, layout.head_dim), generator=generator)
        near, records = pages.seal(k, k, layout)
        out = torch.empty((2, layout.kv_heads, span, layout.head_dim))
        step = span // layout.record_tokens

        def unpack_all(near=near, records=records, layout=layout, out=out, step=step):
            for i in range(0, len(records), step):
                pages.unpack(near[i : i + step], records[i : i + step], layout, out[0], out[1])

        moved = near.nbytes + records.nbytes + 2 * k.numel() * 4
        rates[f"unpack {name}"] = moved / best_s(unpack_all)
        part = k[:span]
        moved = 2 * part.nbytes + (near.nbytes + records.nbytes) * span // tokens
        rates[f"seal {name}"] = moved / best_s(lambda p=part, y=layout: pages.seal(p, p, y))
    return rates


def attend_costs(dim: int, codec: dict, num_rows: int, tokens: int = 8192) -> dict[str, float]:
    """Decode attention of one layer, 8 KV heads, over sealed pages and 512 raw tokens, one call."""
    layout = PageLayout(8, dim, 64, 2, **codec)
    generator = torch.Generator().manual_seed(4)
    part = torch.randn((1024, 8, dim), generator=generator)
    near, records = (x.repeat(tokens // 1024, 1) for x in pages.seal(part, part, layout))
    q = torch.randn((8, num_rows, dim), generator=generator) / 8
    raw_k, raw_v = torch.randn((2, 8, 512, dim), generator=generator).bfloat16()
    raw = Raw(raw_k.dtype, [raw_k.data_ptr(), raw_v.data_ptr(), raw_k.stride(0) * 2, 512])
    rows = torch.arange(len(records))
    at = (dispatch.addresses(near, rows), dispatch.addresses(records, rows))
    listed = Records(*at, 1024 // layout.record_tokens, (64, tokens))
    taken_s = best_s(lambda: attend_layer(q, q, listed, layout, raw))
    elements = 2 * (tokens + 512) * 8 * dim
    num_bytes = near.nbytes + records.nbytes + raw_k.nbytes + raw_v.nbytes
    return {
        "ms": 1e3 * taken_s,
        "elements_per_s": elements / taken_s,
        "bytes_per_s": num_bytes / taken_s,
        "flop_per_s": 2 * num_rows * elements / taken_s,
    }


ATTENDED = {
    "4": {"key_bits": 5, "value_bits": 4, "near_bits": 2},
    "6": {"key_bits": 6, "value_bits": 6, "near_bits": 2},
    "8": {"key_bits": 8, "value_bits": 8, "near_bits": 2},
    "full": {"codec": "full"},
}


def attended(ceiling: float, peak: float) -> dict[str, dict[str, float]]:
    """attend_costs for every head_dim, codec and number of query rows of a KV head, printed."""
    costs = {}
    for dim in (64, 128):
        for name, codec in ATTENDED.items():
            for num_rows in (1, 4, 8):
                cost = attend_costs(dim, codec, num_rows)
                cost["of_bandwidth"] = cost["bytes_per_s"] / ceiling
                cost["of_products"] = cost["flop_per_s"] / peak
                costs[f"{name}, d {dim}, {num_rows} rows"] = cost
                print(
                    f"{f'attend {name}, d {dim}, {num_rows} rows':<36}"
                    f"{cost['bytes_per_s'] / 1e9:8.1f} GB/s   "
                    f"{cost['of_bandwidth']:5.2f} of the ceiling; "
                    f"{cost['elements_per_s'] / 1e9:.1f} G elements/s; "
                    f"{cost['flop_per_s'] / 1e9:.0f} GFLOP/s, "
                    f"{cost['of_products']:.2f} of float32 products; {cost['ms']:.2f} ms"
                )
    return costs


SCORED = {
    f"{kv_heads} heads of {dim}, {near_bits} bits": PageLayout(
        kv_heads, dim, 64, 1, key_bits=8, value_bits=8, near_bits=near_bits, value_means=True
    )
    for kv_heads, dim, near_bits in ((8, 128, 2), (8, 128, 3), (2, 64, 2), (32, 96, 2))
}


def score_costs(layout: PageLayout, num_rows: int, keys: int = 1 << 19) -> dict[str, float]:
    """Scoring one layer's near plane of `keys` keys, and attending to as many tokens in full."""
    generator = torch.Generator().manual_seed(3)
    part = torch.randn((1024, layout.kv_heads, layout.head_dim), generator=generator)
    near, records = pages.seal(part, part, layout)
    copies = keys // layout.kv_heads // len(part)
    arena = near.repeat(copies, 1)
    rows = torch.arange(len(arena))
    q = torch.randn((layout.kv_heads, num_rows, layout.head_dim), generator=generator) / 8
    scores = score_pages(q, arena, rows, layout)
    shares = page_shares(scores.log_mass, q.new_zeros(q.shape[:2]))
    chosen = torch.arange(0)
    score_s = best_s(lambda: score_pages(q, arena, rows, layout))
    means_s = best_s(
        lambda: attend_left_out(shares, scores.unevenness, chosen, arena, rows, layout)
    )
    attend_s = best_s(lambda: attend_pages(q, near, records, layout)) * copies
    return {
        "near_bytes_per_s": arena.nbytes / score_s,
        "elements_per_s": keys * layout.head_dim / score_s,
        "share_of_attending": score_s / attend_s,
        "means_share_of_attending": means_s / attend_s,
    }


def compute_rates() -> dict[str, float]:
    """FLOP per second of what is bound by arithmetic: a prefill cell's attention."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn((2, 4 * 512, 64), generator=generator)
    k, v = torch.randn((2, 2, 1024, 64), generator=generator)
    return {
        "attend 512 rows": 4 * q.numel() * 1024 / best_s(lambda: attention.attend(q, k, v)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--attention", action="store_true", help="decode attention alone")
    options = parser.parse_args()
    kernels = choose(options)

    ceiling = ceiling_bytes_per_s()
    print(f"{'read bandwidth, the ceiling':<36}{ceiling / 1e9:8.1f} GB/s")
    moved = {} if options.attention else page_rates()
    for name, rate in moved.items():
        print(f"{name:<36}{rate / 1e9:8.1f} GB/s   {rate / ceiling:5.2f} of the ceiling")
    square = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / best_s(lambda: square @ square)
    print(f"{'a product of 1024 x 1024 float32':<36}{peak / 1e9:8.1f} GFLOP/s")
    attention_costs = {
        name: {key: float(f"{value:.3g}") for key, value in one.items()}
        for name, one in attended(ceiling, peak).items()
    }
    if options.attention:
        print(json.dumps({"kernels": kernels, "attention": attention_costs}))
        return
    scored = {}
    for name, layout in SCORED.items():
        for num_rows in (1, 4, 8):
            cost = scored[f"{name}, {num_rows} rows"] = score_costs(layout, num_rows)
            print(
                f"{f'score {name}, {num_rows} rows':<36}"
                f"{cost['near_bytes_per_s'] / 1e9:8.1f} GB/s   "
                f"{cost['near_bytes_per_s'] / ceiling:5.2f} of the ceiling; "
                f"{cost['elements_per_s'] / 1e9:.1f} G elements/s; "
                f"{cost['share_of_attending']:.3f} of attend_pages, "
                f"its means {cost['means_share_of_attending']:.3f}"
            )
    computed = compute_rates()
    for name, rate in computed.items():
        print(f"{name:<36}{rate / 1e9:8.1f} GFLOP/s")
    report = {
        "kernels": kernels,
        "threads": options.threads,
        "read_bytes_per_s": round(ceiling),
        "bytes_per_s": {name: round(rate) for name, rate in moved.items()},
        "product_flop_per_s": round(peak),
        "attention": attention_costs,
        "scoring": {
            name: {key: float(f"{value:.3g}") for key, value in one.items()}
            for name, one in scored.items()
        },
        "flop_per_s": {name: round(rate) for name, rate in computed.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
