"""Runs the arms as of each cut and measures their lists. Writes nothing but temporary indexes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation import arms, guards, metric_rows, splits
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.metric_rows import ArmLists
from vlm4rec_spark.evaluation.point_in_time import EvaluationTables, PointInTime
from vlm4rec_spark.evaluation.slices import slices
from vlm4rec_spark.evaluation.splits import Split
from vlm4rec_spark.stages import profiles


class Evaluation(NamedTuple):
    """Rows of `metrics` without run_id, and facts by split."""

    rows: list[dict]
    facts: dict[str, dict[str, Any]]


def required_representations(settings: EvaluateSettings, serving: ServingConfig) -> set[str]:
    """The representations whose vectors the arms need."""
    return arms.required_representations(_resolve(settings, serving), serving)


def _resolve(settings: EvaluateSettings, serving: ServingConfig) -> list[Arm]:
    return [arms.resolve(name, settings.custom_arms, serving) for name in settings.arms]


def evaluate(
    spark: SparkSession,
    tables: EvaluationTables,
    settings: EvaluateSettings,
    serving: ServingConfig,
    info: Callable[[str], None],
) -> Evaluation:
    """Evaluate all arms on all splits. A split without test users gives no rows.

    Raises RunError for a leak, UsageError for arms that can't be built.
    """
    compared_arms = _resolve(settings, serving)
    log = without_bots(tables.interactions, serving)
    complete = candidates(tables, arms.required_representations(compared_arms, serving)).persist()
    available = tables.items.where("available").count()
    evaluation = Evaluation([], {})
    if not complete.count():
        names = ", ".join(settings.arms)
        info(f"nothing to evaluate: no available item has its own vector in each of {names}")
        return evaluation
    for split in splits.of(log, settings):
        with open_point_in_time(
            spark,
            tables,
            complete,
            split,
            settings,
            serving,
        ) as point_in_time:
            if point_in_time is None:
                cut = split.cut or "the first event"
                info(f"{split.name}: no test users, nobody has a new item after {cut}")
                continue
            rows, facts = _evaluate_split(point_in_time, compared_arms, info)
            evaluation.rows.extend(rows)
            facts["left_out_share"] = round(1 - len(point_in_time.item_ids) / available, 4)
            evaluation.facts[split.name] = facts
    complete.unpersist()
    return evaluation


def without_bots(log: DataFrame, serving: ServingConfig) -> DataFrame:
    """The log without bots: they would blur the popularity, and are no test users."""
    bots = profiles.bots(log, serving.profiles.bot_events_per_day)
    return log.join(bots, on="user_id", how="left_anti")


def candidates(tables: EvaluationTables, representations: set[str]) -> DataFrame:
    """item_id of the available items that every arm can rank: a real vector in each representation,
    no fallback."""
    available = tables.items.where("available").select("item_id")
    if not representations:
        return available
    required = F.col("representation").isin(*representations)
    real = tables.embeddings.where(~F.col("fallback") & required)
    counted = real.groupBy("item_id").agg(F.countDistinct("representation").alias("vectors"))
    complete = counted.where(F.col("vectors") == len(representations))
    return available.join(complete, on="item_id", how="left_semi")


@contextmanager
def open_point_in_time(
    spark: SparkSession,
    tables: EvaluationTables,
    complete: DataFrame,
    split: Split,
    settings: EvaluateSettings,
    serving: ServingConfig,
) -> Iterator[PointInTime | None]:
    """What is known at a split's cut, for its test users; None if there are none. complete: the
    candidates' item_id."""
    split = replace(split, train=split.train.persist())
    order = F.xxhash64("user_id", F.lit(settings.seed))
    everyone = splits.relevant(split.train, split.test, complete)
    test_users = everyone.orderBy(order, "user_id").limit(settings.max_users).persist()
    item_ids = pd.Index(sorted(row["item_id"] for row in complete.collect()), dtype=object)
    with tempfile.TemporaryDirectory(prefix=f"vlm4rec-{os.getpid()}-evaluate-") as folder:
        point_in_time = PointInTime(
            spark,
            tables,
            complete,
            item_ids,
            split,
            test_users,
            settings,
            serving,
            Path(folder),
        )
        try:
            yield None if test_users.isEmpty() else point_in_time
        finally:
            point_in_time.close()
            test_users.unpersist()
            split.train.unpersist()


def _evaluate_split(
    point_in_time: PointInTime,
    compared_arms: Sequence[Arm],
    info: Callable[[str], None],
) -> tuple[list[dict], dict[str, Any]]:
    """Rows of `metrics`, and facts about the split."""
    split = point_in_time.split
    settings = point_in_time.settings
    users = point_in_time.users
    items = len(point_in_time.item_ids)
    guards.no_leak(split.name, split.cut, users)
    lists = _lists(point_in_time, compared_arms, info)
    representations = arms.required_representations(compared_arms, point_in_time.serving)
    vectors = {name: _candidate_vectors(point_in_time, name) for name in sorted(representations)}
    # Diversity is measured in the served representation, or else in the first one.
    diversity_representation = next(iter(vectors), "")
    if point_in_time.serving.representation in vectors:
        diversity_representation = point_in_time.serving.representation
    arm_lists = ArmLists(
        lists,
        user_item_codes(users["relevant"], point_in_time.item_ids),
        items,
        point_in_time.user_counts,
        point_in_time.total_users,
        vectors.get(diversity_representation),
    )
    user_slices = slices(users, split.cut, point_in_time.user_counts, _catalogue(point_in_time))
    rows = list(metric_rows.rows(split.name, arm_lists, user_slices, settings))
    duplicates = {name: guards.count_duplicates(matrix) for name, matrix in vectors.items()}
    arms_above_chance = metric_rows.above_chance(arm_lists, settings)
    for warning in _warnings(duplicates, arms_above_chance, items):
        info(f"{split.name}: {warning}")
    facts: dict[str, Any] = {
        "cut": split.cut,
        "users": len(users),
        "candidates": items,
        "identical_vectors": duplicates,
        "above_chance": arms_above_chance,
    }
    if point_in_time.tuned:
        facts["tuned"] = point_in_time.tuned
    return rows, facts


def _lists(
    point_in_time: PointInTime,
    compared_arms: Sequence[Arm],
    info: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """The longest lists of each arm, (users, longest) of positions. Raises RunError if one holds a
    seen item."""
    users = len(point_in_time.users)
    items = len(point_in_time.item_ids)
    seen = user_item_codes(point_in_time.users["seen"], point_in_time.item_ids)
    lists: dict[str, np.ndarray] = {}
    started = time.monotonic()
    for done, arm in enumerate(compared_arms):
        line = f"{point_in_time.split.name}: {arm.name}, {users:,} users, {items:,} candidates"
        if done:
            remaining = (time.monotonic() - started) / done * (len(compared_arms) - done)
            line += f", {remaining:.0f} s left"
        info(line)
        lists[arm.name] = point_in_time.lists(arm, point_in_time.settings.lengths[-1])
        guards.nothing_seen(arm.name, lists[arm.name], seen, items)
    return lists


def _warnings(
    duplicates: Mapping[str, int],
    above_chance: Sequence[str],
    items: int,
) -> Iterator[str]:
    for name, count in duplicates.items():
        if count > guards.ALARM * items:
            yield (
                f"{count:,} of {items:,} candidates share their {name} vector with another. "
                "Their texts or photos are equal, or lost what distinguished them."
            )
    for arm in above_chance:
        yield f"{arm} predicts shuffled items better than chance: something leaks"


def user_item_codes(lists: pd.Series, item_ids: pd.Index) -> np.ndarray:
    """Sorted codes, as in `metrics`, of lists of ids; ids that are no candidates are skipped."""
    sizes = [0 if ids is None else len(ids) for ids in lists]
    flat = [item_id for ids in lists if ids is not None for item_id in ids]
    positions = item_ids.get_indexer(pd.Index(flat, dtype=object))
    users = np.repeat(np.arange(len(lists), dtype=np.int64), sizes)
    return np.sort((users * len(item_ids) + positions)[positions >= 0])


def _candidate_vectors(point_in_time: PointInTime, representation: str) -> np.ndarray:
    searcher = point_in_time.searcher(representation)
    return np.asarray(searcher.vectors[searcher.positions(point_in_time.item_ids.tolist())])


def _catalogue(point_in_time: PointInTime) -> pd.DataFrame:
    """category and first_seen_at of the candidates; null if the table lacks the column."""
    items = point_in_time.tables.items
    columns = [
        F.col(name) if name in items.columns else F.lit(None).alias(name)
        for name in ("category", "first_seen_at")
    ]
    rows = items.join(point_in_time.candidates, on="item_id", how="left_semi")
    catalogue = cast(pd.DataFrame, rows.select("item_id", *columns).toPandas())
    return catalogue.set_index("item_id").reindex(point_in_time.item_ids)
