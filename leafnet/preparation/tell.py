"""What jobs/prepare.py tells of a source and of what became of it."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from leafnet.core import storage, terminal
from leafnet.core.terminal import say
from leafnet.data.shards import SPLITS, ShardIndex
from leafnet.preparation.plan import Plan, commonest
from leafnet.preparation.samples import Listing

REJECTED = "rejected.parquet"
DUPLICATES = "duplicates.parquet"
LOG = "prepare.log"


def say_listing(listing: Listing) -> None:
    """What was found, before anything of it is read."""
    kind = {"folders": "class folders", "parquet": "Parquet", "tars": "WebDataset tars"}
    count = f"{listing.items.num_rows:,} tars"
    if listing.examples is not None:
        count = f"{listing.examples:,} photographs"
    splits = "with splits of its own" if listing.has_splits else "without splits"
    say(
        f"source      {listing.source}: {count}, {megabytes(listing.size)}, "
        f"{kind[listing.layout]} {splits}"
    )
    for note in listing.notes:
        say(note)


def notes_of_pixels(read: pa.Table) -> list[str]:
    """A line for each kind of pixels that are hardly those of a photograph."""
    told = read.filter(pc.is_valid(read["note"])).sort_by("key")
    keys, kinds = told["key"].to_pylist(), told["note"].to_pylist()
    return [
        f"warning: {count:,} photographs, such as {keys[kinds.index(note)]}: {note}"
        for note, count in Counter(kinds).items()
    ]


def _balance(index: ShardIndex, plan: Plan, listing: Listing, read: int) -> str:
    """What became of all that was found."""
    kept = sum(map(index.examples, SPLITS))
    parts = {
        "kept": kept,
        "rejected": plan.rejected.num_rows,
        "dropped": sum(plan.dropped.values()),
    }
    told = " + ".join(f"{count:,} {what}" for what, count in parts.items())
    others = sum(listing.passed_over.values())
    return f"{read:,} photographs = {told}" + (f"; {others:,} other files" if others else "")


def say_results(index: ShardIndex, plan: Plan, listing: Listing, read: int, seconds: float) -> None:
    """What became of it, as tables and lines."""
    splits = [split for split in SPLITS if index.examples(split)]
    rows = [
        [name, *(f"{index.counts[split][name]:,}" for split in splits)]
        for name in index.class_names
    ]
    totals = ["all", *(f"{index.examples(split):,}" for split in splits)]
    say()
    terminal.table("examples", ["class", *splits], [*rows, totals])
    say()
    say(f"found       {_balance(index, plan, listing, read)}")
    rejected = Counter(plan.rejected["reason"].to_pylist())
    told = f"{rejected.total():,} of {read:,}"
    if rejected:
        told += f" ({', '.join(f'{n:,} {reason}' for reason, n in rejected.most_common())}): "
        told += storage.join(index.root, REJECTED)
    say(f"rejected    {told}")
    if rejected:
        say(f"            {commonest(plan.rejected)}")
    kinds = Counter(plan.duplicates["kind"].to_pylist())
    told = ", ".join(f"{kinds[kind]:,} {kind}" for kind in ("exact", "near"))
    if kinds:
        told += f": {storage.join(index.root, DUPLICATES)}"
    say(f"duplicates  {told}")
    why = {"other-split": "kept in another split", "other-label": "also under another label"}
    told = ", ".join(f"{n:,} {why[reason]}" for reason, n in plan.dropped.items() if n)
    if told:
        say(f"dropped     {told}")
    size = sum(shard.bytes for shard in index.shards)
    say(f"shards      {len(index.shards):,}, {megabytes(size)}: {index.root}")
    say(f"fingerprint {index.fingerprint[:16]}")
    say(f"took        {terminal.duration(seconds)}, log: {storage.join(index.root, LOG)}")


def megabytes(size: int) -> str:
    """`size` bytes for people."""
    return f"{size / 1e6:,.1f} MB"
