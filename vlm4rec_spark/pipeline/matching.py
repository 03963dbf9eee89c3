"""Index, profiles and recommend: vectors and the log to everybody's list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark import schemas, sources
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.cooccurrence import Cooccurrence
from vlm4rec_spark.models.offer import Rule
from vlm4rec_spark.models.searcher import Searcher
from vlm4rec_spark.pipeline.encoding import item_texts
from vlm4rec_spark.pipeline.run import Outcome, Run, one
from vlm4rec_spark.stages import cooccurrence, offers, popular
from vlm4rec_spark.stages import index as indexing
from vlm4rec_spark.stages import profiles as profiling
from vlm4rec_spark.stages import recommend as ranking


def index(run: Run, outcome: Outcome) -> None:
    settings, encoder = run.config.index, run.encoder_id()
    rows = indexing.index_rows(run.read(schemas.EMBEDDINGS), item_texts(run), run.config.representation, encoder)
    items = rows.count()
    if not items:
        raise RunError(f"index: no item has a {run.config.representation} embedding by {encoder}. Run embed.")
    dimension = one(rows.select(F.size("embedding")))[0]
    need = 2 * items * dimension * 4 / 1e9
    run.voice.say(f"building the index of {items:,} x {dimension} on the driver, needs about {need:.2f} GB there")
    folder = indexing.build(
        rows.toArrow(), run.config.representation, encoder, Path(settings.folder), settings.scann_from, _last(run),
        settings.rebuild_share,
    )
    searcher, run.index_folder = Searcher.open(folder), folder
    outcome.ok = items
    outcome.details = {
        "index_id": searcher.index_id, "items": str(items), "dimension": str(dimension),
        "approximate": str(searcher.approximate).lower(), "base": searcher.base,
        "beside_codes": str(len(searcher.fresh)), "folder": str(folder.resolve()),
        "representation": run.config.representation,
        "bytes": str(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())),
    }  # fmt: skip


def _last(run: Run) -> Searcher | None:
    """The version in force, on which another may rest."""
    try:
        return Searcher.open(index_folder(run))
    except RunError:
        return None


def profiles(run: Run, outcome: Outcome) -> None:
    settings = run.config.profiles
    log, items = run.log(), run.read(schemas.ITEMS)
    touched = _touched(run)
    bots = profiling.bots(log, settings.bot_events_per_day)
    users = log.select("user_id").distinct().count()
    figures = one(log.join(bots, "user_id", "left_semi").agg(F.countDistinct("user_id"), F.count(F.lit(1))))
    theirs = log if touched is None else log.join(touched, on="user_id", how="left_semi")
    rows = profiling.histories(theirs, items, settings)
    if touched is None and rows.isEmpty():
        raise RunError("profiles: no user has an event that counts. Check profiles.event_weights against the event "
                       "types of the log. Nothing was written.")  # fmt: skip
    open_searcher = indexing.ship(run.spark, index_folder(run), run.config.index.broadcast_gb, Searcher.open)
    made = profiling.with_embedding(rows, run.config.representation, open_searcher)
    changed = users if touched is None else touched.count()
    with run.voice.watch("building profiles", changed):
        if touched is None:
            run.tables.replace(schemas.PROFILES, made)
        else:
            run.tables.revise(schemas.PROFILES, touched, run.tables.staged(schemas.PROFILES, made))
            run.tables.unstage(schemas.PROFILES)
            touched.unpersist()
    outcome.ok = run.tables.read(schemas.PROFILES).count()
    outcome.skipped = users - outcome.ok
    outcome.details = {
        "representation": run.config.representation, "shape": settings.shape, "bot_users": str(figures[0]),
        "bot_events": str(figures[1]),
        "users_without_history": str(outcome.skipped - figures[0]), "users_rebuilt": str(changed),
        "made_by": _made_by(run), "embeddings": _embeddings_version(run), "version": _profiles_version(run),
    }  # fmt: skip


def _touched(run: Run) -> DataFrame | None:
    """user_id of those whose profile may have changed since the last run, persisted; None where that may be anybody.

    By the change feeds: users of new events, of events on items that have come, gone or got another vector, and of ids
    that turned out to be somebody's.
    """
    runs = run.tables.read(schemas.RUNS)
    last = runs.where((F.col("stage") == "profiles") & (F.col("status") == "ok")).orderBy(F.desc("started_at")).first()
    if last is None or last["details"].get("made_by") != _made_by(run):
        return None
    # A run that was killed may have written by other settings, and not recorded itself.
    if last["details"].get("version") != _profiles_version(run):
        return None
    # What is older may be gone from the feeds.
    hours = run.config.maintain.retention_hours / 2
    old = runs.where((F.col("run_id") == last["run_id"]) & (F.col("stage") == "profiles")).select(
        F.col("started_at") < F.current_timestamp() - F.make_interval(hours=F.lit(int(hours)))
    ).first()  # fmt: skip
    versions, embeddings = last["versions"], last["details"].get("embeddings", "")
    if old is None or old[0] or not embeddings or not {"interactions", "items"} <= set(versions):
        return None
    if ("identities" in versions) != run.tables.exists(schemas.IDENTITIES):
        return None
    came = run.tables.changed_since(schemas.ITEMS, versions["items"])
    came = came.where(F.col("_change_type").isin("insert", "delete"))
    vectors = run.tables.changed_since(schemas.EMBEDDINGS, int(embeddings)).where(
        (F.col("representation") == run.config.representation) & (F.col("encoder_id") == run.encoder_id())
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


def _made_by(run: Run) -> str:
    """What profiles depend on besides tables; where it is another, all are made again."""
    content = [run.config.profiles.model_dump(mode="json"), run.config.representation, run.encoder_id()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _profiles_version(run: Run) -> str:
    return str(run.tables.versions([schemas.PROFILES]).get("profiles", ""))


def _embeddings_version(run: Run) -> str:
    """Of the table that the index in force was built from; "" where no run tells."""
    runs = run.tables.read(schemas.RUNS).where((F.col("stage") == "index") & (F.col("status") == "ok"))
    ours = runs.where(F.col("details")["index_id"] == Searcher.open(index_folder(run)).index_id)
    last = ours.orderBy(F.desc("started_at")).select(F.col("versions")["embeddings"]).first()
    return str(last[0]) if last and last[0] is not None else ""


def check(run: Run) -> None:
    """Raise UsageError for rules that can't be asked of the tables, and for denied items that aren't there."""
    items, users = (run.spark.createDataFrame([], table.schema) for table in (schemas.ITEMS, schemas.USERS))
    offers.check(items, users, run.config.recommend.rules, run.config.recommend.caps)
    if run.config.recommend.deny.path:
        sources.read(run.spark, "recommend.deny", run.config.recommend.deny)


def recommend(run: Run, outcome: Outcome) -> None:
    settings, k = run.config.recommend, run.config.recommend.k
    rows = run.read(schemas.PROFILES)
    folder = index_folder(run)
    searcher = Searcher.open(folder)
    other = rows.where(F.col("representation") != run.config.representation)
    if not other.isEmpty():
        raise RunError("recommend: the profiles are of another representation than the index. Run profiles again.")
    users = run.tables.read(schemas.USERS)
    items = _offered_to_all(run, run.read(schemas.ITEMS))
    offered = offers.item_rows(items, run.tables.read(schemas.PHOTOS), settings.rules, settings.caps)
    offer = offers.offer(
        offered.toArrow(), searcher, settings.variants, settings.caps, settings.alike, settings.least_score,
        settings.diversity,
    )  # fmt: skip
    # Who doesn't agree gets no list.
    refused = users.where(~F.col("consent")).select("user_id")
    usable = rows.where(F.col("embedding").isNotNull()).join(refused, on="user_id", how="left_anti")
    usable = _excluded(run, _under_rules(usable, users, settings.rules))
    sample = usable.select("user_id", "embedding", "history", "seen").orderBy(F.xxhash64("user_id"), "user_id")
    eligible = offer.eligible(offers.applying(users, settings.rules)[0])
    matching = _matching(run, rows, searcher)
    measured = ranking.calibrate(
        searcher, sample.limit(settings.recall_sample).toArrow(), eligible, k, settings.recall, matching
    )
    words = measured.words(searcher.manifest["leaves"])
    count = usable.count()
    run.voice.say(f"recommending for {count:,} users: {words}, recall {measured.recall:.3f} on {measured.users:,}")
    open_searcher = indexing.ship(run.spark, folder, run.config.index.broadcast_gb, Searcher.open)
    lists = ranking.recommend(usable, open_searcher, offer, k, measured.effort, matching, settings.why)
    if settings.popular:
        lists = lists.unionByName(_popular(run, usable, refused, searcher.index_id))
    lists = lists.select("*", F.lit(run.run_id).alias("run_id"), F.current_timestamp().alias("generated_at"))
    with run.voice.watch("recommending", count):
        run.tables.replace(schemas.RECOMMENDATIONS, lists)
    made = run.tables.read(schemas.RECOMMENDATIONS)
    short, outcome.ok = made.where(F.size("items") < k).count(), made.count()
    outcome.skipped = rows.join(made.select("user_id"), on="user_id", how="left_anti").count()
    outcome.details = {
        "k": str(k), "users": str(count), "popular_lists": str(outcome.ok - count), "short_lists": str(short),
        "search": words, "recall_promised": str(settings.recall), "recall_measured": f"{measured.recall:.4f}",
        "recall_low": f"{measured.low:.4f}", "recall_curve": _curve(measured), "index_id": searcher.index_id,
        "cooccurrence_share": str(run.config.cooccurrence.share),
    }  # fmt: skip


def _under_rules(profiles: DataFrame, users: DataFrame, rules: Sequence[Rule]) -> DataFrame:
    """Profiles with the bits of the rules that apply to each user."""
    everybody, some = offers.applying(users, rules)
    if some is None:
        return profiles.withColumn("rules", F.lit(everybody).cast("bigint"))
    joined = profiles.join(some, on="user_id", how="left")
    return joined.withColumn("rules", F.coalesce("rules", F.lit(0)).bitwiseOR(F.lit(everybody).cast("bigint")))


def _excluded(run: Run, profiles: DataFrame) -> DataFrame:
    """Profiles whose `seen` holds what each user may not get: by the events, and by what is denied."""
    settings = run.config.recommend
    if settings.seen_again or settings.repurchase_days:
        kept_off = offers.not_again(run.log(), run.read(schemas.ITEMS), settings.seen_again, settings.repurchase_days)
        profiles = profiles.drop("seen").join(kept_off, on="user_id", how="left")
        profiles = profiles.withColumn("seen", F.coalesce("seen", F.array()))
    if settings.deny.path:
        theirs = _denied(run).where(f"NOT {_TO_ALL}").groupBy("user_id").agg(F.collect_set("item_id").alias("denied"))
        profiles = profiles.join(theirs, on="user_id", how="left")
        more = F.array_union("seen", F.coalesce("denied", F.array()))
        profiles = profiles.withColumn("seen", more).drop("denied")
    return profiles


_TO_ALL = "coalesce(user_id, '') = ''"


def _denied(run: Run) -> DataFrame:
    rows = sources.read(run.spark, "recommend.deny", run.config.recommend.deny)
    return rows.select(*(F.col("fields")[name].alias(name) for name in ("user_id", "item_id")))


def _offered_to_all(run: Run, items: DataFrame) -> DataFrame:
    """The items; what is denied to all counts as unavailable."""
    if not run.config.recommend.deny.path:
        return items
    denied = _denied(run).where(_TO_ALL).select("item_id", F.lit(True).alias("denied")).distinct()
    joined = items.join(denied, on="item_id", how="left")
    return joined.withColumn("available", F.col("available") & F.col("denied").isNull()).drop("denied")


def _popular(run: Run, usable: DataFrame, refused: DataFrame, index_id: str) -> DataFrame:
    """Lists of the users, in the log or in `users`, who are no bots and have no usable profile."""
    log, users = run.log(), run.tables.read(schemas.USERS)
    robots = profiling.bots(log, run.config.profiles.bot_events_per_day)
    people = log.join(robots, on="user_id", how="left_anti")
    settings, items = run.config.recommend, run.read(schemas.ITEMS)
    waiting = (
        people.select("user_id").unionByName(users.select("user_id")).distinct()
        .join(robots, on="user_id", how="left_anti").join(refused, on="user_id", how="left_anti")
        .join(usable.select("user_id"), on="user_id", how="left_anti")
    )  # fmt: skip
    under, found = _under_rules(waiting, users, settings.rules), []
    everybody, some = offers.applying(users, settings.rules)
    apply = {everybody}
    if some is not None:
        apply |= {everybody | row["rules"] for row in some.select("rules").distinct().collect()}
    for bits in sorted(apply):
        theirs = [rule.items for number, rule in enumerate(settings.rules) if bits & 2 << number]
        allowed = reduce(lambda rows, rule: rows.where(rule), theirs, _offered_to_all(run, items))
        mine = under.where(F.col("rules") == bits).select("user_id")
        found.append(popular.lists(mine, people, allowed, users, index_id, settings.k))
    return reduce(DataFrame.unionByName, found)


def _curve(measured: ranking.Calibration) -> str:
    """What was tried, as JSON: leaves, candidates, recall, its lower bound, lists a second; and of an exact search."""
    tried = [[each.effort.leaves, each.effort.candidates, round(each.recall, 4), round(each.low, 4),
              round(each.per_second)] for each in measured.tried]  # fmt: skip
    exact = measured.exact_per_second
    return json.dumps({"tried": tried, "exact": round(exact) if exact else None})


def _matching(run: Run, profiles: DataFrame, searcher: Searcher) -> ranking.Matching:
    """By the profiles' shape, and with the share of co-occurrence that is asked for, counted in the same profiles."""
    settings, profile = run.config.cooccurrence, run.config.profiles
    content = ranking.Matching(profile.shape, tastes_per_user=profile.tastes)
    if not settings.share:
        return content
    run.voice.say(f"counting what is found together, needs up to {len(searcher) * settings.kept * 60 / 1e9:.2f} GB on "
                  "the driver")  # fmt: skip
    folder = cooccurrence.build(
        cooccurrence.pairs(profiles, settings), searcher, Path(run.config.index.folder) / "cooccurrence"
    )
    opens = indexing.ship(run.spark, folder, run.config.index.broadcast_gb, Cooccurrence.open)
    return replace(content, share=settings.share, position_decay=settings.position_decay, opens=opens)


def beside_index(run: Run) -> object:
    settings = run.config.index
    return [settings.model_dump(mode="json"), run.config.representation, run.encoder_id(), _index_id(run)]


def beside_profiles(run: Run) -> object:
    return [run.config.profiles.model_dump(mode="json"), run.config.representation, _index_id(run)]


def beside_lists(run: Run) -> object:
    """None where items are denied: the list of them may say something else each time."""
    if run.config.recommend.deny.path:
        return None
    settings = run.config.recommend.model_dump(mode="json")
    blend = run.config.cooccurrence.model_dump(mode="json")
    shape = [run.config.profiles.shape, run.config.profiles.tastes]
    return [settings, blend, *shape, run.config.representation, _index_id(run)]


def _index_id(run: Run) -> str:
    """The index in force; of one that is missing or damaged what is wrong with it, so that nothing rests on it."""
    try:
        return Searcher.open(index_folder(run)).index_id
    except RunError as broken:
        return str(broken)


def index_folder(run: Run) -> Path:
    """The folder that this run has built, else the one that the last good index run of this representation named."""
    if run.index_folder:
        return run.index_folder
    built = run.tables.read(schemas.RUNS).where((F.col("stage") == "index") & (F.col("status") == "ok"))
    ours = built.where(F.col("details")["representation"] == run.config.representation)
    last = ours.orderBy(F.desc("started_at")).select(F.col("details")["folder"]).head()
    if last is None:
        raise RunError(f"There is no index of {run.config.representation} embeddings yet. Run: vlm4rec index")
    return Path(last[0])
