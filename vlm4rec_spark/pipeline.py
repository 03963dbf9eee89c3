"""The wiring: for each stage, read tables, call the stage, write tables, record the run.

The only module that sees both ends of every stage. Knows the order of the stages; knows no terminal.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark import report, schemas, sources
from vlm4rec_spark.caption import plan, worker
from vlm4rec_spark.config import Config
from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.evaluation import evaluate
from vlm4rec_spark.models.embedder import encoder_id
from vlm4rec_spark.models.prompts import load_prompt
from vlm4rec_spark.models.searcher import Searcher
from vlm4rec_spark.schemas import Table
from vlm4rec_spark.sources import Source
from vlm4rec_spark.stages import embed, export, index, ingest, profiles, recommend
from vlm4rec_spark.tables import Tables

STAGES = ("ingest", "caption", "embed", "index", "profiles", "recommend", "evaluate", "export", "report")
"""In the order of `run`: profiles take their vectors from the index artefact, so the index comes first."""


@dataclass
class Outcome:
    """What a stage did, as `runs` keeps it; rows in = ok + failed + skipped."""

    stage: str
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    device_seconds: float | None = None
    details: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rows_in(self) -> int:
        return self.ok + self.failed + self.skipped


@dataclass(frozen=True)
class Voice:
    """How a pipeline speaks: `say` a line; `watch(label, rows)` a Spark job that takes long."""

    say: Callable[[str], None]
    watch: Callable[[str, int], AbstractContextManager[None]]


class Pipeline:
    """The stages of one configuration on one Spark session. Each method is a stage and returns its outcome."""

    def __init__(self, spark: SparkSession, config: Config, voice: Voice):
        self.spark, self.config, self.voice = spark, config, voice
        self.tables = Tables(spark, config.tables)
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"

    def run(self, stages: Sequence[str], done: Callable[[Outcome], None]) -> None:
        """Check what can be checked before any work, then run the stages in order, each recorded as it ends."""
        self.check(stages)
        for stage in stages:
            done(self.stage(stage))

    def check(self, stages: Sequence[str]) -> None:
        """Raise UsageError or RunError for a wrong set-up, with no table touched."""
        if "caption" in stages:
            load_prompt(self.config.caption.prompt)
            self.config.caption.model.model_id()
        if {"embed", "index", "evaluate"} & set(stages):
            self._encoder_id()
        if "ingest" in stages:
            self._sources()
        self.tables.prepare()

    def stage(self, name: str) -> Outcome:
        """Run one stage and record it."""
        work: Callable[[Outcome], None] = getattr(self, f"_{name}")
        outcome, started, clock = Outcome(name), datetime.now(UTC), time.monotonic()
        status = "failed"
        try:
            work(outcome)
            status = "ok"
        finally:
            outcome.seconds = time.monotonic() - clock
            # A stage that failed before it made anything leaves the tables as they were.
            if status == "ok" or outcome.rows_in:
                self._record(outcome, started, status)
        return outcome

    def import_captions(self, source: Source) -> Outcome:
        """Take descriptions from elsewhere: rows of item_id and text stand in for the caption stage."""
        raw = sources.read(self.spark, "import-captions", source)
        for needed in ("item_id", "text"):
            if raw.where(F.col("fields")[needed].isNotNull()).isEmpty():
                raise UsageError(f"import-captions: the source has no column {needed} with a value. Name it with "
                                 f"--column {needed}=NAME.")  # fmt: skip
        self.tables.prepare()
        self._imported_rows = plan.import_rows(raw, self._read(schemas.ITEMS))
        return self.stage("import_captions")

    def _ingest(self, outcome: Outcome) -> None:
        raw_items, raw_events, log_files = self._sources()
        known_items = self.tables.read(schemas.ITEMS)
        counts: dict[str, dict[str, int]] = {}
        items = events = None
        if raw_items is not None:
            items = ingest.parse_items(raw_items)
            counts["items"] = _counts(items)
            if not counts["items"]["ok"]:
                raise RunError("ingest.items: the catalogue has no usable row "
                               f"({counts['items']['rejected']} rejected). Nothing was written.")  # fmt: skip
        if raw_events is not None:
            latest = datetime.now(UTC) + timedelta(days=1)
            events = ingest.parse_interactions(raw_events, latest)
            counts["interactions"] = _counts(events)
            ids = known_items.select("item_id")
            if items is not None:
                ids = ids.union(ingest.taken(items).select("item_id"))
            if counts["interactions"]["ok"] and ingest.taken(events).join(ids, "item_id", "left_semi").isEmpty():
                raise RunError("ingest.interactions: no event is about an item of the catalogue. Check that both use "
                               "the same item_id, and ingest.*.columns. Nothing was written.")  # fmt: skip
        if items is not None:
            updated = ingest.taken(items).withColumn("updated_at", F.current_timestamp())
            self.tables.upsert(schemas.ITEMS, updated)
            self._reject(ingest.rejected(items, "items"))
        if events is not None:
            added = self.tables.insert(schemas.INTERACTIONS, ingest.taken(events))
            counts["interactions"]["skipped"] += counts["interactions"]["ok"] - added
            counts["interactions"]["ok"] = added
            self._reject(ingest.rejected(events, "interactions"))
            self.tables.insert(schemas.FILES, log_files.withColumn("run_id", F.lit(self.run_id)))
        if photos := self._ingest_photos(raw_items):
            counts["photos"] = photos
        for each in counts.values():
            outcome.ok += each["ok"]
            outcome.failed += each["rejected"]
            outcome.skipped += each["skipped"]
        outcome.details = {name: json.dumps(each) for name, each in counts.items()} | self._catalogue_gaps()

    def _ingest_photos(self, raw_items: DataFrame | None) -> dict[str, int] | None:
        settings = self.config.ingest.photos
        items, photos = self.tables.read(schemas.ITEMS), self.tables.read(schemas.PHOTOS)
        files = None
        if settings.folder:
            files = sources.photo_files(self.spark, settings)
        elif settings.path_column and raw_items is not None:
            named = raw_items.select("fields", F.col("fields")[settings.path_column].alias("uri"))
            named = named.where(F.coalesce("uri", F.lit("")) != "")
            rows = ingest.photo_rows(
                named.select(F.col("fields")["item_id"].alias("item_id"), F.lit(0).alias("position"), "uri").distinct(),
                items,
            )
        elif not (settings.bytes_column and raw_items is not None):
            return None
        if files is not None:
            rows = ingest.photo_rows(files, items)
        if settings.folder or settings.path_column:
            total = rows.count()
            bad = rows.where(F.col("reason").isNotNull())
            changed = ingest.changed_photos(rows.where(F.col("reason").isNull()), files, photos)
            with self.voice.watch("reading photos", total):
                read = self.tables.staged(schemas.PHOTOS, ingest.read_photos(changed))
        else:
            if settings.bytes_column not in raw_items.columns:
                raise UsageError(f"ingest.photos.bytes_column: the catalogue has no binary column "
                                 f"{settings.bytes_column!r}.")  # fmt: skip
            read = ingest.photos_in_rows(raw_items, settings.bytes_column).join(
                items.select("item_id"), "item_id", "left_semi"
            ).dropDuplicates(["item_id", "position"])  # fmt: skip
            bad, total = None, read.count()
        good = read.where(F.col("reason").isNull())
        taken = good.count()
        self.tables.upsert(schemas.PHOTOS, good)
        unread = read.where(F.col("reason").isNotNull()).select("item_id", "position", "uri", "reason")
        rejected = unread if bad is None else bad.unionByName(unread)
        self._reject(
            rejected.select(
                F.lit("photos").alias("source"),
                F.to_json(F.struct("item_id", "position", "uri")).alias("row"),
                "reason",
                F.lit(1).cast("bigint").alias("copies"),
            )
        )
        refused = rejected.count()
        self.tables.unstage(schemas.PHOTOS)
        return {"in": total, "ok": taken, "rejected": refused, "skipped": total - taken - refused}

    def _caption(self, outcome: Outcome) -> None:
        settings = self.config.caption
        prompt, model_id = load_prompt(settings.prompt), settings.model.model_id()
        photos, captions = self._read(schemas.PHOTOS), self.tables.read(schemas.CAPTIONS)
        imported = plan.imported_captions(self.tables.read(schemas.ITEM_CAPTIONS), captions)
        wanted = plan.wanted_captions(photos, imported, prompt, model_id, settings)
        pending = plan.photos_to_caption(wanted, photos, captions)
        outcome.versions = self.tables.versions([schemas.PHOTOS, schemas.CAPTIONS, schemas.ITEM_CAPTIONS])
        counted = wanted.agg(F.count(F.lit(1)), F.countDistinct("caption_key")).head()
        todo = pending.count()
        shown = {"model": model_id, "prompt_id": prompt.prompt_id, "photos_wanted": str(counted[0]),
                 "reused": str(counted[1] - todo), "duplicates": str(counted[0] - counted[1])}  # fmt: skip
        outcome.skipped = counted[0] - todo
        failures: dict[str, int] = {}
        if todo:
            self.voice.say(f"captioning {todo:,} photos with {model_id}, reusing {counted[1] - todo:,}")
            began = time.monotonic()
            made = worker.caption_photos(pending, settings, prompt.text, -(-todo // settings.photos_per_task))
            with self.voice.watch("captioning photos", todo):
                rows = self.tables.staged(schemas.CAPTIONS, made)
            seconds = time.monotonic() - began
            self.tables.insert(schemas.CAPTIONS, self._caption_rows(rows, prompt.prompt_id, model_id))
            by_status = {row["status"]: row["count"] for row in rows.groupBy("status").count().collect()}
            outcome.ok = by_status.get("ok", 0)
            outcome.failed = todo - outcome.ok
            bad = rows.where(F.col("status") != "ok").groupBy("error_class").count()
            failures = {row["error_class"]: row["count"] for row in bad.collect()}
            outcome.device_seconds = rows.agg(F.sum("seconds")).head()[0]
            shown |= {name: str(by_status.get(name, 0)) for name in ("ok", "failed", "rejected")}
            shown["photos_per_second"] = f"{todo / seconds:.1f}"
            self.tables.unstage(schemas.CAPTIONS)
        outcome.details = shown | {"failures": json.dumps(failures)}
        now = plan.item_captions(wanted, self.tables.read(schemas.CAPTIONS), imported)
        self.tables.sync(schemas.ITEM_CAPTIONS, now)
        if outcome.failed > settings.max_failed_share * todo:
            raise RunError(f"caption: {outcome.failed} of {todo} photos failed ({failures}), more than "
                           f"caption.max_failed_share = {settings.max_failed_share}. Their errors are in the table "
                           "captions.")  # fmt: skip

    def _caption_rows(self, rows: DataFrame, prompt_id: str, model_id: str) -> DataFrame:
        return rows.select(
            "*",
            F.lit(prompt_id).alias("prompt_id"),
            F.lit(model_id).alias("model"),
            F.lit(None).cast("map<string,string>").alias("attributes"),
            F.current_timestamp().alias("captioned_at"),
            F.lit(self.run_id).alias("run_id"),
        )

    def _import_captions(self, outcome: Outcome) -> None:
        rows = self._imported_rows
        good = rows.where(F.col("reason").isNull())
        outcome.failed = rows.where(F.col("reason").isNotNull()).count()
        total = good.count()
        if not total:
            raise RunError(f"import-captions: no row could be taken, {outcome.failed} were rejected, such as: "
                           f"{rows.select('reason').head()}. Nothing was written.")  # fmt: skip
        new = good.select(
            "caption_key",
            "caption",
            F.lit("imported").alias("status"),
            F.lit(1).alias("attempts"),
            F.current_timestamp().alias("captioned_at"),
            F.lit(self.run_id).alias("run_id"),
            *[F.lit(None).cast(kind).alias(name) for name, kind in (
                ("image_sha256", "string"), ("prompt_id", "string"), ("model", "string"),
                ("attributes", "map<string,string>"), ("input_tokens", "int"), ("output_tokens", "int"),
                ("error_class", "string"), ("error", "string"))],
        )  # fmt: skip
        outcome.ok = self.tables.insert(schemas.CAPTIONS, new)
        outcome.skipped = total - outcome.ok
        mine = good.select("item_id", F.lit(0).alias("position"), "caption_key")
        others = self.tables.read(schemas.ITEM_CAPTIONS).join(mine.select("item_id"), "item_id", "left_anti")
        self.tables.sync(schemas.ITEM_CAPTIONS, mine.unionByName(others))
        self._reject(
            rows.where(F.col("reason").isNotNull())
            .groupBy(F.concat(F.lit("captions "), "source").alias("source"), "row")
            .agg(F.min("reason").alias("reason"), F.count(F.lit(1)).alias("copies"))
        )  # fmt: skip
        outcome.details = {"imported": str(total)}

    def _embed(self, outcome: Outcome) -> None:
        settings, encoder = self.config.embed, self._encoder_id()
        texts = self._texts()
        there = self.tables.read(schemas.EMBEDDINGS)
        outcome.versions = self.tables.versions([schemas.ITEMS, schemas.CAPTIONS, schemas.ITEM_CAPTIONS])
        pending = embed.pending_texts(texts, there, encoder, settings.max_words)
        total, todo = texts.count(), pending.count()
        if todo:
            self.voice.say(f"embedding {todo:,} texts with {encoder}")
            cut = pending.repartition(max(2, -(-todo // 2_000)))
            with self.voice.watch("embedding texts", todo):
                rows = self.tables.staged(schemas.EMBEDDINGS, embed.embed(cut, encoder, settings))
            outcome.ok = rows.count()
            self.tables.upsert(schemas.EMBEDDINGS, rows)
            self.tables.unstage(schemas.EMBEDDINGS)
        outcome.failed = todo - outcome.ok
        outcome.skipped = total - todo
        mine = self.tables.read(schemas.EMBEDDINGS).where(F.col("encoder_id") == encoder)
        figures = mine.groupBy("representation").agg(
            F.count(F.lit(1)).alias("rows"),
            F.countDistinct(F.xxhash64("embedding")).alias("distinct"),
            F.count_if("fallback").alias("fallback"),
        ).collect()  # fmt: skip
        identical = {row["representation"]: row["rows"] - row["distinct"] for row in figures}
        fallback = next((row["fallback"] for row in figures if row["representation"] == "caption"), 0)
        outcome.details = {"encoder_id": encoder, "identical_vectors": json.dumps(identical), "fallback": str(fallback)}

    def _index(self, outcome: Outcome) -> None:
        settings, encoder = self.config.index, self._encoder_id()
        outcome.versions = self.tables.versions([schemas.EMBEDDINGS])
        rows = index.index_rows(self._read(schemas.EMBEDDINGS), self._texts(), self.config.representation, encoder)
        items = rows.count()
        if not items:
            raise RunError(f"index: no item has a {self.config.representation} embedding by {encoder}. Run embed.")
        dimension = rows.select(F.size("embedding")).head()[0]
        need = 2 * items * dimension * 4 / 1e9
        self.voice.say(f"building the index of {items:,} x {dimension} on the driver, needs about {need:.2f} GB there")
        folder = index.build(
            rows.toArrow(), self.config.representation, encoder, Path(settings.folder), settings.scann_from
        )
        searcher = Searcher.open(folder)
        outcome.ok = items
        outcome.details = {
            "index_id": searcher.index_id, "items": str(items), "dimension": str(dimension),
            "approximate": str(searcher.approximate).lower(), "folder": str(folder.resolve()),
            "representation": self.config.representation,
            "bytes": str(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())),
        }  # fmt: skip

    def _profiles(self, outcome: Outcome) -> None:
        settings = self.config.profiles
        log, items = self._read(schemas.INTERACTIONS), self._read(schemas.ITEMS)
        outcome.versions = self.tables.versions([schemas.INTERACTIONS, schemas.ITEMS])
        bots = profiles.bots(log, settings.bot_events_per_day)
        users = log.select("user_id").distinct().count()
        figures = log.join(bots, "user_id", "left_semi").agg(F.countDistinct("user_id"), F.count(F.lit(1))).head()
        rows = profiles.histories(log, items, settings)
        folder = self._index_folder()
        open_searcher = index.ship(self.spark, folder, self.config.index.broadcast_gb)
        with self.voice.watch("building profiles", users):
            self.tables.replace(
                schemas.PROFILES, profiles.with_embedding(rows, self.config.representation, open_searcher)
            )
        outcome.ok = self.tables.read(schemas.PROFILES).count()
        outcome.skipped = users - outcome.ok
        if not outcome.ok:
            raise RunError("profiles: no user has an event that counts. Check profiles.event_weights against the "
                           "event types of the log.")  # fmt: skip
        outcome.details = {
            "representation": self.config.representation, "bot_users": str(figures[0]), "bot_events": str(figures[1]),
            "users_without_history": str(outcome.skipped - figures[0]),
        }  # fmt: skip

    def _recommend(self, outcome: Outcome) -> None:
        settings, k = self.config.recommend, self.config.recommend.k
        rows = self._read(schemas.PROFILES)
        outcome.versions = self.tables.versions([schemas.PROFILES, schemas.ITEMS])
        folder = self._index_folder()
        searcher = Searcher.open(folder)
        other = rows.where(F.col("representation") != self.config.representation)
        if not other.isEmpty():
            raise RunError("recommend: the profiles are of another representation than the index. Run profiles again.")
        withdrawn = [row["item_id"] for row in self.tables.read(schemas.ITEMS).where(~F.col("available"))
                     .select("item_id").collect()]  # fmt: skip
        usable = rows.where(F.col("embedding").isNotNull())
        sample = usable.select("user_id", "embedding", "seen").orderBy(F.xxhash64("user_id"), "user_id")
        eligible = recommend.eligible_items(searcher, withdrawn)
        measured = recommend.calibrate(
            searcher, sample.limit(settings.recall_sample).toArrow(), eligible, k, settings.recall
        )
        words = measured.words(searcher.manifest["leaves"])
        users, total = usable.count(), rows.count()
        self.voice.say(f"recommending for {users:,} users: {words}, recall {measured.recall:.3f} on {measured.users:,}")
        open_searcher = index.ship(self.spark, folder, self.config.index.broadcast_gb)
        lists = recommend.recommend(usable, open_searcher, withdrawn, k, measured.effort).select(
            "*", F.lit(self.run_id).alias("run_id"), F.current_timestamp().alias("generated_at")
        )
        with self.voice.watch("recommending", users):
            self.tables.replace(schemas.RECOMMENDATIONS, lists)
        short = self.tables.read(schemas.RECOMMENDATIONS).where(F.size("items") < k).count()
        outcome.ok, outcome.skipped = users, total - users
        outcome.details = {
            "k": str(k), "users": str(users), "short_lists": str(short), "search": words,
            "recall_promised": str(settings.recall), "recall_measured": f"{measured.recall:.4f}",
            "recall_low": f"{measured.low:.4f}", "index_id": searcher.index_id,
        }  # fmt: skip

    def _evaluate(self, outcome: Outcome) -> None:
        settings, encoder = self.config.evaluate, self._encoder_id()
        there = self._read(schemas.EMBEDDINGS)
        known = {row["representation"] for row in there.select("representation").distinct().collect()}
        if unknown := set(settings.arms) - known - set(evaluate.arms.BASELINES):
            raise RunError(f"evaluate.arms: {', '.join(sorted(unknown))}: neither a baseline "
                           f"({', '.join(evaluate.arms.BASELINES)}) nor a representation of the table embeddings "
                           f"({', '.join(sorted(known))}).")  # fmt: skip
        outcome.versions = self.tables.versions([schemas.INTERACTIONS, schemas.ITEMS, schemas.EMBEDDINGS])
        ours = F.col("representation").isin(*embed.REPRESENTATIONS)
        read = evaluate.Tables(
            self._read(schemas.INTERACTIONS), self._read(schemas.ITEMS), there.where(~ours | (F.col("encoder_id") == encoder))
        )
        rows, outcome.details = evaluate.evaluate(self.spark, read, settings, self.config.profiles, self.voice.say)
        frame = self.spark.createDataFrame([row | {"run_id": self.run_id} for row in rows], schemas.METRICS.schema)
        self.tables.insert(schemas.METRICS, frame)
        outcome.ok = sum(json.loads(split)["users"] for split in outcome.details.values())

    def _export(self, outcome: Outcome) -> None:
        lists = self._read(schemas.RECOMMENDATIONS)
        outcome.versions = self.tables.versions([schemas.RECOMMENDATIONS])
        self.tables.sync(schemas.EXPORT_LONG, export.long(lists, self.tables.read(schemas.ITEMS)))
        self.tables.sync(schemas.EXPORT_WIDE, export.wide(lists))
        outcome.ok = lists.count()

    def _report(self, outcome: Outcome) -> None:
        outcome.details = {"path": str(report.write(self.tables, self.config.report).resolve())}

    def _sources(self) -> tuple[DataFrame | None, DataFrame | None, DataFrame]:
        """Raw catalogue, raw log (of the files that the ledger doesn't hold) and the log files that are new."""
        settings = self.config.ingest
        items = sources.read(self.spark, "ingest.items", settings.items) if settings.items.path else None
        log = settings.interactions
        if not log.path:
            if items is None:
                raise UsageError("ingest: neither ingest.items.path nor ingest.interactions.path is set.")
            return items, None, self.spark.createDataFrame([], schemas.FILES.schema)
        if settings.photos.folder:
            sources.photo_files(self.spark, settings.photos)
        if log.format == "delta":
            return items, sources.read(self.spark, "ingest.interactions", log), self.spark.createDataFrame(
                [], schemas.FILES.schema
            )  # fmt: skip
        files = sources.listing(self.spark, "ingest.interactions", log).select(
            "*", F.lit("interactions").alias("source"), F.sha2(F.lit(log.model_dump_json()), 256).alias("settings_sha256")
        )
        new = self.tables.pending(files, schemas.FILES)
        paths = tuple(row["uri"] for row in new.select("uri").collect())
        events = sources.read(self.spark, "ingest.interactions", log.model_copy(update={"path": paths})) if paths else None
        return items, events, new

    def _catalogue_gaps(self) -> dict[str, str]:
        items, log = self.tables.read(schemas.ITEMS), self.tables.read(schemas.INTERACTIONS)
        photos = self.tables.read(schemas.PHOTOS)
        return {
            "unknown_item_events": str(log.join(items, "item_id", "left_anti").count()),
            "items_without_photo": str(items.join(photos, "item_id", "left_anti").count()),
            "untouched_items": str(items.join(log, "item_id", "left_anti").count()),
        }

    def _texts(self) -> DataFrame:
        return embed.item_texts(
            self._read(schemas.ITEMS), self.tables.read(schemas.ITEM_CAPTIONS), self.tables.read(schemas.CAPTIONS)
        )

    def _index_folder(self) -> Path:
        """The folder that the last successful index run of this representation named."""
        built = self.tables.read(schemas.RUNS).where((F.col("stage") == "index") & (F.col("status") == "ok"))
        ours = built.where(F.col("details")["representation"] == self.config.representation)
        last = ours.orderBy(F.desc("started_at")).select(F.col("details")["folder"]).head()
        if last is None:
            raise RunError(f"There is no index of {self.config.representation} embeddings yet. Run: vlm4rec index")
        return Path(last[0])

    def _encoder_id(self) -> str:
        return encoder_id(self.config.embed.encoder, self.config.embed.revision)

    def _read(self, table: Table) -> DataFrame:
        if not self.tables.exists(table):
            raise RunError(f"The table {self.tables.place(table)} isn't there yet. Run the stage that makes it, or "
                           "`vlm4rec run` for all.")  # fmt: skip
        return self.tables.read(table)

    def _reject(self, rows: DataFrame) -> None:
        self.tables.insert(schemas.REJECTED, rows)

    def _record(self, outcome: Outcome, started: datetime, status: str) -> None:
        # The section `spark` stays out: its conf may hold a secret.
        config = self.config.model_dump_json(exclude={"spark"})
        row = (
            self.run_id, outcome.stage, status, outcome.rows_in, outcome.ok, outcome.failed, outcome.skipped,
            outcome.versions, config, started, outcome.seconds, outcome.device_seconds, outcome.details,
        )  # fmt: skip
        self.tables.insert(schemas.RUNS, self.spark.createDataFrame([row], schemas.RUNS.schema))


def _counts(parsed: DataFrame) -> dict[str, int]:
    row = parsed.agg(
        F.count(F.lit(1)), F.count_if(F.col("reason").isNotNull()), F.count_if(F.col("duplicate"))
    ).head()  # fmt: skip
    # A clash in the catalogue is both later in its file's order and rejected.
    clash = parsed.where(F.col("duplicate") & F.col("reason").isNotNull()).count()
    total, rejected, duplicate = (row[0], row[1], row[2] - clash)
    return {"in": total, "ok": total - rejected - duplicate, "rejected": rejected, "skipped": duplicate}
