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

from ebbtide import errors

from . import values
from .plan import ModelArgument
from .progress import ProgressDisplay
from .report_file import ReportOption, report_file
from .run import Run
from .shared_options import parsed, with_shared_options

EPILOG = """Examples:

ebbtide bench

ebbtide bench ./model --depths 0,8k,32k --host-memory 6GiB --json

ebbtide bench ./model --report bench.html         a page with charts"""

_MOST_DEPTHS = 32
# Any ids do, for speed does not depend on them where nothing is guessed; these are in every
# vocabulary and not all the same.
_FIRST_ID, _NUM_IDS, _ID_STRIDE = 10, 240, 7
_DISK_S = 1.0  # that the disk is measured for
_EXPERTS = "The ceiling is as if every expert were as likely; those chosen again are not read."
_CACHED = (
    "Weights that are read for each token may come from the system's cache, which cannot be told "
    "to forget them here: there is no ceiling."
)


@with_shared_options
def bench(
    run: Run,
    model_argument: ModelArgument = None,
    depths: Annotated[
        str,
        typer.Option(
            "--depths",
            metavar="N,N,...",
            help="Tokens already read at which to measure. Default: 0,2k,8k.",
            show_default=False,
        ),
    ] = "0,2k,8k",
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
    num_prefill = parsed(values.tokens(1, 2**20), prefill_tokens, "--prefill-tokens")
    num_decode = run.settings.max_new_tokens or 16
    if num_decode < 2:
        raise typer.BadParameter(
            "the time of a token is measured from the one before: 2 or more are needed",
            param_hint=run.settings.origins["max_new_tokens"],
        )
    context = run.settings.context or wanted[-1] + num_prefill + num_decode
    with report_file(report) as out, ExitStack() as stack:
        # Refuses what is no model before anything takes time; loads nothing yet.
        llm = stack.enter_context(run.open_llm(context=context, draft=False, prefix_cache=0))
        ceilings, rows = _measure_ceilings(run), []
        if llm.plan.expert_slots:
            run.terminal.note(_EXPERTS)
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
    found = sorted(set(parsed(values.several(values.tokens(0)), text, "--depths")))
    if len(found) > _MOST_DEPTHS:
        raise typer.BadParameter(f"at most {_MOST_DEPTHS} are measured", param_hint="--depths")
    return found


def _measure_ceilings(run: Run) -> dict[str, float]:
    """Bytes per second that each tier can be read at, by the threads that compute: no run can be
    faster. The disk's is the better of reading in order and at random."""
    run.calm_libraries()
    import torch

    import ebbtide

    tell = run.terminal.answer  # which is silent with --json
    run.signals.working()
    tell("ceilings, measured now\n")
    memory = ebbtide.measure_memory(run.settings.threads or torch.get_num_threads())
    found = {"host": memory.bytes_per_s}
    threads = values.counted(memory.num_threads, "thread")
    tell(f"  memory {memory.bytes_per_s / 1e9:7.2f} GB/s with {threads}\n")
    allowed, folder = run.settings.disk_memory, run.settings.spill_dir
    try:
        disk = ebbtide.measure_disk(folder, seconds=_DISK_S, disk_memory=allowed)
    except errors.DoesNotFit as error:
        run.terminal.note(str(error))
    else:
        found["disk"] = disk.bytes_per_s
        tell(
            f"  disk   {disk.random_bytes_per_s / 1e9:7.2f} GB/s at random, "
            f"{disk.sequential_bytes_per_s / 1e9:.2f} in order, "
            f"{disk.write_bytes_per_s / 1e9:.2f} written ({disk.way}, {disk.num_threads} threads)\n"
        )
        if disk.caveat:
            run.terminal.note(f"The disk's speed is {disk.caveat}.")
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
            stream = branch.stream(
                _ids(depth, depth + num_prefill),
                max_new_tokens=num_decode,
                eos_token_ids=(),  # an end that the model chooses would cut the measurement
                temperature=0,
            )
            token_s, reads_disk = _times(stream, llm)
            progress.clear()
            elapsed_s = time.perf_counter() - began_s
            output = stream.output
            branch.close()
            ceiling = llm.plan.decode_ceiling(depth + num_prefill, ceilings)
            if not reads_disk:
                ceiling = None
                run.terminal.note(_CACHED)
            speed = len(token_s) / sum(token_s) if token_s else 0.0
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


def _times(stream: Any, llm: Any) -> tuple[list[float], bool]:
    """Seconds of each token but the first, whose time is the prompt's; and whether all that they
    read from disk came from there: what the system's cache has of the model's files would be faster
    than any disk."""
    times, reads_disk = [], True
    while True:
        reads_disk = llm.forget_files() and reads_disk
        began_s = time.perf_counter()
        if next(stream, None) is None:
            return times[1:], reads_disk
        times.append(time.perf_counter() - began_s)


def _ids(start: int, stop: int) -> list[int]:
    return [_FIRST_ID + i * _ID_STRIDE % _NUM_IDS for i in range(start, stop)]


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
