"""`ebbtide cache`: what Ebbtide keeps on this machine's disks, how much it is, and its removal."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ebbtide import errors, format_size

from .cache_items import KINDS, Item, cache_folders, find_items, going_bytes, remove_items, sweep
from .run import Run
from .shared_options import with_shared_options
from .values import show_duration

EPILOG = """Examples:

ebbtide cache ls

ebbtide cache du --json

ebbtide cache gc                                  what dead processes left

ebbtide cache purge conversations/trip            one conversation

ebbtide cache purge prefixes                      the pages of what was read

ebbtide cache purge prefixes/0123456789ab         those of one text; what another shares stays

ebbtide cache purge --yes                         all that you wrote or asked; no models

Models belong to the cache of the Hugging Face hub; 'hf cache' removes them."""

WhatArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="WHAT",
        help="Kinds, or KIND/NAME as ls prints them. Default: everything but models.",
        show_default=False,
    ),
]


@with_shared_options
def ls(run: Run) -> None:
    """List what is kept, with sizes."""
    items = find_items(run.settings.spill_dir)
    if run.terminal.as_json:
        run.terminal.result({"schema": 1, "items": [item.to_dict() for item in items]})
        return
    now_s = time.time()
    for item in items:
        age = show_duration(max(0.0, now_s - item.changed_s))
        tokens = "" if item.num_tokens is None else f"  {item.num_tokens:,} tokens"
        size = format_size(item.num_bytes)
        run.terminal.answer(f"{size:>10}  {age:>12} ago  {item.label}{tokens}\n")
    if not items:
        run.terminal.note("Nothing is kept.")


@with_shared_options
def du(run: Run) -> None:
    """Show how much is kept, by kind, and where."""
    items = find_items(run.settings.spill_dir)
    totals = {kind: sum(i.num_bytes for i in items if i.kind == kind) for kind in KINDS}
    folders = cache_folders(run.settings.spill_dir)
    if run.terminal.as_json:
        run.terminal.result(
            {
                "schema": 1,
                "kinds": {
                    kind: {"bytes": totals[kind], "folder": folders.get(kind)} for kind in KINDS
                },
                "total_bytes": sum(totals.values()),
            }
        )
        return
    for kind in KINDS:
        count = sum(1 for item in items if item.kind == kind)
        run.terminal.answer(
            f"{format_size(totals[kind]):>10}  {kind:<14} {count:>4}  {folders.get(kind) or '-'}\n"
        )
    run.terminal.answer(f"{format_size(sum(totals.values())):>10}  in all\n")


@with_shared_options
def gc(run: Run) -> None:
    """Remove what dead processes left: scratch files, and what was not finished within a day."""
    count, num_bytes = sweep(run.settings.spill_dir)
    if run.terminal.as_json:
        run.terminal.result({"schema": 1, "removed": count, "bytes": num_bytes})
    else:
        run.terminal.answer(f"Removed {count} files, {format_size(num_bytes)}.\n")


@with_shared_options
def purge(
    run: Run,
    what: WhatArgument = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what is kept: conversations, sessions, jobs, typed lines, pages, scratch."""
    items = find_items(run.settings.spill_dir)
    chosen = choose(items, what or [])
    if chosen and not yes:
        _ask(run, chosen, going_bytes(chosen, items))
    total_bytes = remove_items(chosen, items)
    if run.terminal.as_json:
        removed = [item.label for item in chosen]
        run.terminal.result({"schema": 1, "removed": removed, "bytes": total_bytes})
    else:
        run.terminal.answer(f"Removed {len(chosen)} items, {format_size(total_bytes)}.\n")


def choose(items: list[Item], what: list[str]) -> list[Item]:
    """The items that were named. Raises InputError for a name that is none."""
    if not what:
        return [item for item in items if item.kind != "models"]
    chosen: list[Item] = []
    for word in what:
        kind = word.partition("/")[0]
        if kind == "models":
            raise errors.InputError(
                "Models lie in the Hugging Face hub's cache, which other programs share; "
                "'hf cache' removes them."
            )
        if kind not in KINDS:
            kinds = ", ".join(KINDS)
            raise errors.InputError(f"{word!r} is not something that is kept; kinds: {kinds}.")
        found = [item for item in items if word in (item.kind, item.label)]
        if not found and "/" in word:
            raise errors.InputError(
                f"There is no {word!r}; 'ebbtide cache ls' lists what there is."
            )
        chosen += [item for item in found if item not in chosen]
    return chosen


def _ask(run: Run, chosen: list[Item], total_bytes: int) -> None:
    if sys.stdin is None or not sys.stdin.isatty() or run.terminal.as_json:
        raise errors.InputError("Nothing was removed: where nobody can be asked, give --yes.")
    for item in chosen:
        run.terminal.tell(f"  {item.label}  {format_size(item.num_bytes)}")
    stays = total_bytes < sum(item.num_bytes for item in chosen)
    size = format_size(total_bytes) + (" (what others share stays)" if stays else "")
    sys.stderr.write(f"Remove these {len(chosen)} items, {size}? [y/N] ")
    sys.stderr.flush()
    run.signals.working()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        run.terminal.note("Nothing was removed.")
        raise typer.Exit(1)
