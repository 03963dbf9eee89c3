"""Profiles: the log to everybody's taste, with the vectors of the index in force."""

from __future__ import annotations

import hashlib
import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.pipeline.index import index_folder, index_id
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import profiles as profiling
from vlm4rec_spark.storage import schemas


def profiles(context: RunContext, result: StageResult) -> None:
    settings = context.config.profiles
    log, items = context.log(), context.read(schemas.ITEMS)
    touched = _touched(context)
    bots = profiling.bots(log, settings.bot_events_per_day)
    users = log.select("user_id").distinct().count()
    figures = first_row(
        log.join(bots, "user_id", "left_semi").agg(F.countDistinct("user_id"), F.count(F.lit(1)))
    )
    theirs = log if touched is None else log.join(touched, on="user_id", how="left_semi")
    rows = profiling.histories(theirs, items, settings)
    # Asked of the events and not of the rows: PySpark prints a traceback where it wants no more of a worker's rows.
    counting = theirs.where(F.col("event_type").isin(*settings.event_weights))
    if touched is None and counting.join(items, on="item_id", how="left_semi").isEmpty():
        raise RunError(
            "profiles: no user has an event that counts. Check profiles.event_weights against the event "
            "types of the log. Nothing was written."
        )
    open_searcher = ship(
        context.spark, index_folder(context), context.config.index.broadcast_gb, Searcher.open
    )
    made = profiling.with_embedding(rows, context.config.representation, open_searcher)
    changed = users if touched is None else touched.count()
    with context.reporter.progress("building profiles", changed):
        if touched is None:
            context.tables.replace(schemas.PROFILES, made)
        else:
            context.tables.revise(
                schemas.PROFILES, touched, context.tables.staged(schemas.PROFILES, made)
            )
            context.tables.unstage(schemas.PROFILES)
            touched.unpersist()
    result.ok = context.tables.read(schemas.PROFILES).count()
    result.skipped = users - result.ok
    result.details = {
        "representation": context.config.representation,
        "shape": settings.shape,
        "bot_users": str(figures[0]),
        "bot_events": str(figures[1]),
        "users_without_history": str(result.skipped - figures[0]),
        "users_rebuilt": str(changed),
        "made_by": _made_by(context),
        "embeddings": _embeddings_version(context),
        "version": _profiles_version(context),
    }


def _touched(context: RunContext) -> DataFrame | None:
    """user_id of those whose profile may have changed since the last run, persisted; None where that may be anybody.

    By the change feeds: users of new events, of events on items that have come, gone or got another vector, and of ids
    that turned out to be somebody's.
    """
    runs = context.tables.read(schemas.RUNS)
    last = context.last("profiles")
    if last is None or last["details"].get("made_by") != _made_by(context):
        return None
    # A run that was killed may have written by other settings, and not recorded itself.
    if last["details"].get("version") != _profiles_version(context):
        return None
    # What is older may be gone from the feeds.
    hours = context.config.maintain.retention_hours / 2
    old = (
        runs.where((F.col("run_id") == last["run_id"]) & (F.col("stage") == "profiles"))
        .select(
            F.col("started_at") < F.current_timestamp() - F.make_interval(hours=F.lit(int(hours)))
        )
        .first()
    )
    versions, embeddings = last["versions"], last["details"].get("embeddings", "")
    if old is None or old[0] or not embeddings or not {"interactions", "items"} <= set(versions):
        return None
    if ("identities" in versions) != context.tables.exists(schemas.IDENTITIES):
        return None
    came = context.tables.changed_since(schemas.ITEMS, versions["items"])
    came = came.where(F.col("_change_type").isin("insert", "delete"))
    vectors = context.tables.changed_since(schemas.EMBEDDINGS, int(embeddings)).where(
        (F.col("representation") == context.config.representation)
        & (F.col("encoder_id") == context.encoder_id())
    )
    items = came.select("item_id").unionByName(vectors.select("item_id")).distinct()
    log = context.log()
    by_items = log.join(items, on="item_id", how="left_semi").select("user_id")
    new_events = context.tables.changed_since(schemas.INTERACTIONS, versions["interactions"])
    touched = context.identified(new_events).select("user_id").unionByName(by_items)
    if "identities" in versions:
        changed = context.tables.changed_since(schemas.IDENTITIES, versions["identities"])
        both = F.explode(F.array("anonymous_id", "user_id")).alias("user_id")
        touched = touched.unionByName(changed.select(both))
    touched = touched.distinct().persist()
    if touched.count() * 2 > context.tables.read(schemas.PROFILES).count():
        touched.unpersist()
        return None  # rewriting all is cheaper than a merge of most
    return touched


def _made_by(context: RunContext) -> str:
    """What profiles depend on besides tables; where it is another, all are made again."""
    content = [
        context.config.profiles.model_dump(mode="json"),
        context.config.representation,
        context.encoder_id(),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _profiles_version(context: RunContext) -> str:
    return str(context.tables.versions([schemas.PROFILES]).get("profiles", ""))


def _embeddings_version(context: RunContext) -> str:
    """Of the table that the index in force was built from; "" where no run tells."""
    runs = context.tables.read(schemas.RUNS).where(
        (F.col("stage") == "index") & (F.col("status") == "ok")
    )
    ours = runs.where(F.col("details")["index_id"] == Searcher.open(index_folder(context)).index_id)
    last = ours.orderBy(F.desc("started_at")).select(F.col("versions")["embeddings"]).first()
    return str(last[0]) if last and last[0] is not None else ""


def inputs_fingerprint(context: RunContext) -> object:
    return [
        context.config.profiles.model_dump(mode="json"),
        context.config.representation,
        index_id(context),
    ]
