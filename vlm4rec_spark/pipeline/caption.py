"""Caption: what a run would do and cost, and the run itself, in parts.

One part is captioned while the part before is committed. Knows the tables; the columns and joins
are `caption.plan`'s, the model is `caption.worker`'s.
"""

import math
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

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
_PARTS = 2
"""Parts of a chunk that run together: the second is for tasks that the first has no photos for."""


@dataclass(frozen=True)
class _Work:
    """What there is to do. `photos` and `queue` are persisted, without any photo's bytes."""

    spec: planning.CaptionSpec
    photos: DataFrame
    """Of `plan.with_reason`."""
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
    starved_seconds: float = 0.0

    @property
    def tried(self) -> int:
        return self.statuses.total()

    @property
    def without_caption(self) -> int:
        return self.failures.total()


def plan_captions(context: RunContext) -> CaptionPlan:
    """What the caption stage would do now. Reads no photo's bytes and changes nothing."""
    with _work(context) as work:
        return work.plan


def caption(context: RunContext, result: StageResult) -> None:
    with _work(context) as work:
        plan = work.plan
        result.details = {
            "model": work.spec.model_id,
            "prompt_id": work.spec.prompt.prompt_id,
            "photos_wanted": str(plan.wanted),
            "reused": str(plan.reused + plan.kept),
            "duplicates": str(plan.duplicates),
            "given_up": str(plan.given_up),
            **grouped("reasons", plan.reasons),
        }
        totals = _Totals()
        signal_name = _caption_queue(context, result, work, totals)
        _finish(context, result, work, totals)
        _raise_if_incomplete(context, work, totals, signal_name)


def inputs_fingerprint(context: RunContext) -> object:
    """None with `--retry-failed`: then there may be work whatever the last run did."""
    if context.retry is not None:
        return None
    spec = caption_spec(context)
    catalogue = context.tables.versions([schemas.ITEMS]) if spec.prompt.fields else {}
    return [spec.settings.model_dump(mode="json"), spec.prompt.text, spec.model_id, catalogue]


def _caption_queue(context: RunContext, result: StageResult, work: _Work, totals: _Totals) -> str:
    """Caption what the plan says; the name of the signal that stopped it, or nothing."""
    plan = work.plan
    if not plan.now:
        result.skipped = plan.wanted
        return ""
    reasons = ", ".join(
        f"{reason.replace('_', ' ')} {count:,}" for reason, count in plan.reasons.items()
    )
    context.reporter.info(
        f"captioning {plan.now:,} of {plan.to_caption:,} photos ({reasons}) "
        f"with {work.spec.model_id}"
    )
    started = time.monotonic()
    try:
        return _in_chunks(context, work, totals)
    finally:
        result.ok = totals.statuses["ok"]
        result.failed = totals.without_caption
        result.skipped = plan.wanted - totals.tried
        result.device_seconds = totals.seconds
        result.details |= _figures(totals, time.monotonic() - started, context)


def _finish(context: RunContext, result: StageResult, work: _Work, totals: _Totals) -> None:
    remaining = work.plan.to_caption - totals.tried
    result.details |= grouped("failures", totals.failures) | {"left": str(remaining)}
    captions = context.tables.read(schemas.CAPTIONS)
    context.tables.sync(
        schemas.ITEM_CAPTIONS, planning.item_captions(work.photos, captions, work.imported)
    )
    result.complete = (
        not remaining
        and context.retry is None
        and not (totals.without_caption and _has_retries(work, captions))
    )


def _raise_if_incomplete(
    context: RunContext, work: _Work, totals: _Totals, signal_name: str
) -> None:
    remaining = work.plan.to_caption - totals.tried
    if totals.without_caption > context.config.caption.max_failed_share * totals.tried:
        raise RunError(_failure_message(context, work, totals, remaining))
    if signal_name:
        raise Resumable(
            f"caption: stopped by {signal_name}. {totals.tried:,} photos are done and committed, "
            f"{remaining:,} are left; run the same command again to go on."
        )
    if remaining:
        context.reporter.info(f"{remaining:,} photos are left for the next run")


@contextmanager
def _work(context: RunContext) -> Iterator[_Work]:
    spec = caption_spec(context)
    # Frozen, or every commit would change the queue and its ranks.
    captions = context.tables.frozen(schemas.CAPTIONS)
    links = context.tables.frozen(schemas.ITEM_CAPTIONS)
    imported = planning.imported_captions(links, captions)
    current = planning.current_captions(links, captions)
    wanted = _wanted(context, imported, spec)
    photos = planning.with_reason(wanted, captions, current, spec).persist()
    by_reason = _count_reasons(photos)
    rates = _rates(context, spec)
    chunk = _chunk_size(context, _initial_speed(context, rates))
    # The order matters only where not all is captioned at once, and counting the log takes a while.
    budget = spec.settings.budget
    pending = sum(by_reason.get(reason, 0) for reason in planning.PENDING)
    in_order = pending > chunk or budget.photos is not None or budget.money is not None
    log = context.tables.read(schemas.INTERACTIONS) if in_order else None
    queue = planning.queue(photos, log).persist()
    plan = estimate(by_reason, _count_reasons(queue), rates, budget, spec.settings.prices)
    ordered = planning.in_order(queue, plan.now, max(1, chunk // _PARTS)).persist()
    try:
        yield _Work(spec, photos, ordered, imported, plan)
    finally:
        for frame in (photos, queue, ordered):
            frame.unpersist()


def caption_spec(context: RunContext) -> planning.CaptionSpec:
    """Of the caption stage's settings. Raises UsageError where there is no such prompt."""
    settings = context.config.caption
    prompt = load_prompt(settings.prompt, settings.language)
    return planning.CaptionSpec(prompt, settings.model.model_id(), settings, context.retry)


def _wanted(context: RunContext, imported: DataFrame, spec: planning.CaptionSpec) -> DataFrame:
    items = context.read(schemas.ITEMS) if spec.prompt.fields else None
    return planning.wanted_captions(context.read(schemas.PHOTOS), imported, items, spec)


def _count_reasons(rows: DataFrame) -> dict[str, int]:
    return {row["reason"]: row["count"] for row in rows.groupBy("reason").count().collect()}


def _rates(context: RunContext, spec: planning.CaptionSpec) -> Rates:
    """Speed of this model's last run, and tokens of its captions; else what the config assumes."""
    assumed = spec.settings.assumed
    speed = _measured_speed(context, spec.model_id)
    input_tokens, output_tokens = _measured_tokens(context, spec)
    return Rates(
        photos_per_second=speed or assumed.photos_per_second,
        input_tokens=assumed.input_tokens if input_tokens is None else input_tokens,
        output_tokens=assumed.output_tokens if output_tokens is None else output_tokens,
        speed="measured" if speed else "assumed",
        tokens="assumed" if input_tokens is None else "measured",
    )


def _measured_tokens(
    context: RunContext, spec: planning.CaptionSpec
) -> tuple[float | None, float | None]:
    """Means of input and output tokens with this prompt, else with any prompt of this model."""
    captions = context.tables.read(schemas.CAPTIONS).where(
        (F.col("model") == spec.model_id) & (F.col("status") == "ok")
    )
    this_prompt = F.col("prompt_id") == spec.prompt.prompt_id
    means = [
        F.coalesce(F.avg(F.when(this_prompt, F.col(name))), F.avg(name))
        for name in ("input_tokens", "output_tokens")
    ]
    input_tokens, output_tokens = first_row(captions.agg(*means))
    return input_tokens, output_tokens


def _measured_speed(context: RunContext, model_id: str) -> float | None:
    """Photos per second of a device in the last run that captioned anything."""
    photos = F.col("rows_ok") + F.col("rows_failed")
    runs = context.tables.read(schemas.RUNS).where(
        (F.col("stage") == "caption")
        & (F.col("details")["model"] == model_id)
        & (F.col("device_seconds") > 0)
        & (photos > 0)
    )
    speed = F.max_by(photos / F.col("device_seconds"), "started_at")
    return first_row(runs.agg(speed))[0]


def _in_chunks(context: RunContext, work: _Work, totals: _Totals) -> str:
    """Caption what the plan says; the name of the signal that stopped it, or nothing."""
    with (
        _progress_server(context) as server,
        _stop_on_sigterm(server) as signals,
        ThreadPoolExecutor(_PARTS) as pool,
    ):
        chunks = _Chunks(context, work, totals, server, pool)
        photos = work.plan.now
        with context.reporter.progress("captioning photos", photos, chunks.progress):
            chunks.run()
        return next(iter(signals), "")


class _StagedPart(NamedTuple):
    """Captions that are written to a staging table and not committed."""

    captions: DataFrame
    name: str


class _Chunks:
    """Captions the queue in parts. A part is committed while the next one is captioned.

    Their tasks start in this order, so no task waits for the slowest of the part before. At most
    two parts, which are one chunk, aren't committed.
    """

    def __init__(
        self,
        context: RunContext,
        work: _Work,
        totals: _Totals,
        server: ProgressServer,
        pool: ThreadPoolExecutor,
    ):
        self._context = context
        self._settings = context.config.caption
        self._work = work
        self._totals = totals
        self._server = server
        self._pool = pool
        self._started = time.monotonic()
        self._running: deque[Future[_StagedPart]] = deque()
        self._parts = 0
        self._next_rank = 0

    def run(self) -> None:
        speed = _initial_speed(self._context, self._work.plan.rates)
        try:
            while self._running or self._has_more():
                while self._has_more() and len(self._running) < _PARTS:
                    self._start(speed)
                self._wait()
                self._commit(self._running.popleft().result())
                speed = self._totals.tried / (time.monotonic() - self._started)
                self._stop_if_failing(self._totals.without_caption, self._totals.tried)
        except BaseException:
            self._server.stop = True
            for part in self._running:
                with suppress(Exception):
                    self._commit(part.result())
            raise

    def progress(self) -> tuple[float, str]:
        """Photos that have a result, and tokens, idle share and failures."""
        counts = self._server.counts
        tokens_per_second = counts["tokens"] / (time.monotonic() - self._started)
        parts = [f"{tokens_per_second:,.0f} tokens/s"]
        if device_seconds := counts["seconds"] + counts["starved_seconds"]:
            parts.append(f"model idle {counts['starved_seconds'] / device_seconds:.1%}")
        parts += [
            f"{name.removeprefix('failed ')} {count:,}"
            for name, count in counts.items()
            if name.startswith("failed ")
        ]
        return counts["photos"], ", ".join(parts)

    def _has_more(self) -> bool:
        return self._next_rank < self._work.plan.now and not self._server.stop

    def _start(self, speed: float) -> None:
        photos = self._work.plan.now
        chunk = _chunk_size(self._context, speed)
        size = chunk if photos <= chunk else -(-chunk // _PARTS)
        ranks = range(self._next_rank, min(photos, self._next_rank + size))
        name = f"_{self._parts % _PARTS}"
        self._running.append(self._pool.submit(self._caption, ranks, name))
        self._next_rank = ranks.stop
        self._parts += 1

    def _caption(self, ranks: range, name: str) -> _StagedPart:
        context = self._context
        rank = F.col("rank")
        part = self._work.queue.where((rank >= ranks.start) & (rank < ranks.stop))
        photos = planning.with_photos(part, context.read(schemas.PHOTOS))
        # Every slot has work, small runs aren't cut too fine, and a lost task costs little.
        batches = -(-len(ranks) // self._settings.batch_size)
        least = -(-len(ranks) // self._settings.photos_per_task)
        tasks = max(min(gpus.slots(context.spark), batches), least)
        http = context.config.ingest.photos.http
        job = worker.Job(self._settings, self._work.spec.prompt, http, self._server.address)
        captions = worker.caption_photos(photos, job, tasks, gpus.profile(context.spark))
        return _StagedPart(context.tables.staged(schemas.CAPTIONS, captions, name), name)

    def _wait(self) -> None:
        while not wait([self._running[0]], timeout=1).done:
            counts = self._server.counts
            self._stop_if_failing(counts["failed"], counts["photos"])

    def _stop_if_failing(self, failed: float, tried: float) -> None:
        """Stop if more than `max_failed_share` fail, beyond three standard deviations."""
        if failed - 3 * math.sqrt(failed) > self._settings.max_failed_share * tried:
            self._server.stop = True

    def _commit(self, part: _StagedPart) -> None:
        sums = ("input_tokens", "output_tokens", "seconds", "starved_seconds")
        by_status = part.captions.groupBy("status", "error_class").agg(
            F.count(F.lit(1)).alias("rows"), *(F.sum(name).alias(name) for name in sums)
        )
        counts = by_status.collect()
        spec = self._work.spec
        made_with = {"prompt_id": F.lit(spec.prompt.prompt_id), "model": F.lit(spec.model_id)}
        tables = self._context.tables
        tables.insert(
            schemas.CAPTIONS,
            caption_rows(self._context, part.captions.withColumns(made_with)),
            overwrite_where="old.status IN ('failed', 'rejected')",
        )
        tables.unstage(schemas.CAPTIONS, part.name)
        totals = self._totals
        for row in counts:
            totals.statuses[row["status"]] += row["rows"]
            if row["error_class"]:
                totals.failures[row["error_class"]] += row["rows"]
            totals.input_tokens += row["input_tokens"] or 0
            totals.output_tokens += row["output_tokens"] or 0
            totals.seconds += row["seconds"]
            totals.starved_seconds += row["starved_seconds"]


def _initial_speed(context: RunContext, rates: Rates) -> float:
    """Photos per second of all devices, before any photo has a result."""
    return rates.photos_per_second * gpus.slots(context.spark)


def _chunk_size(context: RunContext, speed: float) -> int:
    """Photos of a chunk, at this many photos per second."""
    settings = context.config.caption
    photos = int(speed * 60 * settings.chunk_minutes)
    return max(_PARTS, min(settings.chunk_photos, photos))


def _figures(totals: _Totals, seconds: float, context: RunContext) -> dict[str, str]:
    prices = context.config.caption.prices
    device_seconds = totals.seconds + totals.starved_seconds
    figures = {
        **{status: str(totals.statuses[status]) for status in ("ok", "failed", "rejected")},
        "photos_per_second": f"{totals.tried / seconds:.1f}",
        "tokens_per_second": f"{totals.output_tokens / seconds:.1f}",
        "input_tokens": str(totals.input_tokens),
        "output_tokens": str(totals.output_tokens),
        "idle_share": f"{totals.starved_seconds / device_seconds:.4f}" if device_seconds else "0",
    }
    if prices.any:
        cost = prices.cost(totals.seconds, totals.input_tokens, totals.output_tokens)
        figures["cost"] = f"{cost:.6g}"
    return figures


def _has_retries(work: _Work, captions: DataFrame) -> bool:
    """Whether the next run has failures to try again."""
    failed = captions.where(F.col("status").isin("failed", "rejected"))
    keys = failed.where(work.spec.should_retry()).select("caption_key")
    return not work.photos.join(keys, on="caption_key", how="left_semi").isEmpty()


def _failure_message(context: RunContext, work: _Work, totals: _Totals, remaining: int) -> str:
    share = context.config.caption.max_failed_share
    classes = ", ".join(f"{name} {count:,}" for name, count in totals.failures.most_common())
    commonest = min(totals.failures, key=lambda name: (-totals.failures[name], name))
    failed = context.tables.read(schemas.CAPTIONS).where(
        (F.col("run_id") == context.run_id) & (F.col("error_class") == commonest)
    )
    by_rank = failed.join(work.queue, on="caption_key", how="inner").orderBy("rank")
    examples = "; ".join(
        f"{row['item_id']}: {' '.join(row['error'].split())[:160]}"
        for row in by_rank.limit(_EXAMPLES).collect()
    )
    rest = f" Stopped with {remaining:,} photos to go." if remaining else ""
    return (
        f"caption: {totals.without_caption:,} of {totals.tried:,} photos failed ({classes}), more "
        f"than caption.max_failed_share = {share}. Such as {examples}.{rest} Their errors are in "
        "the table captions."
    )


@contextmanager
def _progress_server(context: RunContext) -> Iterator[ProgressServer]:
    conf = context.spark.conf
    host = conf.get("spark.driver.host", None) or "127.0.0.1"
    try:
        server = ProgressServer(host, conf.get("spark.driver.bindAddress", None) or "")
    # The driver's name isn't this machine's own, as behind a proxy.
    except OSError:
        server = ProgressServer("127.0.0.1")
    try:
        yield server
    finally:
        server.close()


@contextmanager
def _stop_on_sigterm(server: ProgressServer) -> Iterator[list[str]]:
    """SIGTERM ends the captioning after the running batches; then the list names the signal."""
    signals: list[str] = []

    def stop(number: int, frame: object) -> None:
        signals.append(signal.Signals(number).name)
        server.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)
