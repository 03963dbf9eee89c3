"""Index and profiles: vectors to the artefact, and with it the log to everybody's taste."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.pipeline.embed import item_texts
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import index as indexing
from vlm4rec_spark.stages import profiles as profiling
from vlm4rec_spark.storage import schemas


def index(run: RunContext, outcome: StageResult) -> None:
    settings, encoder = run.config.index, run.encoder_id()
    rows = indexing.index_rows(
        run.read(schemas.EMBEDDINGS), item_texts(run), run.config.representation, encoder
    )
    items = rows.count()
    if not items:
        raise RunError(
            f"index: no item has a {run.config.representation} embedding by {encoder}. Run embed."
        )
    dimension = first_row(rows.select(F.size("embedding")))[0]
    need = 2 * items * dimension * 4 / 1e9
    run.reporter.info(
        f"building the index of {items:,} x {dimension} on the driver, needs about {need:.2f} GB there"
    )
    folder = build_index(
        rows.toArrow(),
        run.config.representation,
        encoder,
        Path(settings.folder),
        settings.ann_min_items,
        _last(run),
        settings.rebuild_threshold,
    )
    searcher, run.index_folder = Searcher.open(folder), folder
    outcome.ok = items
    outcome.details = {
        "index_id": searcher.index_id,
        "items": str(items),
        "dimension": str(dimension),
        "approximate": str(searcher.approximate).lower(),
        "base": searcher.base,
        "beside_codes": str(len(searcher.fresh)),
        "folder": str(folder.resolve()),
        "representation": run.config.representation,
        "bytes": str(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())),
    }


def _last(run: RunContext) -> Searcher | None:
    """The version in force, on which another may rest."""
    try:
        return Searcher.open(index_folder(run))
    except RunError:
        return None


def profiles(run: RunContext, outcome: StageResult) -> None:
    settings = run.config.profiles
    log, items = run.log(), run.read(schemas.ITEMS)
    touched = _touched(run)
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
    open_searcher = ship(run.spark, index_folder(run), run.config.index.broadcast_gb, Searcher.open)
    made = profiling.with_embedding(rows, run.config.representation, open_searcher)
    changed = users if touched is None else touched.count()
    with run.reporter.progress("building profiles", changed):
        if touched is None:
            run.tables.replace(schemas.PROFILES, made)
        else:
            run.tables.revise(schemas.PROFILES, touched, run.tables.staged(schemas.PROFILES, made))
            run.tables.unstage(schemas.PROFILES)
            touched.unpersist()
    outcome.ok = run.tables.read(schemas.PROFILES).count()
    outcome.skipped = users - outcome.ok
    outcome.details = {
        "representation": run.config.representation,
        "shape": settings.shape,
        "bot_users": str(figures[0]),
        "bot_events": str(figures[1]),
        "users_without_history": str(outcome.skipped - figures[0]),
        "users_rebuilt": str(changed),
        "made_by": _made_by(run),
        "embeddings": _embeddings_version(run),
        "version": _profiles_version(run),
    }


def _touched(run: RunContext) -> DataFrame | None:
    """user_id of those whose profile may have changed since the last run, persisted; None where that may be anybody.

    By the change feeds: users of new events, of events on items that have come, gone or got another vector, and of ids
    that turned out to be somebody's.
    """
    runs = run.tables.read(schemas.RUNS)
    last = run.last("profiles")
    if last is None or last["details"].get("made_by") != _made_by(run):
        return None
    # A run that was killed may have written by other settings, and not recorded itself.
    if last["details"].get("version") != _profiles_version(run):
        return None
    # What is older may be gone from the feeds.
    hours = run.config.maintain.retention_hours / 2
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
    if ("identities" in versions) != run.tables.exists(schemas.IDENTITIES):
        return None
    came = run.tables.changed_since(schemas.ITEMS, versions["items"])
    came = came.where(F.col("_change_type").isin("insert", "delete"))
    vectors = run.tables.changed_since(schemas.EMBEDDINGS, int(embeddings)).where(
        (F.col("representation") == run.config.representation)
        & (F.col("encoder_id") == run.encoder_id())
    )
    items = came.select("item_id").unionByName(vectors.select("item_id")).distinct()
    log = run.log()
    by_items = log.join(items, on="item_id", how="left_semi").select("user_id")
    new_events = run.tables.changed_since(schemas.INTERACTIONS, versions["interactions"])
    touched = run.identified(new_events).select("user_id").unionByName(by_items)
    if "identities" in versions:
        changed = run.tables.changed_since(schemas.IDENTITIES, versions["identities"])
        both = F.explode(F.array("anonymous_id", "user_id")).alias("user_id")
        touched = touched.unionByName(changed.select(both))
    touched = touched.distinct().persist()
    if touched.count() * 2 > run.tables.read(schemas.PROFILES).count():
        touched.unpersist()
        return None  # rewriting all is cheaper than a merge of most
    return touched


def _made_by(run: RunContext) -> str:
    """What profiles depend on besides tables; where it is another, all are made again."""
    content = [
        run.config.profiles.model_dump(mode="json"),
        run.config.representation,
        run.encoder_id(),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _profiles_version(run: RunContext) -> str:
    return str(run.tables.versions([schemas.PROFILES]).get("profiles", ""))


def _embeddings_version(run: RunContext) -> str:
    """Of the table that the index in force was built from; "" where no run tells."""
    runs = run.tables.read(schemas.RUNS).where(
        (F.col("stage") == "index") & (F.col("status") == "ok")
    )
    ours = runs.where(F.col("details")["index_id"] == Searcher.open(index_folder(run)).index_id)
    last = ours.orderBy(F.desc("started_at")).select(F.col("versions")["embeddings"]).first()
    return str(last[0]) if last and last[0] is not None else ""


def index_fingerprint(run: RunContext) -> object:
    settings = run.config.index
    return [
        settings.model_dump(mode="json"),
        run.config.representation,
        run.encoder_id(),
        index_id(run),
    ]


def profiles_fingerprint(run: RunContext) -> object:
    return [run.config.profiles.model_dump(mode="json"), run.config.representation, index_id(run)]


def index_id(run: RunContext) -> str:
    """The index in force; of one that is missing or damaged what is wrong with it, so that nothing rests on it."""
    try:
        return Searcher.open(index_folder(run)).index_id
    except RunError as broken:
        return str(broken)


def index_folder(run: RunContext) -> Path:
    """The folder that this run has built, else the one that the last good index run of this representation named."""
    if run.index_folder:
        return run.index_folder
    built = run.tables.read(schemas.RUNS).where(
        (F.col("stage") == "index") & (F.col("status") == "ok")
    )
    ours = built.where(F.col("details")["representation"] == run.config.representation)
    last = ours.orderBy(F.desc("started_at")).select(F.col("details")["folder"]).head()
    if last is None:
        raise RunError(
            f"There is no index of {run.config.representation} embeddings yet. Run: vlm4rec index"
        )
    return Path(last[0])
