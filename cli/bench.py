"""`ebbtide bench`: the machine's ceilings first, then how near a model comes to them.

At each depth a fork of one session reads some more tokens and then decodes some, so that the
numbers belong to that depth and not to the way there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from . import values
from .plan import ModelArgument
from .progress import ProgressDisplay
from .report_file import ReportOption, report_file
from .run import Run
from .shared_options import parsed, with_shared_options

EPILOG = """Examples:

ebbtide bench

ebbtide bench ./model --depths 0,8192,32768 --host-memory 6GiB --json

ebbtide bench ./model --report bench.html         a page with charts"""

_MOST_DEPTHS = 32
# Any ids do, for speed does not depend on them where nothing is guessed; these are in every
# vocabulary and not all the same.
_FIRST_ID, _NUM_IDS, _ID_STRIDE = 10, 240, 7


@with_shared_options
def bench(
    run: Run,
    model_argument: ModelArgument = None,
    depths: Annotated[
        str,
        typer.Option(
            "--depths",
            metavar="N,N,...",
            help="Tokens already read at which to measure. Default: 0,2048,8192.",
            show_default=False,
        ),
    ] = "0,2048,8192",
    prefill_tokens: Annotated[
        str,
        typer.Option(
            "--prefill-tokens",
            metavar="N",
            help="Tokens to read at each depth. Default: 512.",
            show_default=False,
        ),
    ] = "512",
    report: ReportOption = None,
) -> None:
    """Measure reading and writing at several depths, next to what the machine allows.

    Each token by itself: what --draft saves depends on the text.
    """
    run.choose_model(model_argument)
    wanted = _parse_depths(depths)
    num_prefill = parsed(values.whole(1, 2**20), prefill_tokens, "--prefill-tokens")
    num_decode = run.settings.max_new_tokens or 16
    context = run.settings.context or wanted[-1] + num_prefill + num_decode
    with report_file(report) as out, ExitStack() as stack:
        ceilings = _measure_ceilings(run)
        llm = stack.enter_context(run.open_llm(context=context, draft=False, prefix_cache=0))
        rows = []
        for row in _measure(run, llm, wanted, num_prefill, num_decode, ceilings):
            rows.append(row)
            if not run.terminal.as_json:
                run.terminal.answer((_HEADING if len(rows) == 1 else "") + _line(row))
        if run.terminal.as_json:
            run.terminal.result(
                {
                    "schema": 1,
                    "model": llm.model_name,
                    "bandwidth_bytes_per_s": ceilings,
                    "depths": rows,
                    "plan": llm.plan.to_dict(),
                }
            )
        if out is not None:
            from .report import bench_report

            out.commit(bench_report(llm.model_name, rows, llm.plan.to_dict(), ceilings))
            run.terminal.note(f"Wrote {report}.")


def _parse_depths(text: str) -> list[int]:
    parse = values.whole(0, 2**31 - 1)
    found = sorted({parsed(parse, part, "--depths") for part in text.split(",")})
    if len(found) > _MOST_DEPTHS:
        raise typer.BadParameter(f"at most {_MOST_DEPTHS} are measured", param_hint="--depths")
    return found


def _measure_ceilings(run: Run) -> dict[str, float]:
    """Bytes per second that each tier can be read at: no run can be faster.

    The disk's is that of extents at random, which is how pages are read.
    """
    run.calm_libraries()
    import ebbtide

    tell = run.terminal.answer  # which is silent with --json
    run.signals.working()
    tell("ceilings, measured now\n")
    memory = ebbtide.measure_memory()
    # On a busy machine one thread can be faster than all.
    found = {"host": max(memory.all_threads_bytes_per_s, memory.one_thread_bytes_per_s)}
    tell(
        f"  memory {memory.all_threads_bytes_per_s / 1e9:7.2f} GB/s "
        f"with {memory.num_threads} threads, {memory.one_thread_bytes_per_s / 1e9:.2f} with one\n"
    )
    if run.settings.disk_memory != 0:
        disk = ebbtide.measure_disk(run.settings.spill_dir)
        found["disk"] = disk.random_bytes_per_s
        tell(
            f"  disk   {found['disk'] / 1e9:7.2f} GB/s at random, "
            f"{disk.sequential_bytes_per_s / 1e9:.2f} in order, "
            f"{disk.write_bytes_per_s / 1e9:.2f} written ({disk.way}, {disk.num_threads} threads)\n"
        )
    tell("\n")
    return found


def _measure(
    run: Run,
    llm: Any,
    depths: list[int],
    num_prefill: int,
    num_decode: int,
    ceilings: dict[str, float],
) -> Iterable[dict[str, Any]]:
    """A row per depth, as soon as it is known."""
    with ProgressDisplay(run.terminal) as progress:
        llm.on_progress = progress
        session, length = llm.session(), 0
        for depth in depths:
            session.append(_ids(length, depth))
            length = depth
            branch = session.fork()
            began_s = time.perf_counter()
            output = branch.generate(
                _ids(depth, depth + num_prefill),
                max_new_tokens=num_decode,
                eos_token_ids=(),  # an end that the model chooses would cut the measurement
                temperature=0,
            )
            progress.clear()
            elapsed_s = time.perf_counter() - began_s
            branch.close()
            ceiling = ceiling_tokens_per_s(llm.plan, depth + num_prefill, ceilings)
            speed = output.timings["decode_tokens_per_s"]
            yield {
                "depth": depth,
                "prefill_tokens_per_s": output.timings["prefill_tokens_per_s"],
                "decode_tokens_per_s": speed,
                "decode_ceiling_tokens_per_s": ceiling,
                "decode_share_of_ceiling": speed / ceiling if ceiling else None,
                "elapsed_s": elapsed_s,
                "bytes_read": output.kv["bytes_read"],
                "hit_rate": output.kv["hit_rate"],
                "stall_s": output.kv["stall_s"],
                "peak_rss_bytes": output.memory["peak_rss_bytes"],
            }


def _ids(start: int, stop: int) -> list[int]:
    return [_FIRST_ID + i * _ID_STRIDE % _NUM_IDS for i in range(start, stop)]


def ceiling_tokens_per_s(plan: Any, depth: int, ceilings: dict[str, float]) -> float | None:
    """Tokens per second if a token did nothing but read its bytes, one tier after the other.

    The plan knows them for its whole context: pages count in proportion to the depth, but for what
    windows show, and weights whole. None where a tier was not measured.
    """
    seconds = 0.0
    for tier, total_bytes in plan.decode_bytes.items():
        page_bytes = plan.decode_page_bytes.get(tier, 0)
        token_bytes = total_bytes - page_bytes * (1 - min(1.0, depth / plan.context))
        if token_bytes > 0:
            if not ceilings.get(tier):
                return None
            seconds += token_bytes / ceilings[tier]
    return 1 / seconds if seconds else None


_HEADING = (
    f"{'depth':>9} {'read tokens/s':>14} {'write tokens/s':>15} {'ceiling':>9} {'reached':>8}\n"
)


def _line(row: dict[str, Any]) -> str:
    ceiling, share = row["decode_ceiling_tokens_per_s"], row["decode_share_of_ceiling"]
    return (
        f"{row['depth']:>9,} {row['prefill_tokens_per_s']:>14,.1f} "
        f"{row['decode_tokens_per_s']:>15,.2f} "
        + (f"{ceiling:>9,.1f} {100 * share:>7.0f} %\n" if ceiling else f"{'-':>9} {'-':>8}\n")
    )
