"""Caption: what a run would do and cost, and the run itself: chunk by chunk, one made while the last is committed."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.caption import plan as planning
from vlm4rec_spark.caption import worker
from vlm4rec_spark.caption.estimate import CaptionPlan, Rates, estimate
from vlm4rec_spark.caption.progress_channel import ProgressServer
from vlm4rec_spark.errors import Resumable, RunError
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row, grouped
from vlm4rec_spark.pipeline.import_captions import caption_rows
from vlm4rec_spark.spark import gpus
from vlm4rec_spark.storage import schemas

_EXAMPLES = 3
_AT_ONCE = 2
"""Halves of a chunk: one whose last photos are being described, and the next, for tasks that are free already."""


@dataclass(frozen=True)
class _Task:
    """What there is to do. `judged` and `queue` are persisted, without any photo's bytes."""

    wish: planning.CaptionSpec
    judged: DataFrame
    queue: DataFrame
    imported: DataFrame
    plan: CaptionPlan


@dataclass
class _Totals:
    """What was committed."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def tried(self) -> int:
        return self.statuses.total()

    @property
    def failed(self) -> int:
        return self.failures.total()


def plan_captions(context: RunContext) -> CaptionPlan:
    """What the caption stage would do now. Reads no photo's bytes and changes nothing."""
    with _task(context) as task:
        return task.plan


def caption(context: RunContext, result: StageResult) -> None:
    with _task(context) as task:
        _caption(context, result, task)


def inputs_fingerprint(context: RunContext) -> object:
    """None where failed captions are to be tried again: then there is something to do whatever the last run found."""
    if context.retry is not None:
        return None
    settings = context.config.caption
    prompt = load_prompt(settings.prompt, settings.language)
    catalogue = context.tables.versions([schemas.ITEMS]) if prompt.fields else {}
    return [settings.model_dump(mode="json"), prompt.text, settings.model.model_id(), catalogue]


def _caption(context: RunContext, result: StageResult, task: _Task) -> None:
    settings, todo, wish = context.config.caption, task.plan, task.wish
    result.details = {
        "model": wish.model_id,
        "prompt_id": wish.prompt.prompt_id,
        "photos_wanted": str(todo.wanted),
        "reused": str(todo.reused + todo.kept),
        "duplicates": str(todo.duplicates),
        "given_up": str(todo.given_up),
        **grouped("reasons", todo.reasons),
    }
    totals, stopped = _Totals(), ""
    if todo.now:
        why = ", ".join(
            f"{reason.replace('_', ' ')} {count:,}" for reason, count in todo.reasons.items()
        )
        context.reporter.info(
            f"captioning {todo.now:,} of {todo.to_caption:,} photos ({why}) with {wish.model_id}"
        )
        began = time.monotonic()
        try:
            stopped = _in_chunks(context, task, totals)
        finally:
            result.ok = totals.statuses["ok"]
            result.failed = totals.failed
            result.skipped = todo.wanted - totals.tried
            result.device_seconds = totals.seconds
            result.details |= _figures(totals, time.monotonic() - began, context)
    else:
        result.skipped = todo.wanted
    left = todo.to_caption - totals.tried
    result.details |= grouped("failures", totals.failures) | {"left": str(left)}
    captions = context.tables.read(schemas.CAPTIONS)
    context.tables.sync(
        schemas.ITEM_CAPTIONS, planning.item_captions(task.judged, captions, task.imported)
    )
    result.complete = (
        not left and context.retry is None and not (totals.failed and _any_again(task, captions))
    )
    if totals.failed > settings.max_failed_share * totals.tried:
        raise RunError(_complaint(context, task, totals, left))
    if stopped:
        raise Resumable(
            f"caption: stopped by {stopped}. {totals.tried:,} photos are done and committed, {left:,} are "
            "left; run the same command again to go on."
        )
    if left:
        context.reporter.info(f"{left:,} photos are left for the next run")


@contextmanager
def _task(context: RunContext) -> Iterator[_Task]:
    settings = context.config.caption
    prompt = load_prompt(settings.prompt, settings.language)
    wish = planning.CaptionSpec(prompt, settings.model.model_id(), settings, context.retry)
    # Frozen, or each commit of a chunk would make the queue anew, without what is done, and with other ranks.
    photos, captions = context.read(schemas.PHOTOS), context.tables.frozen(schemas.CAPTIONS)
    links = context.tables.frozen(schemas.ITEM_CAPTIONS)
    imported = planning.imported_captions(links, captions)
    items = context.read(schemas.ITEMS) if wish.prompt.fields else None
    wanted = planning.wanted_captions(photos, imported, items, wish)
    judged = planning.with_reason(
        wanted, captions, planning.current_captions(links, captions), wish
    ).persist()
    by_reason = {row["reason"]: row["count"] for row in judged.groupBy("reason").count().collect()}
    rates = _rates(context, wish)
    # Only where not all is done at once does the order matter, and counting the log takes a while.
    chunk = _chunk(context, _speed(context, rates))
    several = sum(by_reason.get(reason, 0) for reason in planning.PENDING) > chunk
    budget = settings.budget.photos is not None or settings.budget.money is not None
    log = context.tables.read(schemas.INTERACTIONS) if several or budget else None
    queue = planning.queue(judged, log).persist()
    contents = {row["reason"]: row["count"] for row in queue.groupBy("reason").count().collect()}
    todo = estimate(by_reason, contents, rates, settings.budget, settings.prices)
    ordered = planning.in_order(queue, todo.now, max(1, chunk // _AT_ONCE)).persist()
    try:
        yield _Task(wish, judged, ordered, imported, todo)
    finally:
        for frame in (judged, queue, ordered):
            frame.unpersist()


def _rates(context: RunContext, wish: planning.CaptionSpec) -> Rates:
    """Speed of the last run with this model that had something to do, tokens of its captions; or what is assumed."""
    assumed = wish.settings.assumed
    mine = context.tables.read(schemas.CAPTIONS).where(
        (F.col("model") == wish.model_id) & (F.col("status") == "ok")
    )
    this_prompt = F.col("prompt_id") == wish.prompt.prompt_id
    asked, said = (
        F.coalesce(F.avg(F.when(this_prompt, F.col(name))), F.avg(name))
        for name in ("input_tokens", "output_tokens")
    )
    tokens = first_row(mine.agg(asked, said))
    worked = F.col("rows_ok") + F.col("rows_failed")
    runs = context.tables.read(schemas.RUNS).where(
        (F.col("stage") == "caption")
        & (F.col("details")["model"] == wish.model_id)
        & (F.col("device_seconds") > 0)
        & (worked > 0)
    )
    speed = first_row(runs.agg(F.max_by(worked / F.col("device_seconds"), "started_at")))[0]
    return Rates(
        photos_per_second=speed or assumed.photos_per_second,
        input_tokens=assumed.input_tokens if tokens[0] is None else tokens[0],
        output_tokens=assumed.output_tokens if tokens[1] is None else tokens[1],
        speed="measured" if speed else "assumed",
        tokens="assumed" if tokens[0] is None else "measured",
    )


def _in_chunks(context: RunContext, task: _Task, totals: _Totals) -> str:
    """Caption what the plan says, chunk by chunk, and say what has stopped it before the end: nothing, or a signal.

    A part is committed while the next one is made. Their tasks come in this order, so that no task waits for the
    slowest of the part before. What is made and not committed yet is two parts at most: one chunk.
    """
    todo, began, given, number = task.plan.now, time.monotonic(), 0, 0
    rate = _speed(context, task.plan.rates)
    making: deque[Future[tuple[DataFrame, str]]] = deque()
    with _line(context) as line, _until_told(line) as signals, ThreadPoolExecutor(_AT_ONCE) as pool:
        with context.reporter.progress("captioning photos", todo, lambda: _how_far(line, began)):
            try:
                while making or (given < todo and not line.stop):
                    while given < todo and len(making) < _AT_ONCE and not line.stop:
                        chunk = _chunk(context, rate)
                        size = chunk if todo <= chunk else -(-chunk // _AT_ONCE)
                        ranks = range(given, min(todo, given + size))
                        making.append(
                            pool.submit(_make, context, task, line, ranks, number % _AT_ONCE)
                        )
                        given, number = ranks.stop, number + 1
                    _await(making[0], line, context.config.caption.max_failed_share)
                    _commit(context, task, making.popleft().result(), totals)
                    rate = totals.tried / (time.monotonic() - began)
                    if _too_many(
                        totals.failed, totals.tried, context.config.caption.max_failed_share
                    ):
                        line.stop = True
            except BaseException:
                line.stop = True
                for other in making:
                    with suppress(Exception):
                        _commit(context, task, other.result(), totals)
                raise
        return next(iter(signals), "")


def _speed(context: RunContext, rates: Rates) -> float:
    """Photos per second of all devices, before any is done."""
    return rates.photos_per_second * gpus.slots(context.spark)


def _chunk(context: RunContext, rate: float) -> int:
    """How many photos make a chunk, at so many photos per second."""
    settings = context.config.caption
    return max(_AT_ONCE, min(settings.chunk_photos, int(rate * 60 * settings.chunk_minutes)))


def _make(
    context: RunContext, task: _Task, line: ProgressServer, ranks: range, place: int
) -> tuple[DataFrame, str]:
    """The rows of a part of the queue, written aside, and where."""
    settings = context.config.caption
    part = task.queue.where((F.col("rank") >= ranks.start) & (F.col("rank") < ranks.stop))
    slots = gpus.slots(context.spark)
    # Every slot has something to do, a small run isn't cut into crumbs, and a task that is lost costs little.
    tasks = max(
        min(slots, -(-len(ranks) // settings.batch_size)),
        -(-len(ranks) // settings.photos_per_task),
    )
    photos = planning.with_photos(part, context.read(schemas.PHOTOS))
    job = worker.Job(settings, task.wish.prompt, context.config.ingest.photos.http, line.address)
    made = worker.caption_photos(photos, job, tasks, gpus.profile(context.spark))
    aside = f"_{place}"
    return context.tables.staged(schemas.CAPTIONS, made, aside), aside


def _await(future: Future[tuple[DataFrame, str]], line: ProgressServer, share: float) -> None:
    while not wait([future], timeout=1).done:
        said = line.counts
        if _too_many(said["failed"], said["photos"], share):
            line.stop = True


def _commit(context: RunContext, task: _Task, made: tuple[DataFrame, str], totals: _Totals) -> None:
    rows, part = made
    sums = [
        F.sum(name).alias(name) for name in ("input_tokens", "output_tokens", "seconds", "waited")
    ]
    found = (
        rows.groupBy("status", "error_class").agg(F.count(F.lit(1)).alias("rows"), *sums).collect()
    )
    wish = task.wish
    named = rows.withColumns(
        {"prompt_id": F.lit(wish.prompt.prompt_id), "model": F.lit(wish.model_id)}
    )
    context.tables.insert(
        schemas.CAPTIONS,
        caption_rows(context, named),
        instead_of="old.status IN ('failed', 'rejected')",
    )
    context.tables.unstage(schemas.CAPTIONS, part)
    for row in found:
        totals.statuses[row["status"]] += row["rows"]
        if row["error_class"]:
            totals.failures[row["error_class"]] += row["rows"]
        totals.input_tokens += row["input_tokens"] or 0
        totals.output_tokens += row["output_tokens"] or 0
        totals.seconds += row["seconds"]
        totals.waited += row["waited"]


def _too_many(failed: float, tried: float, share: float) -> bool:
    """Whether more than `share` fail, beyond what chance may bring (three standard deviations of a count)."""
    return failed - 3 * math.sqrt(failed) > share * tried


def _how_far(line: ProgressServer, began: float) -> tuple[float, str]:
    """Photos done, and what there is to say beside their rate."""
    said = line.counts
    worked = said["seconds"] + said["waited"]
    parts = [
        f"{said['tokens'] / (time.monotonic() - began):,.0f} tokens/s",
        f"model idle {said['waited'] / worked:.1%}" if worked else "",
    ]
    parts += [
        f"{name.removeprefix('failed ')} {count:,}"
        for name, count in said.items()
        if name.startswith("failed ")
    ]
    return said["photos"], ", ".join(filter(None, parts))


def _figures(totals: _Totals, seconds: float, context: RunContext) -> dict[str, str]:
    prices = context.config.caption.prices
    worked = totals.seconds + totals.waited
    cost = prices.cost(totals.seconds, totals.input_tokens, totals.output_tokens)
    return {
        **{status: str(totals.statuses[status]) for status in ("ok", "failed", "rejected")},
        "photos_per_second": f"{totals.tried / seconds:.1f}",
        "tokens_per_second": f"{totals.output_tokens / seconds:.1f}",
        "input_tokens": str(totals.input_tokens),
        "output_tokens": str(totals.output_tokens),
        "idle_share": f"{totals.waited / worked:.4f}" if worked else "0",
    } | ({"cost": f"{cost:.6g}"} if prices.any else {})


def _any_again(task: _Task, captions: DataFrame) -> bool:
    """Whether the next run has failures to try again."""
    failed = captions.where(F.col("status").isin("failed", "rejected") & task.wish.again()).select(
        "caption_key"
    )
    return not task.judged.join(failed, on="caption_key", how="left_semi").isEmpty()


def _complaint(context: RunContext, task: _Task, totals: _Totals, left: int) -> str:
    share = context.config.caption.max_failed_share
    named = ", ".join(f"{name} {count:,}" for name, count in totals.failures.most_common())
    worst = min(totals.failures, key=lambda name: (-totals.failures[name], name))
    bad = context.tables.read(schemas.CAPTIONS).where(
        (F.col("run_id") == context.run_id) & (F.col("error_class") == worst)
    )
    some = bad.join(task.queue, on="caption_key", how="inner").orderBy("rank").limit(_EXAMPLES)
    examples = "; ".join(
        f"{row['item_id']}: {' '.join(row['error'].split())[:160]}" for row in some.collect()
    )
    rest = f" Stopped with {left:,} photos to go." if left else ""
    return (
        f"caption: {totals.failed:,} of {totals.tried:,} photos failed ({named}), more than "
        f"caption.max_failed_share = {share}. Such as {examples}.{rest} Their errors are in the table "
        "captions."
    )


@contextmanager
def _line(context: RunContext) -> Iterator[ProgressServer]:
    conf = context.spark.conf
    host = conf.get("spark.driver.host", None) or "127.0.0.1"
    try:
        line = ProgressServer(host, conf.get("spark.driver.bindAddress", None) or "")
    except OSError:  # a name that isn't this machine's own, behind some proxy
        line = ProgressServer("127.0.0.1")
    try:
        yield line
    finally:
        line.close()


@contextmanager
def _until_told(line: ProgressServer) -> Iterator[list[str]]:
    """While this lasts, SIGTERM ends the captioning after the batches at work; it is named in the list then."""
    heard: list[str] = []

    def stop(number: int, frame: object) -> None:
        heard.append(signal.Signals(number).name)
        line.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)
