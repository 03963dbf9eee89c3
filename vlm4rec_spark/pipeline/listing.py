"""Recommend: everybody's list, by taste or by what is popular, under the shop's rules; and again only where it changes.

Knows which lists have to be made; how one is made is the stages'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark import __version__, schemas, sources
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models import standing
from vlm4rec_spark.models.calibration import Calibration
from vlm4rec_spark.models.cooccurrence import Cooccurrence
from vlm4rec_spark.models.neighbours import Neighbours
from vlm4rec_spark.models.searcher import EXACT_COST, Effort, Searcher
from vlm4rec_spark.pipeline.matching import index_folder, index_id
from vlm4rec_spark.pipeline.run import Outcome, Run
from vlm4rec_spark.sources import Source
from vlm4rec_spark.stages import cooccurrence, neighbours, offers, popular
from vlm4rec_spark.stages import index as indexing
from vlm4rec_spark.stages import profiles as profiling
from vlm4rec_spark.stages import recommend as ranking

_FORALL = "coalesce(user_id, '') = ''"


def check(run: Run) -> None:
    """Raise UsageError for rules that can't be asked of the tables, and for lists of items that aren't there."""
    settings = run.config.recommend
    items, users = (run.spark.createDataFrame([], table.schema) for table in (schemas.ITEMS, schemas.USERS))
    offers.check(items, users, settings.rules, settings.caps)
    for name, source in (("allow", settings.allow), ("deny", settings.deny)):
        if source.path:
            sources.read(run.spark, f"recommend.{name}", source)


def recommend(run: Run, outcome: Outcome) -> None:
    settings, k, tables = run.config.recommend, run.config.recommend.k, run.tables
    profiles, folder = run.read(schemas.PROFILES), index_folder(run)
    searcher = Searcher.open(folder)
    if not profiles.where(F.col("representation") != run.config.representation).isEmpty():
        raise RunError("recommend: the profiles are of another representation than the index. Run profiles again.")
    users, items = tables.read(schemas.USERS), _offered_to_all(run, run.read(schemas.ITEMS))
    offered = offers.item_rows(items, tables.read(schemas.PHOTOS), settings.rules, settings.caps)
    catalogue = offered.toArrow()
    offer = offers.offer(catalogue, searcher, settings.variants, settings.caps, settings.alike, settings.least_score,
                         settings.diversity)  # fmt: skip
    # Who doesn't agree gets no list.
    refused = users.where(~F.col("consent")).select("user_id")
    with_taste = profiles.where(F.col("embedding").isNotNull()).join(refused, on="user_id", how="left_anti")
    usable = _for_each(run, with_taste, users)
    matching, together = _matching(run, profiles, searcher)
    sample = usable.orderBy(F.xxhash64("user_id"), "user_id").limit(settings.recall_sample)
    asked = sample.select("embedding", "history", "seen", "rules").toArrow()
    measured = ranking.calibrate(searcher, asked, offer, k, settings.recall, matching)
    words = measured.words(searcher.manifest["leaves"])

    marks = standing.marks(searcher, offer, offers.by_position(catalogue, "said", searcher))
    under = _made_under(run, searcher.base, together)
    cost = measured.effort.cost(searcher) if measured.effort else EXACT_COST * len(searcher)
    news, reason, popular_at = _news(run, searcher, marks, under, cost)
    count = usable.count()
    which = f"all: {reason}"
    if news is not None:
        which = f"those who have changed, or whom one of {int(news.sum()):,} changed items reaches"
    run.voice.say(f"recommending for {count:,} users ({which}), {words}, recall {measured.recall:.3f} on "
                  f"{measured.users:,}")  # fmt: skip
    opens = indexing.ship(run.spark, folder, run.config.index.broadcast_gb, Searcher.open)
    often = news is None and neighbours.pays(asked, count, len(searcher))
    if often and matching.shape == "max_similarity" and measured.effort:
        deep = replace(measured.effort, candidates=measured.effort.candidates + offer.first_depth(k) - k)
        matching = replace(matching, neighbours=_neighbours(run, searcher, opens, deep, asked))
    beside, theirs = usable, usable.select("user_id")
    if news is not None:
        beside = usable.join(ranking.standing(tables.read(schemas.RECOMMENDATIONS)), on="user_id", how="left")
    lists = ranking.recommend(beside, opens, offer, k, measured.effort, matching, settings.why, news)
    if settings.popular:
        waiting, best = _waiting(run, usable, refused, users, offered, searcher, not popular_at)
        lists = lists.unionByName(ranking.recommend(waiting, opens, offer, k, None, popular.ByPopularity(best)))
        theirs = theirs.unionByName(waiting.select("user_id"))
    lists = lists.select("*", F.lit(run.run_id).alias("run_id"), F.current_timestamp().alias("generated_at"))
    with run.voice.watch("recommending", count):
        made = _write(run, lists, theirs, news is None)
    if news is None or news.any() or len(marks) != tables.read(schemas.OFFERED).count():
        known = pa.table({"item_id": searcher.names, "made_of": marks})
        tables.replace(schemas.OFFERED, run.spark.createDataFrame(known))
    there = tables.read(schemas.RECOMMENDATIONS)
    short, outcome.ok = there.where(F.size("items") < k).count(), there.count()
    outcome.skipped = profiles.join(there.select("user_id"), on="user_id", how="left_anti").count()
    outcome.details = {
        "k": str(k), "users": str(count), "popular_lists": str(outcome.ok - count), "short_lists": str(short),
        "search": words, "recall_promised": str(settings.recall), "recall_measured": f"{measured.recall:.4f}",
        "recall_low": f"{measured.low:.4f}", "recall_curve": _curve(measured), "index_id": searcher.index_id,
        "cooccurrence_share": str(run.config.cooccurrence.share), "lists_made": str(made), "full": reason,
        "popular_at": popular_at or datetime.now(UTC).isoformat(timespec="seconds"), "made_under": under,
        "version": _version(run),
    }  # fmt: skip


def _write(run: Run, lists: DataFrame, theirs: DataFrame, everybody: bool) -> int:
    """Write the lists, all or those that may have changed, and say how many; who is not among `theirs` loses theirs."""
    if everybody:
        run.tables.replace(schemas.RECOMMENDATIONS, lists)
        return run.tables.read(schemas.RECOMMENDATIONS).count()
    staged = run.tables.staged(schemas.RECOMMENDATIONS, lists)
    there = run.tables.read(schemas.RECOMMENDATIONS).select("user_id")
    gone = there.join(theirs, on="user_id", how="left_anti")
    run.tables.revise(schemas.RECOMMENDATIONS, staged.select("user_id").unionByName(gone), staged)
    made = staged.count()
    run.tables.unstage(schemas.RECOMMENDATIONS)
    return made


def _news(
    run: Run, searcher: Searcher, marks: np.ndarray, under: str, cost: float
) -> tuple[np.ndarray | None, str, str]:
    """bool (items,), what has changed since the lists in force were made, None where all are to be made anew; why they
    are, else ""; and when what is popular was last counted, "" where it is to be counted now.

    cost: of a list, in codes that are scored (`Effort.cost`).
    """
    last, days = run.last("recommend"), run.config.recommend.full_days
    if last is None or not run.tables.exists(schemas.OFFERED):
        return None, "there are no lists yet", ""
    before = last["details"]
    if before.get("made_under") != under:
        return None, "settings have changed or the index was built anew", ""
    counted = before["popular_at"]
    if datetime.now(UTC) - datetime.fromisoformat(counted) >= timedelta(days=days):
        return None, f"as every {days} days", ""
    if before["version"] != _version(run):  # a run was killed, or somebody else wrote
        return None, "the lists are not as the last run left them", counted
    known = run.tables.read(schemas.OFFERED).toArrow()
    news, gone = standing.changed(searcher, marks, known["item_id"].to_pylist(), known["made_of"].to_numpy())
    if run.config.recommend.diversity and (gone or news.any()):
        return None, "items have changed, and any may do for diversity", counted
    if 2 * EXACT_COST * news.sum() > cost:
        return None, "so many items have changed", counted
    return news, "", counted


def _made_under(run: Run, base: str, together: str) -> str:
    """What all lists depend on besides users and items; where it is another, all are made again."""
    profile = [run.config.profiles.shape, run.config.profiles.tastes]
    settings = run.config.recommend.model_dump(mode="json", exclude={"allow", "deny", "full_days"})
    content = [__version__, settings, run.config.cooccurrence.model_dump(mode="json"), *profile,
               run.config.representation, base, together]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(run: Run) -> str:
    return str(run.tables.versions([schemas.RECOMMENDATIONS]).get("recommendations", ""))


def _for_each(run: Run, people: DataFrame, users: DataFrame) -> DataFrame:
    """Rows of user_id and seen with what holds for each: `rules` (bits), `only`, `seen` with all that is kept off, and
    `made_of`."""
    settings = run.config.recommend
    everybody, some = offers.applying(users, settings.rules)
    if some is None:
        people = people.withColumn("rules", F.lit(everybody).cast("bigint"))
    else:
        bits = F.coalesce("rules", F.lit(0)).bitwiseOR(F.lit(everybody).cast("bigint"))
        people = people.join(some, on="user_id", how="left").withColumn("rules", bits)
    if settings.seen_again or settings.repurchase_days:
        kept_off = offers.not_again(run.log(), run.read(schemas.ITEMS), settings.seen_again, settings.repurchase_days)
        people = people.drop("seen").join(kept_off, on="user_id", how="left")
        people = people.withColumn("seen", F.coalesce("seen", F.array()))
    if settings.deny.path:
        people = people.join(_by_user(run, "deny", settings.deny, "denied"), on="user_id", how="left")
        more = F.array_union("seen", F.coalesce("denied", F.array()))
        people = people.withColumn("seen", F.array_sort(more)).drop("denied")
    if settings.allow.path:
        people = people.join(_by_user(run, "allow", settings.allow, "only"), on="user_id", how="left")
    return ranking.made_of(people)


def _named(run: Run, key: str, source: Source) -> DataFrame:
    """user_id, item_id of a list of items."""
    rows = sources.read(run.spark, f"recommend.{key}", source)
    return rows.select(*(F.col("fields")[name].alias(name) for name in ("user_id", "item_id")))


def _by_user(run: Run, key: str, source: Source, name: str) -> DataFrame:
    theirs = _named(run, key, source).where(f"NOT {_FORALL}").groupBy("user_id")
    return theirs.agg(F.array_sort(F.collect_set("item_id")).alias(name))


def _offered_to_all(run: Run, items: DataFrame) -> DataFrame:
    """The items; what is denied to all, or isn't among what alone is allowed to all, counts as unavailable."""
    for key, source, good in (("deny", run.config.recommend.deny, False), ("allow", run.config.recommend.allow, True)):
        listed = _named(run, key, source).where(_FORALL) if source.path else None
        if listed is None or listed.isEmpty():
            continue
        marked = listed.select("item_id", F.lit(True).alias("listed")).distinct()
        items = items.join(marked, on="item_id", how="left")
        right = F.col("listed").isNotNull() if good else F.col("listed").isNull()
        items = items.withColumn("available", F.col("available") & right).drop("listed")
    return items


def _waiting(
    run: Run, usable: DataFrame, refused: DataFrame, users: DataFrame, offered: DataFrame, searcher: Searcher,
    afresh: bool,
) -> tuple[DataFrame, popular.Best]:  # fmt: skip
    """Users, in the log or in `users`, who are no bots and have no usable profile; and what is popular with their like,
    counted `afresh` or as it was."""
    log, settings = run.log(), run.config.recommend
    robots = profiling.bots(log, run.config.profiles.bot_events_per_day)
    people = log.join(robots, on="user_id", how="left_anti")
    if afresh or not run.tables.exists(schemas.POPULARITY):
        run.tables.replace(schemas.POPULARITY, popular.counts(people, run.read(schemas.ITEMS), users))
    met = people.groupBy("user_id").agg(F.array_sort(F.collect_set("item_id")).alias("seen"))
    waiting = (
        people.select("user_id").unionByName(users.select("user_id")).distinct()
        .join(robots, on="user_id", how="left_anti").join(refused, on="user_id", how="left_anti")
        .join(usable.select("user_id"), on="user_id", how="left_anti")
        .join(met, on="user_id", how="left").withColumn("seen", F.coalesce("seen", F.array()))
        .join(users.select("user_id", "segment"), on="user_id", how="left")
    )  # fmt: skip
    everybody, some = offers.applying(users, settings.rules)
    apply = {everybody}
    if some is not None:
        apply |= {everybody | row["rules"] for row in some.select("rules").distinct().collect()}
    popularity, best = run.tables.read(schemas.POPULARITY), dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]()
    for bits in sorted(apply):
        allowed = offered.where(F.col("allowed").bitwiseAND(F.lit(bits | 1)) == F.lit(bits | 1))
        best |= popular.placed(popular.best(popularity, allowed).toArrow(), bits, searcher)
    return _for_each(run, waiting, users).drop("made_of"), best


def _matching(run: Run, profiles: DataFrame, searcher: Searcher) -> tuple[ranking.Matching, str]:
    """By the profiles' shape, and with the share of co-occurrence that is asked for, counted in the same profiles; and
    what names that count, "" without."""
    settings, profile = run.config.cooccurrence, run.config.profiles
    content = ranking.Matching(profile.shape, tastes_per_user=profile.tastes)
    if not settings.share:
        return content, ""
    run.voice.say(f"counting what is found together, needs up to {len(searcher) * settings.kept * 60 / 1e9:.2f} GB on "
                  "the driver")  # fmt: skip
    folder = cooccurrence.build(
        cooccurrence.pairs(profiles, settings), searcher, Path(run.config.index.folder) / "cooccurrence"
    )
    opens = indexing.ship(run.spark, folder, run.config.index.broadcast_gb, Cooccurrence.open)
    return replace(content, share=settings.share, position_decay=settings.position_decay, opens=opens), folder.name


def _neighbours(
    run: Run, searcher: Searcher, open_searcher: Callable[[], Searcher], effort: Effort, sample: pa.Table
) -> Callable[[], Neighbours]:
    """What gives a worker every item's neighbours, deep enough for most users; they are searched here."""
    items, folder = len(searcher), Path(run.config.index.folder) / "neighbours"
    depth = neighbours.depth(effort.candidates, sample, items)
    run.voice.say(f"searching the {depth} neighbours of each of {items:,} items, needs "
                  f"{neighbours.gigabytes(items, depth):.2f} GB in {folder}")  # fmt: skip
    made = neighbours.build(run.spark, searcher, open_searcher, Effort(effort.leaves, depth), folder)
    return indexing.ship(run.spark, made, run.config.index.broadcast_gb, Neighbours.open)


def _curve(measured: Calibration) -> str:
    """What was tried, as JSON: leaves, candidates, recall, its lower bound, lists a second; and of an exact search; and
    what was taken, null for exact search."""
    tried = [[each.effort.leaves, each.effort.candidates, round(each.recall, 4), round(each.low, 4),
              round(each.per_second)] for each in measured.tried]  # fmt: skip
    exact, effort = measured.exact_per_second, measured.effort
    taken = [effort.leaves, effort.candidates] if effort else None
    return json.dumps({"tried": tried, "exact": round(exact) if exact else None, "taken": taken})


def beside_lists(run: Run) -> object:
    """None where items are named by a list: it may say something else each time."""
    if run.config.recommend.deny.path or run.config.recommend.allow.path:
        return None
    settings = run.config.recommend.model_dump(mode="json")
    blend = run.config.cooccurrence.model_dump(mode="json")
    shape = [run.config.profiles.shape, run.config.profiles.tastes]
    return [settings, blend, *shape, run.config.representation, index_id(run)]
