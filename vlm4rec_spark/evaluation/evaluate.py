"""Runs the arms as of each cut and measures their lists. Writes nothing but temporary indexes."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation import arms, guards, metric_rows, splits
from vlm4rec_spark.evaluation.arm_indexes import ArmIndexes
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.list_batches import user_item_codes
from vlm4rec_spark.evaluation.metric_rows import ArmLists
from vlm4rec_spark.evaluation.point_in_time import EvaluationTables, PointInTime
from vlm4rec_spark.evaluation.slices import slices
from vlm4rec_spark.evaluation.splits import Split
from vlm4rec_spark.stages import profiles


class Evaluation(NamedTuple):
    """Rows of `metrics` without run_id, and facts by split."""

    rows: list[dict]
    facts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EvaluationInputs:
    """What all splits share. log: without bots. catalogue: category and first_seen_at of the
    candidates by item_id, sorted. available: the number of available items."""

    tables: EvaluationTables
    settings: EvaluateSettings
    serving: ServingConfig
    log: DataFrame
    catalogue: pd.DataFrame
    available: int
    indexes: ArmIndexes


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
    evaluation = Evaluation([], {})
    representations = arms.required_representations(compared_arms, serving)
    with open_inputs(tables, settings, serving, representations) as inputs:
        if not len(inputs.catalogue):
            names = ", ".join(settings.arms)
            info(f"nothing to evaluate: no available item has its own vector in each of {names}")
            return evaluation
        for split in splits.of(inputs.log, settings):
            with open_point_in_time(spark, inputs, split) as point_in_time:
                if point_in_time is None:
                    cut = split.cut or "the first event"
                    info(f"{split.name}: no test users, nobody has a new item after {cut}")
                    continue
                rows, facts = _evaluate_split(point_in_time, inputs, compared_arms, info)
                evaluation.rows.extend(rows)
                evaluation.facts[split.name] = facts
    return evaluation


@contextmanager
def open_inputs(
    tables: EvaluationTables,
    settings: EvaluateSettings,
    serving: ServingConfig,
    representations: set[str],
) -> Iterator[EvaluationInputs]:
    """What all splits share. Candidates are the available items that every arm can rank: a real
    vector in each of the representations, no fallback."""
    available = _available_items(tables.items)
    # Bots would blur the popularity, and are no test users.
    log = profiles.without_bots(tables.interactions, serving.profiles.bot_events_per_day).persist()
    with tempfile.TemporaryDirectory(prefix=f"vlm4rec-{os.getpid()}-evaluate-") as folder:
        indexes = ArmIndexes(tables.embeddings, serving.representation, Path(folder))
        candidates = indexes.common_items(available.index, representations)
        try:
            yield EvaluationInputs(
                tables,
                settings,
                serving,
                log,
                available.loc[candidates],
                len(available),
                indexes,
            )
        finally:
            log.unpersist()


def _available_items(items: DataFrame) -> pd.DataFrame:
    """category and first_seen_at by item_id, sorted; null if the table lacks the column."""
    columns = [
        F.col(name) if name in items.columns else F.lit(None).alias(name)
        for name in ("category", "first_seen_at")
    ]
    available = items.where("available").select("item_id", *columns)
    return cast(pd.DataFrame, available.toPandas()).set_index("item_id").sort_index()


@contextmanager
def open_point_in_time(
    spark: SparkSession,
    inputs: EvaluationInputs,
    split: Split,
) -> Iterator[PointInTime | None]:
    """What is known at a split's cut, for its test users; None if there are none."""
    if split.cut is None:
        # A window over the whole log, which many queries read.
        split = replace(split, train=split.train.persist())
    item_ids = inputs.catalogue.index
    candidates = spark.createDataFrame(item_ids.to_frame(), "item_id STRING")
    relevant = splits.relevant(split.train, split.test, candidates)
    order = F.xxhash64("user_id", F.lit(inputs.settings.seed))
    everyone = relevant.select("user_id", "relevant").orderBy(order, "user_id")
    test_users = everyone.limit(inputs.settings.max_users).persist()
    point_in_time = PointInTime(
        spark,
        inputs.tables,
        candidates,
        item_ids,
        inputs.indexes,
        split,
        test_users,
        inputs.settings,
        inputs.serving,
    )
    try:
        yield point_in_time if len(point_in_time.relevant) else None
    finally:
        point_in_time.close()
        test_users.unpersist()
        split.train.unpersist()


def _evaluate_split(
    point_in_time: PointInTime,
    inputs: EvaluationInputs,
    compared_arms: Sequence[Arm],
    info: Callable[[str], None],
) -> tuple[list[dict], dict[str, Any]]:
    """Rows of `metrics`, and facts about the split."""
    split = point_in_time.split
    users = point_in_time.users
    items = len(point_in_time.item_ids)
    guards.no_leak(split.name, split.cut, users)
    lists = _lists(point_in_time, compared_arms, info)
    representations = arms.required_representations(compared_arms, inputs.serving)
    vectors = {name: _candidate_vectors(inputs, name) for name in sorted(representations)}
    # Diversity is measured in the served representation, or else in the first one.
    first = next(iter(vectors.values()), None)
    arm_lists = ArmLists(
        lists,
        user_item_codes(users["relevant"], point_in_time.item_ids),
        items,
        point_in_time.user_counts,
        point_in_time.total_users,
        vectors.get(inputs.serving.representation, first),
    )
    user_slices = slices(users, split.cut, point_in_time.user_counts, inputs.catalogue)
    rows = list(metric_rows.rows(split.name, arm_lists, user_slices, inputs.settings))
    duplicates = {name: guards.count_duplicates(matrix) for name, matrix in vectors.items()}
    arms_above_chance = metric_rows.above_chance(arm_lists, inputs.settings)
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
    facts["left_out_share"] = round(1 - items / inputs.available, 4)
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


def _candidate_vectors(inputs: EvaluationInputs, representation: str) -> np.ndarray:
    searcher = inputs.indexes.searcher(representation)
    return np.asarray(searcher.vectors[searcher.positions(inputs.catalogue.index.tolist())])
