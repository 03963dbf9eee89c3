"""Recommend: everybody's list, by taste or by what is popular, under the shop's rules.

Knows who gets a list and which tables it comes from. How one list is made is the stages'.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index import neighbors
from vlm4rec_spark.models.index.build import build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.calibration import Calibration
from vlm4rec_spark.models.ranking.list_rules import AVAILABLE, ListRules
from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.pipeline.index import index_folder, index_id
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark import neighbors_file
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import item_item, popularity, rules
from vlm4rec_spark.stages import profiles as profiling
from vlm4rec_spark.stages import recommend as ranking
from vlm4rec_spark.storage import schemas

_FORALL = "coalesce(user_id, '') = ''"


def check(context: RunContext) -> None:
    """Raise UsageError for rules that can't be asked of the tables, and for lists of items that aren't there."""
    settings = context.config.recommend
    items, users = (
        context.spark.createDataFrame([], table.schema) for table in (schemas.ITEMS, schemas.USERS)
    )
    rules.check(items, users, settings.rules, settings.caps)
    for name, source in (("allow", settings.allow), ("deny", settings.deny)):
        if source.path:
            reader.read(context.spark, f"recommend.{name}", source)


@dataclass(frozen=True)
class _Inputs:
    """What the lists are made from.

    `item_rows` are those of `offers.item_rows`, and `offer` is made of them. `refused` holds the user_id of users
    without consent. `usable` holds the profiles that have a vector and consent, with the user's rules.
    """

    folder: Path
    searcher: Searcher
    users: DataFrame
    refused: DataFrame
    item_rows: DataFrame
    offer: ListRules
    profiles: DataFrame
    usable: DataFrame


@dataclass(frozen=True)
class _Search:
    """How the lists of `users` users are searched: the measured calibration, also in words, and the matching.

    `open_searcher` opens the index in a worker.
    """

    calibration: Calibration
    words: str
    users: int
    matching: ranking.Matching
    open_searcher: Callable[[], Searcher]


def recommend(context: RunContext, result: StageResult) -> None:
    """Make everybody's list and replace the table by them, in one transaction."""
    inputs = _load(context)
    search = _choose_search(context, inputs)
    lists = _score(context, inputs, search)
    with context.reporter.progress("recommending", search.users):
        context.tables.replace(schemas.RECOMMENDATIONS, lists)
    _count(context, inputs, search, result)


def _load(context: RunContext) -> _Inputs:
    """Raises RunError where a table is missing, or profiles and index are of different representations."""
    settings = context.config.recommend
    tables = context.tables
    profiles = context.read(schemas.PROFILES)
    folder = index_folder(context)
    searcher = Searcher.open(folder)
    if not profiles.where(F.col("representation") != context.config.representation).isEmpty():
        raise RunError(
            "recommend: the profiles are of another representation than the index. Run profiles again."
        )
    users = tables.read(schemas.USERS)
    items = _offered_to_all(context, context.read(schemas.ITEMS))
    item_rows = rules.item_rows(items, tables.read(schemas.PHOTOS), settings.rules, settings.caps)
    offer = rules.list_rules(
        item_rows.toArrow(),
        searcher,
        settings.variants,
        settings.caps,
        settings.similarity_threshold,
        settings.min_score,
        settings.diversity,
    )
    refused = users.where(~F.col("consent")).select("user_id")
    with_vector = profiles.where(F.col("embedding").isNotNull())
    consenting = with_vector.join(refused, on="user_id", how="left_anti")
    usable = _for_each(context, consenting, users)
    return _Inputs(folder, searcher, users, refused, item_rows, offer, profiles, usable)


def _choose_search(context: RunContext, inputs: _Inputs) -> _Search:
    """Choose the cheapest search that keeps the promise on a sample of the profiles, and announce it."""
    settings = context.config.recommend
    searcher = inputs.searcher
    matching = _matching(context, inputs.profiles, searcher)
    by_hash = inputs.usable.orderBy(F.xxhash64("user_id"), "user_id").limit(settings.recall_sample)
    sample = by_hash.select("embedding", "history", "seen", "rules").toArrow()
    calibration = ranking.calibrate(
        searcher, sample, inputs.offer, settings.k, settings.target_recall, matching
    )
    words = calibration.words(searcher.manifest["leaves"])
    users = inputs.usable.count()
    context.reporter.info(
        f"recommending for {users:,} users, {words}, recall {calibration.recall:.3f} on "
        f"{calibration.users:,}"
    )
    open_searcher = ship(
        context.spark, inputs.folder, context.config.index.broadcast_gb, Searcher.open
    )
    effort = calibration.effort
    if (
        effort
        and matching.shape == "max_similarity"
        and neighbors.pays_off(sample, users, len(searcher))
    ):
        depth = effort.candidates + inputs.offer.initial_depth(settings.k) - settings.k
        deep = replace(effort, candidates=depth)
        opens = _neighbours(context, searcher, open_searcher, deep, sample)
        matching = replace(matching, neighbors=opens)
    return _Search(calibration, words, users, matching, open_searcher)


def _score(context: RunContext, inputs: _Inputs, search: _Search) -> DataFrame:
    """Rows of `recommendations`: lists by taste, and by popularity for users without a usable profile."""
    settings = context.config.recommend
    lists = ranking.recommend(
        inputs.usable,
        search.open_searcher,
        inputs.offer,
        settings.k,
        search.calibration.effort,
        search.matching,
        settings.explain,
    )
    if settings.popularity_fallback:
        waiting, best = _waiting(context, inputs)
        by_popularity = popularity.ByPopularity(best)
        lists = lists.unionByName(
            ranking.recommend(
                waiting, search.open_searcher, inputs.offer, settings.k, None, by_popularity
            )
        )
    return lists.select(
        "*", F.lit(context.run_id).alias("run_id"), F.current_timestamp().alias("generated_at")
    )


def _count(context: RunContext, inputs: _Inputs, search: _Search, result: StageResult) -> None:
    """Fill the result from the table as it was written."""
    settings = context.config.recommend
    calibration = search.calibration
    lists = context.tables.read(schemas.RECOMMENDATIONS)
    without_list = inputs.profiles.join(lists.select("user_id"), on="user_id", how="left_anti")
    result.ok = lists.count()
    result.skipped = without_list.count()
    result.details = {
        "k": str(settings.k),
        "users": str(search.users),
        "popular_lists": str(result.ok - search.users),
        "short_lists": str(lists.where(F.size("items") < settings.k).count()),
        "search": search.words,
        "recall_promised": str(settings.target_recall),
        "recall_measured": f"{calibration.recall:.4f}",
        "recall_low": f"{calibration.low:.4f}",
        "recall_curve": _curve(calibration),
        "index_id": inputs.searcher.index_id,
        "cooccurrence_share": str(context.config.item_item.share),
    }


def _for_each(context: RunContext, people: DataFrame, users: DataFrame) -> DataFrame:
    """Rows of user_id and seen with each user's `rules` (bits), `only`, and `seen` with all items that are kept off."""
    settings = context.config.recommend
    people = _with_rules(context, people, users)
    if settings.repeatable_events or settings.repurchase_days:
        kept_off = rules.not_again(
            context.log(),
            context.read(schemas.ITEMS),
            settings.repeatable_events,
            settings.repurchase_days,
        )
        people = people.drop("seen").join(kept_off, on="user_id", how="left")
        people = people.withColumn("seen", F.coalesce("seen", F.array()))
    if settings.deny.path:
        people = people.join(
            _by_user(context, "deny", settings.deny, "denied"), on="user_id", how="left"
        )
        more = F.array_union("seen", F.coalesce("denied", F.array()))
        people = people.withColumn("seen", F.array_sort(more)).drop("denied")
    if settings.allow.path:
        people = people.join(
            _by_user(context, "allow", settings.allow, "only"), on="user_id", how="left"
        )
    return people


def _with_rules(context: RunContext, people: DataFrame, users: DataFrame) -> DataFrame:
    """The rows with `rules`, the bits of the rules that apply to the user."""
    everybody, some = rules.applying(users, context.config.recommend.rules)
    for_all = F.lit(everybody).cast("bigint")
    if some is None:
        return people.withColumn("rules", for_all)
    bits = F.coalesce("rules", F.lit(0)).bitwiseOR(for_all)
    return people.join(some, on="user_id", how="left").withColumn("rules", bits)


def _named(context: RunContext, key: str, source: Source) -> DataFrame:
    """user_id, item_id of a list of items."""
    rows = reader.read(context.spark, f"recommend.{key}", source)
    return rows.select(*(F.col("fields")[name].alias(name) for name in ("user_id", "item_id")))


def _by_user(context: RunContext, key: str, source: Source, name: str) -> DataFrame:
    theirs = _named(context, key, source).where(f"NOT {_FORALL}").groupBy("user_id")
    return theirs.agg(F.array_sort(F.collect_set("item_id")).alias(name))


def _offered_to_all(context: RunContext, items: DataFrame) -> DataFrame:
    """The items; what is denied to all, or isn't among what alone is allowed to all, counts as unavailable."""
    for key, source, good in (
        ("deny", context.config.recommend.deny, False),
        ("allow", context.config.recommend.allow, True),
    ):
        listed = _named(context, key, source).where(_FORALL) if source.path else None
        if listed is None or listed.isEmpty():
            continue
        marked = listed.select("item_id", F.lit(True).alias("listed")).distinct()
        items = items.join(marked, on="item_id", how="left")
        right = F.col("listed").isNotNull() if good else F.col("listed").isNull()
        items = items.withColumn("available", F.col("available") & right).drop("listed")
    return items


def _waiting(context: RunContext, inputs: _Inputs) -> tuple[DataFrame, popularity.Best]:
    """Users who get a popular list, and what is popular with their like.

    They are in the log or in `users`, are no bots, agree to lists and have no usable profile.
    """
    log = context.log()
    users = inputs.users
    robots = profiling.bots(log, context.config.profiles.bot_events_per_day)
    people = log.join(robots, on="user_id", how="left_anti")
    met = people.groupBy("user_id").agg(F.array_sort(F.collect_set("item_id")).alias("seen"))
    waiting = (
        people.select("user_id")
        .unionByName(users.select("user_id"))
        .distinct()
        .join(robots, on="user_id", how="left_anti")
        .join(inputs.refused, on="user_id", how="left_anti")
        .join(inputs.usable.select("user_id"), on="user_id", how="left_anti")
        .join(met, on="user_id", how="left")
        .withColumn("seen", F.coalesce("seen", F.array()))
        .join(users.select("user_id", "segment"), on="user_id", how="left")
    )
    return _for_each(context, waiting, users), _popular(context, people, inputs)


def _popular(context: RunContext, events: DataFrame, inputs: _Inputs) -> popularity.Best:
    """The popular items of each segment, for each combination of rules that applies to a user."""
    everybody, some = rules.applying(inputs.users, context.config.recommend.rules)
    combinations = {everybody}
    if some is not None:
        bits = some.select("rules").distinct().collect()
        combinations |= {everybody | row["rules"] for row in bits}
    counts = popularity.counts(events, context.read(schemas.ITEMS), inputs.users).persist()
    best: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    for combination in sorted(combinations):
        required = F.lit(combination | AVAILABLE)
        allowed = inputs.item_rows.where(F.col("allowed").bitwiseAND(required) == required)
        shares = popularity.best(counts, allowed).toArrow()
        best |= popularity.placed(shares, combination, inputs.searcher)
    counts.unpersist()
    return best


def _matching(context: RunContext, profiles: DataFrame, searcher: Searcher) -> ranking.Matching:
    """Matching by the profiles' shape, and with co-occurrence counted in the same profiles, where it has a share."""
    settings, profile = context.config.item_item, context.config.profiles
    content = ranking.Matching(profile.shape, tastes_per_user=profile.tastes)
    if not settings.share:
        return content
    gigabytes = len(searcher) * settings.max_neighbors * 60 / 1e9
    context.reporter.info(
        f"counting what is found together, needs up to {gigabytes:.2f} GB on the driver"
    )
    pairs = item_item.pairs(profiles, settings).toArrow()
    folder = build_item_item(pairs, searcher, Path(context.config.index.folder) / "cooccurrence")
    opens = ship(context.spark, folder, context.config.index.broadcast_gb, ItemItemScores.open)
    return replace(
        content, share=settings.share, position_decay=settings.position_decay, opens=opens
    )


def _neighbours(
    context: RunContext,
    searcher: Searcher,
    open_searcher: Callable[[], Searcher],
    effort: Effort,
    sample: pa.Table,
) -> Callable[[], Neighbors]:
    """What gives a worker every item's neighbours, deep enough for most users; they are searched here."""
    items, folder = len(searcher), Path(context.config.index.folder) / "neighbours"
    depth = neighbors.needed_depth(effort.candidates, sample, items)
    context.reporter.info(
        f"searching the {depth} neighbours of each of {items:,} items, needs "
        f"{neighbors.size_gb(items, depth):.2f} GB in {folder}"
    )
    made = neighbors_file.build(
        context.spark, searcher, open_searcher, Effort(effort.leaves, depth), folder
    )
    return ship(context.spark, made, context.config.index.broadcast_gb, Neighbors.open)


def _curve(measured: Calibration) -> str:
    """What was tried, as JSON: leaves, candidates, recall, its lower bound, lists a second; and of an exact search; and
    what was taken, null for exact search."""
    tried = [
        [
            each.effort.leaves,
            each.effort.candidates,
            round(each.recall, 4),
            round(each.low, 4),
            round(each.per_second),
        ]
        for each in measured.tried
    ]
    exact, effort = measured.exact_per_second, measured.effort
    taken = [effort.leaves, effort.candidates] if effort else None
    return json.dumps({"tried": tried, "exact": round(exact) if exact else None, "taken": taken})


def inputs_fingerprint(context: RunContext) -> object:
    """None where items are named by a list: it may say something else each time."""
    if context.config.recommend.deny.path or context.config.recommend.allow.path:
        return None
    settings = context.config.recommend.model_dump(mode="json")
    blend = context.config.item_item.model_dump(mode="json")
    shape = [context.config.profiles.shape, context.config.profiles.tastes]
    return [settings, blend, *shape, context.config.representation, index_id(context)]
