"""Profiles: the log to everybody's taste, with the vectors of the index in use.

Knows whose profile may have changed; how a profile is made is the stage's.
"""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.pipeline.index import index_folder, index_id
from vlm4rec_spark.stages import profiles as stage
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.state import ProfilesState, StageOutput, StageState


class _LogFigures(NamedTuple):
    """Of the whole log; `counting` are events that a profile may be made of."""

    users: int
    bot_users: int
    bot_events: int
    counting: int


def profiles(context: RunContext, result: StageResult) -> None:
    """Make the profiles that may have changed, or all where that can't be known."""
    log = context.log()
    changed_users = _changed_users(context)
    figures = _log_figures(context, log)
    if changed_users is None and not figures.counting:
        raise RunError(
            "profiles: no user has an event that counts. Check profiles.event_weights against the "
            "event types of the log. Nothing was written."
        )
    rebuilt = figures.users if changed_users is None else changed_users.count()
    rows = _profile_rows(context, log, changed_users)
    with context.reporter.progress("building profiles", rebuilt):
        if changed_users is None:
            result.ok = context.tables.replace(schemas.PROFILES, rows)
        else:
            staged = context.tables.staged(schemas.PROFILES, rows)
            context.tables.revise(schemas.PROFILES, changed_users, staged)
            context.tables.unstage(schemas.PROFILES)
            changed_users.unpersist()
            result.ok = context.tables.read(schemas.PROFILES).count()
    result.skipped = figures.users - result.ok
    representation = context.config.representation
    result.output = StageOutput(representation=representation, profiles=_current(context))
    result.details = {
        "representation": representation,
        "shape": context.config.profiles.shape,
        "bot_users": str(figures.bot_users),
        "bot_events": str(figures.bot_events),
        "users_without_history": str(result.skipped - figures.bot_users),
        "users_rebuilt": str(rebuilt),
    }


def inputs_fingerprint(context: RunContext) -> object:
    settings = context.config.profiles.model_dump(mode="json")
    return [settings, context.config.representation, index_id(context)]


def _profile_rows(
    context: RunContext,
    log: DataFrame,
    changed_users: DataFrame | None,
) -> DataFrame:
    """Rows of `profiles`, of all users or of the changed ones."""
    if changed_users is not None:
        log = log.join(changed_users, on="user_id", how="left_semi")
    histories = stage.histories(log, context.read(schemas.ITEMS), context.config.profiles)
    open_searcher = context.ship(index_folder(context), Searcher.open)
    return stage.with_embedding(histories, context.config.representation, open_searcher)


def _log_figures(context: RunContext, log: DataFrame) -> _LogFigures:
    """In one pass."""
    users = stage.events_by_user(log, context.read(schemas.ITEMS), context.config.profiles)
    events = F.sum(F.when(F.col("is_bot"), F.col("events")))
    figures = users.agg(F.count("*"), F.count_if("is_bot"), events, F.sum("counting"))
    return _LogFigures(*(figure or 0 for figure in first_row(figures)))


def _changed_users(context: RunContext) -> DataFrame | None:
    """user_id of those whose profile may have changed since the last run, persisted.

    None where that may be anybody, or most. By the change feeds these are: users of new events; of
    events on items that were added, removed or got another vector; of ids that turned out to be
    somebody's.
    """
    last = context.states().get("profiles")
    if last is None or not _comparable(context, last):
        return None
    new_events = _changes(context, last, schemas.INTERACTIONS)
    items = _changed_items(context, last)
    events_on_items = context.log().join(items, on="item_id", how="left_semi")
    users = context.identified(new_events).select("user_id")
    users = users.unionByName(events_on_items.select("user_id"))
    if "identities" in last.versions:
        links = _changes(context, last, schemas.IDENTITIES)
        user_ids = F.explode(F.array("anonymous_id", "user_id"))
        users = users.unionByName(links.select(user_ids.alias("user_id")))
    users = users.distinct().persist()
    profile_count = context.tables.read(schemas.PROFILES).count()
    if users.count() * 2 > profile_count:
        users.unpersist()
        return None  # rewriting all is cheaper than a merge of most
    return users


def _changes(
    context: RunContext,
    last: StageState,
    table: Table,
) -> DataFrame:
    """The table's rows that changed since the last run."""
    return context.tables.changed_since(table, last.versions[table.name])


def _comparable(context: RunContext, last: StageState) -> bool:
    """Whether the profiles are those of the last good run, and the feeds tell all changes since."""
    before = last.output.profiles
    now = _current(context)
    if before is None or before.settings_sha256 != now.settings_sha256:
        return False
    # A run that was killed may have written by other settings, and not recorded itself.
    if before.profiles_version != now.profiles_version or before.embeddings_version is None:
        return False
    # What is older may be gone from the feeds.
    hours = context.config.maintain.retention_hours / 2
    oldest = datetime.now(UTC) - timedelta(hours=hours)
    if last.updated_at < oldest or not {"interactions", "items"} <= set(last.versions):
        return False
    had_identities = "identities" in last.versions
    return had_identities == context.tables.exists(schemas.IDENTITIES)


def _changed_items(context: RunContext, last: StageState) -> DataFrame:
    """item_id of the items that were added, removed, or got another vector."""
    assert last.output.profiles and last.output.profiles.embeddings_version is not None
    catalogue = _changes(context, last, schemas.ITEMS)
    is_new_or_removed = F.col("_change_type").isin("insert", "delete")
    items = catalogue.where(is_new_or_removed)
    embeddings = context.tables.changed_since(
        schemas.EMBEDDINGS,
        last.output.profiles.embeddings_version,
    )
    vectors = embeddings.where(
        (F.col("representation") == context.config.representation)
        & (F.col("encoder_id") == context.encoder_id())
    )
    changed = items.select("item_id").unionByName(vectors.select("item_id"))
    return changed.distinct()


def _current(context: RunContext) -> ProfilesState:
    """Settings and versions as they are now: of the index's embeddings and of the profiles."""
    settings = [
        context.config.profiles.model_dump(mode="json"),
        context.config.representation,
        context.encoder_id(),
    ]
    content = json.dumps(settings, sort_keys=True)
    index = context.states().get("index")
    return ProfilesState(
        hashlib.sha256(content.encode()).hexdigest(),
        index.versions.get("embeddings") if index else None,
        context.tables.versions([schemas.PROFILES]).get("profiles"),
    )
