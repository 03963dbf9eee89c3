"""Recommend: everybody's list, by taste or by popularity, under the shop's rules.

Knows who gets a list and which tables it comes from. How one list is made is the stage's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index import neighbors
from vlm4rec_spark.models.index.build import build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.calibration import Calibration, EffortTrial
from vlm4rec_spark.models.ranking.list_rules import AVAILABLE, ListRules
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.pipeline.index import index_folder, index_id
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark import neighbors_file
from vlm4rec_spark.stages import item_item, popularity, rules
from vlm4rec_spark.stages import profiles as profiles_stage
from vlm4rec_spark.stages import recommend as stage
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.state import CalibrationState, StageOutput, TriedEffort

_EVERYBODY = "coalesce(user_id, '') = ''"
"""A row of an allow or deny list without a user counts for all users."""


@dataclass(frozen=True)
class _Inputs:
    """What the lists are made from.

    `item_rows` are those of `rules.rules_by_item`, and `list_rules` is made of them. `refused`
    holds the user_id of users without consent. `usable` holds the profiles that have a vector and
    consent, with the user's rules.
    """

    folder: Path
    searcher: Searcher
    users: DataFrame
    refused: DataFrame
    item_rows: DataFrame
    list_rules: ListRules
    profiles: DataFrame
    usable: DataFrame
    usable_count: int


@dataclass(frozen=True)
class _Search:
    """How the lists of `users` users are searched.

    `calibration` was measured, `description` says it in words, `matching` scores items, and
    `open_searcher` opens the index in a worker.
    """

    calibration: Calibration
    description: str
    users: int
    matching: stage.ProfileScoring
    open_searcher: Callable[[], Searcher]


def recommend(context: RunContext, result: StageResult) -> None:
    """Make everybody's list and replace the table by them, in one transaction."""
    inputs = _load(context)
    search = _choose_search(context, inputs)
    lists = _score(context, inputs, search)
    with context.reporter.progress("recommending", search.users):
        result.ok = context.tables.replace(schemas.RECOMMENDATIONS, lists)
    _count(context, inputs, search, result)


def inputs_fingerprint(context: RunContext) -> object:
    """None with an allow or deny list: its source may have changed."""
    config = context.config
    if config.recommend.deny.path or config.recommend.allow.path:
        return None
    return [
        config.recommend.model_dump(mode="json"),
        config.item_item.model_dump(mode="json"),
        config.profiles.shape,
        config.profiles.tastes,
        config.representation,
        index_id(context),
    ]


def check(context: RunContext) -> None:
    """Raise UsageError for rules that don't fit the tables, and for missing allow or deny lists."""
    settings = context.config.recommend
    items = context.spark.createDataFrame([], schemas.ITEMS.schema)
    users = context.spark.createDataFrame([], schemas.USERS.schema)
    rules.check(items, users, settings.rules, settings.caps)
    sources = {"allow": settings.allow, "deny": settings.deny}
    for name, source in sources.items():
        if source.path:
            reader.read(context.spark, f"recommend.{name}", source)


def _load(context: RunContext) -> _Inputs:
    """Raises RunError for a missing table, or profiles of another representation."""
    settings = context.config.recommend
    profiles = context.read(schemas.PROFILES)
    folder = index_folder(context)
    searcher = Searcher.open(folder)
    users = context.tables.read(schemas.USERS)
    items = _with_availability(context, context.read(schemas.ITEMS))
    photos = context.tables.read(schemas.PHOTOS)
    item_rows = rules.rules_by_item(items, photos, settings.rules, settings.caps)
    by_position = rules.list_rules(item_rows.toArrow(), searcher, settings.variants, settings.caps)
    list_rules = replace(
        by_position,
        similarity_threshold=settings.similarity_threshold,
        min_score=settings.min_score,
        diversity=settings.diversity,
    )
    without_consent = users.where(~F.col("consent"))
    refused = without_consent.select("user_id")
    usable_count = _count_usable(context, profiles, refused)
    with_vector = profiles.where(F.col("embedding").isNotNull())
    consenting = with_vector.join(refused, on="user_id", how="left_anti")
    usable = _with_user_rules(context, consenting, users)
    return _Inputs(
        folder,
        searcher,
        users,
        refused,
        item_rows,
        list_rules,
        profiles,
        usable,
        usable_count,
    )


def _count_usable(context: RunContext, profiles: DataFrame, refused: DataFrame) -> int:
    """Profiles with a vector, of users who consent. Raises RunError for another representation."""
    is_different = F.col("representation") != context.config.representation
    has_vector = F.col("embedding").isNotNull()
    marked = refused.withColumn("refused", F.lit(True))
    different, usable = first_row(
        profiles.join(marked, on="user_id", how="left").agg(
            F.count_if(is_different), F.count_if(has_vector & F.isnull("refused"))
        )
    )
    if different:
        raise RunError(
            "recommend: the profiles are of another representation than the index. Run profiles "
            "again."
        )
    return usable


def _choose_search(context: RunContext, inputs: _Inputs) -> _Search:
    """Choose the cheapest search with the target recall on a sample of profiles; report it."""
    settings = context.config.recommend
    searcher = inputs.searcher
    matching = _matching(context, inputs.profiles, searcher)
    by_hash = inputs.usable.orderBy(F.xxhash64("user_id"), "user_id")
    sampled = by_hash.limit(settings.recall_sample)
    sample = sampled.select("embedding", "history", "seen", "rules").toArrow()
    calibration = stage.calibrate(
        searcher,
        sample,
        inputs.list_rules,
        settings.k,
        settings.target_recall,
        matching,
    )
    description = calibration.describe(searcher.leaf_count)
    users = inputs.usable_count
    context.reporter.info(
        f"recommending for {users:,} users, {description}, recall {calibration.recall:.3f} on "
        f"{calibration.users:,}"
    )
    open_searcher = context.ship(inputs.folder, Searcher.open)
    search = _Search(calibration, description, users, matching, open_searcher)
    if (
        calibration.effort
        and matching.shape == "max_similarity"
        and neighbors.pays_off(sample, users, len(searcher))
    ):
        open_neighbors = _open_neighbors(context, inputs, search, calibration.effort, sample)
        matching = replace(matching, open_neighbors=open_neighbors)
        search = replace(search, matching=matching)
    return search


def _score(
    context: RunContext,
    inputs: _Inputs,
    search: _Search,
) -> DataFrame:
    """Rows of `recommendations`: by taste, and by popularity for users without usable profile."""
    settings = context.config.recommend
    lists = stage.recommend(
        inputs.usable,
        search.open_searcher,
        inputs.list_rules,
        settings.k,
        search.calibration.effort,
        search.matching,
        settings.explain,
    )
    if settings.popularity_fallback:
        bots = _bots(context)
        log = context.log().join(bots, on="user_id", how="left_anti")
        users = _users_without_profile(context, log, bots, inputs)
        popular_items = _popular_items(context, log, inputs)
        by_popularity = popularity.PopularityScoring(popular_items)
        popular_lists = stage.recommend(
            users,
            search.open_searcher,
            inputs.list_rules,
            settings.k,
            None,
            by_popularity,
        )
        lists = lists.unionByName(popular_lists)
    return lists.select(
        "user_id",
        F.lit(schemas.DEFAULT_LIST).alias("list"),
        "items",
        "k",
        "index_id",
        F.lit(context.run_id).alias("run_id"),
        F.current_timestamp().alias("generated_at"),
    )


def _count(
    context: RunContext,
    inputs: _Inputs,
    search: _Search,
    result: StageResult,
) -> None:
    """Fill the result from the table as it was written."""
    settings = context.config.recommend
    calibration = search.calibration
    lists = context.tables.read(schemas.RECOMMENDATIONS)
    sizes = lists.select("user_id", F.size("items").alias("size"))
    profiles = inputs.profiles.select("user_id")
    result.skipped, short_lists = first_row(
        profiles.join(sizes, on="user_id", how="full_outer").agg(
            F.count_if(F.isnull("size")), F.count_if(F.col("size") < settings.k)
        )
    )
    result.output = StageOutput(
        index_id=inputs.searcher.index_id,
        calibration=_calibration_state(calibration, settings.target_recall),
    )
    result.details = {
        "k": str(settings.k),
        "users": str(search.users),
        "popular_lists": str(result.ok - search.users),
        "short_lists": str(short_lists),
        "search": search.description,
        "recall_promised": str(settings.target_recall),
        "recall_measured": f"{calibration.recall:.4f}",
        "recall_low": f"{calibration.low:.4f}",
        "index_id": inputs.searcher.index_id,
        "cooccurrence_share": str(context.config.item_item.share),
    }


def _calibration_state(calibration: Calibration, target_recall: float) -> CalibrationState:
    effort = calibration.effort
    return CalibrationState(
        target_recall,
        effort.leaves if effort else None,
        effort.candidates if effort else None,
        calibration.recall,
        calibration.low,
        calibration.users,
        calibration.exact_per_second,
        tuple(_tried_effort(tried) for tried in calibration.trials),
    )


def _tried_effort(tried: EffortTrial) -> TriedEffort:
    return TriedEffort(
        tried.effort.leaves,
        tried.effort.candidates,
        tried.recall,
        tried.low,
        tried.per_second,
    )


def _with_user_rules(context: RunContext, rows: DataFrame, users: DataFrame) -> DataFrame:
    """Rows with `rules` (bits) and, for an allow list, `only`. `seen` becomes all exclusions."""
    settings = context.config.recommend
    rows = _with_rule_bits(context, rows, users)
    if settings.repeatable_events or settings.repurchase_days:
        excluded = rules.not_repeatable(
            context.log(),
            context.read(schemas.ITEMS),
            settings.repeatable_events,
            settings.repurchase_days,
        )
        rows = rows.drop("seen").join(excluded, on="user_id", how="left")
        seen = F.coalesce("seen", F.array())
        rows = rows.withColumn("seen", seen)
    if settings.deny.path:
        denied = _items_by_user(context, "deny", settings.deny, "denied")
        rows = rows.join(denied, on="user_id", how="left")
        denied_items = F.coalesce("denied", F.array())
        seen = F.array_sort(F.array_union("seen", denied_items))
        rows = rows.withColumn("seen", seen).drop("denied")
    if settings.allow.path:
        allowed = _items_by_user(context, "allow", settings.allow, "only")
        rows = rows.join(allowed, on="user_id", how="left")
    return rows


def _with_rule_bits(
    context: RunContext,
    rows: DataFrame,
    users: DataFrame,
) -> DataFrame:
    """The rows with `rules`, the bits of the rules that apply to the user."""
    everybody, some = rules.rules_by_user(users, context.config.recommend.rules)
    bits = F.lit(everybody).cast("bigint")
    if some is not None:
        rows = rows.join(some, on="user_id", how="left")
        user_bits = F.coalesce("rules", F.lit(0))
        bits = user_bits.bitwiseOR(bits)
    return rows.withColumn("rules", bits)


def _listed_items(
    context: RunContext,
    key: str,
    source: Source,
) -> DataFrame:
    """user_id, item_id of an allow or deny list."""
    rows = reader.read(context.spark, f"recommend.{key}", source)
    return rows.select("fields.user_id", "fields.item_id")


def _items_by_user(
    context: RunContext,
    key: str,
    source: Source,
    column: str,
) -> DataFrame:
    """user_id and, in `column`, the items of an allow or deny list."""
    rows = _listed_items(context, key, source)
    personal = rows.where(f"NOT {_EVERYBODY}")
    items = F.array_sort(F.collect_set("item_id"))
    return personal.groupBy("user_id").agg(items.alias(column))


def _with_availability(context: RunContext, items: DataFrame) -> DataFrame:
    """The items; those denied to all, or not among those allowed to all, aren't available."""
    settings = context.config.recommend
    sources = {"deny": settings.deny, "allow": settings.allow}
    for key, source in sources.items():
        if not source.path:
            continue
        listed = _listed_items(context, key, source).where(_EVERYBODY)
        if listed.isEmpty():
            continue
        marked = listed.select("item_id").distinct().withColumn("listed", F.lit(True))
        items = items.join(marked, on="item_id", how="left")
        is_listed = F.coalesce("listed", F.lit(False))
        offered = is_listed if key == "allow" else ~is_listed
        available = F.col("available") & offered
        items = items.withColumn("available", available).drop("listed")
    return items


def _bots(context: RunContext) -> DataFrame:
    limit = context.config.profiles.bot_events_per_day
    return profiles_stage.bots(context.log(), limit)


def _users_without_profile(
    context: RunContext,
    log: DataFrame,
    bots: DataFrame,
    inputs: _Inputs,
) -> DataFrame:
    """Users who get a popular list, with seen, segment and rules.

    They are in the log or in `users`, are no bots, consent to lists and have no usable profile.
    """
    users = inputs.users
    items = F.array_sort(F.collect_set("item_id"))
    seen = log.groupBy("user_id").agg(items.alias("seen"))
    segments = users.select("user_id", "segment")
    rows = (
        log.select("user_id")
        .unionByName(users.select("user_id"))
        .distinct()
        .join(bots, on="user_id", how="left_anti")
        .join(inputs.refused, on="user_id", how="left_anti")
        .join(inputs.usable, on="user_id", how="left_anti")
        .join(seen, on="user_id", how="left")
        .withColumn("seen", F.coalesce("seen", F.array()))
        .join(segments, on="user_id", how="left")
    )
    return _with_user_rules(context, rows, users)


def _popular_items(
    context: RunContext,
    log: DataFrame,
    inputs: _Inputs,
) -> popularity.PopularByRules:
    """The popular items of each segment, for each combination of rules that applies to a user."""
    everybody, some = rules.rules_by_user(inputs.users, context.config.recommend.rules)
    combinations = {everybody}
    if some is not None:
        bits = some.select("rules").distinct().collect()
        combinations |= {everybody | row["rules"] for row in bits}
    items = context.read(schemas.ITEMS)
    counts = popularity.count_users(log, items, inputs.users).persist()
    popular = {}
    for combination in sorted(combinations):
        required = F.lit(combination | AVAILABLE)
        passed = F.col("allowed").bitwiseAND(required)
        allowed = inputs.item_rows.where(passed == required)
        shares = popularity.popular_items(counts, allowed).toArrow()
        popular[combination] = popularity.by_position(shares, inputs.searcher)
    counts.unpersist()
    return popular


def _matching(
    context: RunContext,
    profiles: DataFrame,
    searcher: Searcher,
) -> stage.ProfileScoring:
    """By the profiles' shape, and with co-occurrence counted in the profiles if it has a share."""
    settings = context.config.item_item
    content = stage.ProfileScoring(
        context.config.profiles.shape,
        max_tastes=context.config.profiles.tastes,
    )
    if not settings.share:
        return content
    gigabytes = len(searcher) * settings.max_neighbors * 60 / 1e9
    context.reporter.info(f"counting co-occurrences, needs up to {gigabytes:.2f} GB on the driver")
    pairs = item_item.pairs(profiles, settings).toArrow()
    folder = Path(context.config.index.folder) / "item_item"
    built = build_item_item(pairs, searcher, folder)
    return replace(
        content,
        share=settings.share,
        position_decay=settings.position_decay,
        open_item_item=context.ship(built, ItemItemScores.open),
    )


def _open_neighbors(
    context: RunContext,
    inputs: _Inputs,
    search: _Search,
    effort: Effort,
    sample: pa.Table,
) -> Callable[[], Neighbors]:
    """Search every item's neighbors, deep enough for most users; returns how workers open them."""
    searcher = inputs.searcher
    items = len(searcher)
    folder = Path(context.config.index.folder) / "neighbors"
    k = context.config.recommend.k
    candidates = effort.candidates + inputs.list_rules.initial_depth(k) - k
    depth = neighbors.needed_depth(candidates, sample, items)
    context.reporter.info(
        f"searching the {depth} neighbors of each of {items:,} items, needs "
        f"{neighbors.size_gb(items, depth):.2f} GB in {folder}"
    )
    built = neighbors_file.build(
        context.spark,
        searcher,
        search.open_searcher,
        Effort(effort.leaves, depth),
        folder,
    )
    return context.ship(built, Neighbors.open)
