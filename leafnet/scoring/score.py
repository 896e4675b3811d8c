"""What jobs/score.py does, in the order in which it happens.

    list -> drop what is scored -> read and decode -> network -> rows, kept in parts -> publish

Tasks decode, actors hold the network, and the driver alone writes: whichever process is killed,
what it wrote is complete, and the next start goes on from there.
"""

import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions
from numpy.typing import NDArray

from leafnet.core import lock, storage, terminal
from leafnet.core.errors import EXIT_TOO_MANY_FAILED, UserError
from leafnet.core.lock import Lock
from leafnet.core.terminal import say
from leafnet.distributed import fastest, resources, session
from leafnet.models import bundle, openvino
from leafnet.models.bundle import Bundle
from leafnet.models.engine import measuring, ways
from leafnet.models.rates import Way, correct
from leafnet.reporting import pages
from leafnet.scoring import (
    audits,
    explain,
    fields,
    ledger,
    listing,
    shares,
    telemetry,
    thumbnails,
    units,
)
from leafnet.scoring import rows as scoring_rows
from leafnet.scoring.ledger import Difference
from leafnet.scoring.listing import Listing
from leafnet.scoring.pipeline import Job, Result, batches, scored_batches
from leafnet.scoring.report import write
from leafnet.scoring.settings import ScoreSettings
from leafnet.scoring.sheet import keep_thumbnails, shown
from leafnet.scoring.staging import (
    Counts,
    Staging,
    adopt,
    find_staging,
    publish,
    staging_root,
    start_staging,
    target,
)

_PART_ROWS = 50_000
_TELLING = 200  # photographs whose rate says whether a measurement was right
_STEADY_S = 5.0  # what came in less time says nothing of the speed
Summary = dict[str, Any]


def run(settings: ScoreSettings) -> None:
    """Score what is new under `settings.images` and publish it as one night.

    Raises:
        UserError: something in the settings or the model is wrong; the output is in use (exit
            code 3); too many photographs failed (exit code 4, the night is published).
    """
    settings = settings.model_copy(
        update={
            "images": storage.absolute(settings.images),
            "out": storage.absolute(settings.out),
            "date": settings.date or datetime.now(UTC).date().isoformat(),
        }
    )
    if f"{settings.out}/".startswith(f"{settings.images.rstrip('/')}/"):
        raise UserError(
            "out-in-images",
            f"--out {settings.out} lies in --images {settings.images}; give --out a folder of its "
            "own",
        )
    model = bundle.load(settings.model)
    # What cannot be run is told before a machine is taken.
    _ways(settings, model, gpu=settings.gpu is True)
    with lock.hold(settings.out, timeout_s=settings.lock_timeout) as held:
        summary = _night(settings, model, held)
    if summary is None:
        telemetry.nothing_new(settings.ray, out=settings.out)
    else:
        _judge(summary, settings.max_failed)


def _judge(summary: Summary, max_failed: float) -> None:
    failed, scored = summary["status"]["failed"], summary["scored"]
    if failed > scored * max_failed / 100:
        raise UserError(
            "too-many-failed",
            f"{failed:,} of {scored:,} photographs failed, more than {max_failed:g} %; the night "
            f"is published, and the reasons are in it: {summary['published']}",
            exit_code=EXIT_TOO_MANY_FAILED,
        )


def _night(settings: ScoreSettings, model: Bundle, held: Lock) -> Summary | None:
    """The summary of what was published; None: there was nothing new."""
    began = time.monotonic()
    out, date = settings.out, str(settings.date)
    root = staging_root(out, model_id=model.model_id, images=settings.images)
    found = find_staging(root)
    summary = None
    if found and storage.exists(target(out, found.date, found.run_id)):
        summary = _finish(found, out)
        say(f"{summary['run_id']} was published and then interrupted; it is complete now")
        found = None
    say(f"model     {model.url}   id {model.model_id}, {len(model.class_names)} classes")
    photographs = listing.look(settings.images)
    difference = ledger.difference(
        photographs.photographs,
        ledger.history(
            ledger.published(out),
            model_id=model.model_id,
            schema=scoring_rows.schema(model.class_names),
        ),
        date=date,
        retries=settings.retries,
    )
    _say_listing(photographs, difference)
    for flag, pattern in (("--field", settings.field), ("--unit", settings.unit)):
        if pattern is not None:
            fields.refuse_no_match(pattern, photographs.photographs, flag=flag)
    listed_s = time.monotonic() - began
    if not difference.todo.any():
        if found:
            found.delete()
        say(f"nothing new: {out} is as it was")
        return summary
    staging = start_staging(root, date=date, number=held.number, found=found)
    terminal.keeps(f"what is scored is kept in {staging.root}")
    # Beside the summary, and there also when the night fails.
    with terminal.log_to(storage.join(out, ledger.RUNS), f"{staging.run_id}.log") as log:
        # Before the work: a Ray that dies takes this process with it, without another word.
        say(f"log       {log}")
        return _work(
            settings, model, photographs, difference, staging, held, {"list": listed_s}, began
        )


def _work(
    settings: ScoreSettings,
    model: Bundle,
    photographs: Listing,
    difference: Difference,
    staging: Staging,
    held: Lock,
    seconds: dict[str, float],
    began: float,
) -> Summary:
    """Score what is to do, and publish it."""
    done = adopt(staging, photographs.photographs, difference)
    missing = difference.todo & ~done
    if done.any():
        say(f"goes on   {done.sum():,} photographs were finished when {staging.run_id} stopped")
    facts: Summary = {
        "run_id": staging.run_id,
        "date": staging.date,
        "images": settings.images,
        "listed": photographs.photographs.num_rows,
        "passed_over": photographs.passed_over,
        "already_done": difference.already_done,
        "tried_again": difference.again,
        "finished_before": int(done.sum()),
    }
    if not missing.any():
        return _publish(settings, model, staging, held, facts, seconds, began)
    began_session = time.monotonic()
    # Until the night is published, for the cluster is told of it.
    with session.session(settings.ray):
        opened_s = time.monotonic() - began_session
        facts |= _score(settings, model, photographs, missing, staging, held, seconds)
        seconds["start"] = seconds.get("start", 0.0) + opened_s
        summary = _publish(settings, model, staging, held, facts, seconds, began)
        values = telemetry.of_night(summary, max_failed=settings.max_failed)
        telemetry.tell(values, out=settings.out)
    return summary


def _say_listing(photographs: Listing, difference: Difference) -> None:
    table = photographs.photographs
    size = pc.sum(table["size"]).as_py()
    told = f", {size / 1e6:,.1f} MB" if size else ""
    say(f"images    {photographs.images}   {table.num_rows:,} photographs{told}")
    for note in photographs.notes:
        say(f"          {note}")
    again = f", of them {difference.again:,} for another time" if difference.again else ""
    if difference.unasked:
        say(
            f"          {difference.unasked:,} scored before are gone, or could not be asked for "
            "their version: left for another night"
        )
    new = int(difference.todo.sum())
    say(f"tonight   {new:,} to score{again}; {difference.already_done:,} are done already")


def _score(
    settings: ScoreSettings,
    model: Bundle,
    photographs: Listing,
    missing: NDArray[np.bool_],
    staging: Staging,
    held: Lock,
    seconds: dict[str, float],
) -> Summary:
    """Score the `missing` photographs into `staging`; what to tell of it."""
    began = time.monotonic()
    numbered = photographs.photographs.append_column("place", pa.array(np.arange(len(missing))))
    chosen = numbered.filter(pa.array(missing)).combine_chunks()
    with session.session(settings.ray) as found:
        nodes = session.with_room(found, settings.gpu, settings.workers, settings.ray)
        pool = resources.machines(
            nodes,
            settings.gpu,
            actors=settings.workers,
            cpus_per_decode=settings.cpus_per_decode,
        )
        allowed = _ways(settings, model, gpu=pool.gpus > 0)
        engine, precision, why = fastest.choose(
            allowed,
            gpu=pool.gpus > 0,
            weights=(model.convolutions, model.int8),
            cpus=pool.cpus_per_actor,
            **measuring(allowed, image_size=model.image_size, threads=pool.threads_per_actor),
        )
        batch_size = resources.batch_size(settings.batch_size, gpus=pool.gpus)
        job = Job(
            image_size=model.image_size,
            stack=batch_size * batches(batch_size, model.image_size, len(chosen), pool.actors),
            max_pixels=settings.max_megapixels * 1_000_000,
            batch_size=batch_size,
            engine=engine,
            precision=precision,
            model_id=model.model_id,
            run_id=staging.run_id,
            start=uuid.uuid4().hex[:16],
            class_names=model.class_names,
            views=settings.tta,
            explain=settings.explain,
        )
        device = resources.device(pool.gpus)
        workers = f"{pool.actors} worker{'s' * (pool.actors > 1)}"
        say(f"device    {device}, {workers}, {job.engine} in {job.precision} ({why})")
        seconds["start"] = time.monotonic() - began
        facts = _keep_results(
            chosen,
            scored_batches(chosen, model, job, pool),
            staging,
            held,
            every_s=settings.keep_every,
            shared=len(nodes) == 1,
        )
        seconds["score"] = time.monotonic() - began - seconds["start"]
        if not pool.gpus and len(chosen) >= _TELLING:
            correct(
                f"{engine} {precision}",
                facts["images_per_second"]["network_by_a_worker"] * settings.tta,
                image_size=model.image_size,
                threads=pool.threads_per_actor,
            )
    return facts | {"device": device, "workers": pool.actors, "batch_size": batch_size}


def _keep_results(
    chosen: pa.Table,
    results: Iterator[Result],
    staging: Staging,
    held: Lock,
    *,
    every_s: float,
    shared: bool,
) -> Summary:
    """Keep every result in a part of `staging`; the engine that ran and images/s by stage.

    Args:
        chosen: the listed photographs, with their places.
        results: of all of them, in any order.
        staging: where the rows are kept.
        held: checked before each write.
        every_s: seconds between parts.
        shared: every machine of the cluster is known to see the same local files.

    Raises:
        UserError: another job has the output; photographs are on this machine's disk alone.
        RuntimeError: a photograph of `chosen` did not come back, or came twice.
    """
    places = chosen["place"].to_numpy()
    seen = np.zeros(len(places), bool)
    waiting: list[pa.Table] = []
    decode_s = network_s = 0.0
    began = kept = time.monotonic()
    first: tuple[float, int] | None = None
    engines = set()

    def keep() -> None:
        held.check()
        staging.add(thumbnails.keep_wanted(pa.concat_tables(waiting)))
        waiting.clear()

    with terminal.progress("score", len(places)) as advance:
        for result in results:
            at = np.searchsorted(places, result.places)
            if seen[at].any():
                raise RuntimeError(f"{chosen['image'][at[seen[at]][0]]} was scored twice")
            seen[at] = True
            if not shared:
                _refuse_unshared(result.rows)
            waiting.append(result.rows)
            decode_s += result.decode_s
            network_s += result.network_s
            engines.add((result.engine, result.precision))
            advance(len(at))
            now = time.monotonic()
            first = first or (now, len(at))
            if now - kept >= every_s or sum(map(len, waiting)) >= _PART_ROWS:
                keep()
                kept = now
        if waiting:
            keep()
    if not seen.all():
        raise RuntimeError(f"{(~seen).sum():,} of {len(seen):,} photographs did not come back")
    now, count = time.monotonic(), len(places)
    rates = {
        "decode_by_a_task": count / max(decode_s, 1e-9),
        "network_by_a_worker": count / max(network_s, 1e-9),
        "from_start_to_end": count / (now - began),
    }
    if first is not None and now - first[0] > _STEADY_S:
        rates["after_the_first_stack"] = (count - first[1]) / (now - first[0])
    return {
        "engine": ", ".join(sorted({engine for engine, _ in engines})),
        "precision": ", ".join(sorted({precision for _, precision in engines})),
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
    }


def _refuse_unshared(rows: pa.Table) -> None:
    """Refuse local photographs that other machines of the cluster do not have."""
    missing = rows.filter(pc.starts_with(rows["reason"], "not-found"))
    for image in missing["image"].to_pylist():
        if storage.is_local(image) and Path(image).is_file():
            raise UserError(
                "images-not-shared",
                f"{image} is on this machine but not on all machines of the cluster; give --images "
                "as a URL or on a shared disk",
            )


def _ways(settings: ScoreSettings, model: Bundle, *, gpu: bool) -> list[Way]:
    return ways(
        engine=settings.engine,
        precision=settings.precision,
        gpu=gpu,
        has_int8=model.int8 is not None,
        installed=openvino.installed(),
    )


# What was made of the night


def _explain(settings: ScoreSettings, model: Bundle, staging: Staging, held: Lock) -> None:
    """Keep aside where the model sees its label in the photographs that the report will show.

    By TensorFlow in one task on CPUs, whatever scored the night: they are few. The rows are all
    kept by now, and what goes wrong here costs the maps and not the night.
    """
    began = time.monotonic()
    rows = shown(staging)
    if rows is None or thumbnails.SEEN not in rows.column_names:
        return
    # Those of a start before this one may have been told to keep none.
    rows = rows.filter(pc.is_valid(rows[thumbnails.SEEN])).select(
        ["image", "version", "label", "width", "height", thumbnails.SEEN]
    )
    if not rows.num_rows:
        return
    try:
        with session.session(settings.ray) as found:
            nodes = session.with_room(found, False, "auto", settings.ray)
            machines = resources.machines(nodes, False)
            task = ray.remote(num_cpus=machines.cpus_per_actor, max_retries=0)(explain.run)
            made: pa.Table = ray.get(
                task.remote(
                    rows,
                    model.convolutions,
                    model.head,
                    model.class_names,
                    model.image_size,
                    machines.threads_per_actor,
                )
            )
    except Exception as error:
        traceback.print_exc()
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        told = [*str(cause).splitlines(), ""][0]
        say(f"explain   no activation maps ({type(cause).__name__}: {told})")
        return
    held.check()
    staging.keep_aside(thumbnails.EXPLAINED, made)
    took = terminal.duration(time.monotonic() - began)
    say(f"explain   activation maps of {made.num_rows:,} photographs for review in {took}")


def _publish(
    settings: ScoreSettings,
    model: Bundle,
    staging: Staging,
    held: Lock,
    facts: Summary,
    seconds: dict[str, float],
    began: float,
) -> Summary:
    """Make the night visible, and tell of it."""
    if settings.explain:
        began_explain = time.monotonic()
        _explain(settings, model, staging, held)
        seconds["explain"] = time.monotonic() - began_explain
    began_publish = time.monotonic()
    summary = facts | {
        "published": target(settings.out, staging.date, staging.run_id),
        "model": {
            "url": model.url,
            "model_id": model.model_id,
            "class_names": list(model.class_names),
            "decoder_version": model.description["decoder_version"],
            "trained_at": model.description.get("trained_at"),
            **_validated(model, int8=facts.get("precision") == "int8"),
        },
        "started_at": staging.started_at,
        "settings": settings.model_dump(mode="json"),
        "versions": bundle.versions(),
    }

    def check(counts: Counts) -> None:
        status = {name: counts.status.get(name, 0) for name in ("ok", "review", "failed")}
        if facts["listed"] != facts["already_done"] + counts.rows:
            raise RuntimeError(
                f"listed {facts['listed']:,} photographs, but {facts['already_done']:,} were done "
                f"and there are {counts.rows:,} rows ({status})"
            )
        summary.update(
            scored=counts.rows, status=status, labels=counts.label, reasons=counts.reason
        )
        staging.keep_summary(summary)
        held.check()

    schema = scoring_rows.schema(model.class_names, model_id=model.model_id, run_id=staging.run_id)
    publish(staging, settings.out, schema=schema, check=check)
    keep_thumbnails(staging, settings.out)
    units.keep(settings.out, summary)
    seconds["publish"] = time.monotonic() - began_publish
    seconds["total"] = time.monotonic() - began
    summary |= {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "expected_accuracy": shares.expected_accuracy(summary["published"], summary["model"]),
        "audited_accuracy": audits.newest(settings.out, summary["model"]),
    }
    storage.write_json(_summary_url(settings.out, staging.run_id), summary)
    report = pages.place_of(lambda: write(settings.out, staging.date))
    # Last: until then, the next start does what is missing.
    staging.delete()
    _say_summary(summary, settings.out, report)
    told = ("run_id", "published", "status", "labels", "reasons", "listed", "already_done")
    terminal.result(**{name: summary[name] for name in told}, report=report)
    return summary


def _validated(model: Bundle, *, int8: bool) -> Summary:
    """The model's thresholds, and what validation was like, for the night to be compared with."""
    of = model.description.get("int8", {}) if int8 else model.description
    found = {name: of[name] for name in ("review", "reference") if name in of}
    return found | shares.validated(model.description)


def _finish(staging: Staging, out: str) -> Summary:
    """What is left to do for a night that was killed just after it was published."""
    url = _summary_url(out, staging.run_id)
    try:
        summary: Summary = storage.read_json(url)
    except FileNotFoundError:
        summary = staging.read_summary()
        keep_thumbnails(staging, out)
        units.keep(out, summary)
        storage.write_json(url, summary)
    report = pages.place_of(lambda: write(out, staging.date))
    staging.delete()
    say(f"report    {report}")
    return summary


def _summary_url(out: str, run_id: str) -> str:
    return storage.join(out, ledger.RUNS, f"{run_id}.json")


def _say_summary(summary: Summary, out: str, report: str) -> None:
    scored = summary["scored"]

    def share(count: int) -> str:
        return f"{100 * count / scored:.1f} %"

    rows = [[name, f"{count:,}", share(count)] for name, count in summary["status"].items()]
    say()
    terminal.table(f"night {summary['date']}", ["status", "photographs", "share"], rows)
    for title, counts in (("label", summary["labels"]), ("reason", summary["reasons"])):
        if counts:
            say()
            told = [[name, f"{count:,}", share(count)] for name, count in counts.items()]
            terminal.table("", [title, "photographs", "share"], told)
    status, rates = summary["status"], summary.get("images_per_second", {})
    say()
    say(
        f"listed    {summary['listed']:,} = {summary['already_done']:,} already done + "
        + " + ".join(f"{count:,} {name}" for name, count in status.items())
    )
    if rates:
        rate = rates.get("after_the_first_stack", rates["from_start_to_end"])
        say(
            f"speed     {rate:,.1f} images/s, {summary['engine']} in {summary['precision']}; each "
            f"network {rates['network_by_a_worker']:,.1f}, each decoder "
            f"{rates['decode_by_a_task']:,.1f}"
        )
    say(f"published {summary['published']}")
    say(f"summary   {_summary_url(out, summary['run_id'])}")
    say(f"report    {report}")
    say(f"done in {terminal.duration(summary['seconds']['total'])}")
