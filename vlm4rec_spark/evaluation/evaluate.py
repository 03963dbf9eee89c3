"""Runs the arms as of each cut and judges their lists. Writes nothing but temporary indexes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation import arms, guards, metric_rows, splits
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.metrics import hits
from vlm4rec_spark.evaluation.point_in_time import EvaluationTables, PointInTime
from vlm4rec_spark.evaluation.slices import slices
from vlm4rec_spark.evaluation.splits import Split
from vlm4rec_spark.stages import profiles

__all__ = [
    "EvaluationTables",
    "candidates",
    "codes",
    "evaluate",
    "needed",
    "open_point_in_time",
    "without_bots",
]

_APART = 3
"""Users of each kind whom one arm served and the other didn't, for the report."""


def needed(settings: EvaluateSettings, in_use: ServingConfig) -> set[str]:
    """The representations of which the arms need vectors."""
    return arms.needed(
        [arms.resolve(name, settings.custom_arms, in_use) for name in settings.arms], in_use
    )


def evaluate(
    spark: SparkSession,
    tables: EvaluationTables,
    settings: EvaluateSettings,
    in_use: ServingConfig,
    say: Callable[[str], None],
) -> tuple[list[dict], dict[str, str]]:
    """Rows of `metrics` (without run_id) and, per split, what was judged; none where nobody can be judged.

    Raises RunError for a leak, UsageError for arms that can't be made.
    """
    chosen = [arms.resolve(name, settings.custom_arms, in_use) for name in settings.arms]
    rows, details = [], {}
    log = without_bots(tables.interactions, in_use)
    complete = candidates(tables, arms.needed(chosen, in_use)).persist()
    available = tables.items.where("available").count()
    if not complete.count():
        say(
            f"nothing to judge: no available item has a vector of its own in each of {', '.join(settings.arms)}"
        )
        return [], {}
    for split in splits.of(log, settings):
        with open_point_in_time(spark, tables, complete, split, settings, in_use) as world:
            if world is None:
                say(
                    f"{split.name}: nobody to judge, no user has a new item after {split.cut or 'the first event'}"
                )
                continue
            found, facts = _judge(world, split, chosen, say)
            rows += found
            facts["left_out_share"] = round(1 - len(world.items) / available, 4)
            details[split.name] = json.dumps(facts)
    complete.unpersist()
    return rows, details


def without_bots(log: DataFrame, in_use: ServingConfig) -> DataFrame:
    """The log without bots: their clicks would blur the popularity, and a bot can't be judged."""
    robots = profiles.bots(log, in_use.profiles.bot_events_per_day)
    return log.join(robots, on="user_id", how="left_anti")


def candidates(tables: EvaluationTables, needed: set[str]) -> DataFrame:
    """item_id of the available items that every arm can rank: a real vector in each representation, no fallback."""
    real = tables.embeddings.where(~F.col("fallback") & F.col("representation").isin(*needed))
    counted = real.groupBy("item_id").agg(F.countDistinct("representation").alias("there"))
    complete = counted.where(F.col("there") == len(needed))
    available = tables.items.where("available").select("item_id")
    return available.join(complete, on="item_id", how="left_semi") if needed else available


@contextmanager
def open_point_in_time(
    spark: SparkSession,
    tables: EvaluationTables,
    complete: DataFrame,
    split: Split,
    settings: EvaluateSettings,
    in_use: ServingConfig,
) -> Iterator[PointInTime | None]:
    """What is known at a split's cut, for the users who can be judged; None where there is none of them."""
    known = split.train.persist()
    order = F.xxhash64("user_id", F.lit(settings.seed))
    everyone = splits.relevant(known, split.test, complete)
    judged = everyone.orderBy(order, "user_id").limit(settings.max_users).persist()
    ids = pd.Index(sorted(row["item_id"] for row in complete.collect()), dtype=object)
    with tempfile.TemporaryDirectory(prefix=f"vlm4rec-{os.getpid()}-evaluate-") as folder:
        world = PointInTime(
            spark, tables, complete, ids, known, judged, settings, in_use, Path(folder), split.cut
        )
        try:
            yield None if judged.isEmpty() else world
        finally:
            world.close()
            judged.unpersist()
            known.unpersist()


def _judge(
    world: PointInTime, split: Split, chosen: Sequence[Arm], say: Callable[[str], None]
) -> tuple[list[dict], dict[str, object]]:
    settings, users, items = world.settings, world.users, len(world.items)
    guards.no_leak(split.name, split.cut, users)
    relevant = codes(users["relevant"], world.items)
    seen = codes(users["seen"], world.items)
    lists, started = {}, time.monotonic()
    for done, arm in enumerate(chosen):
        left = (
            f", {(time.monotonic() - started) / done * (len(chosen) - done):.0f} s left"
            if done
            else ""
        )
        say(f"{split.name}: {arm.name}, {len(users):,} users, {items:,} candidates{left}")
        lists[arm.name] = world.lists(arm, settings.lengths[-1])
        guards.nothing_seen(arm.name, lists[arm.name], seen, items)
    ranked = sorted(arms.needed(chosen, world.in_use))
    beside = (
        world.in_use.representation
        if world.in_use.representation in ranked
        else next(iter(ranked), None)
    )
    known_by, everybody = world.known_by()
    vectors = {name: _of(world, name) for name in ranked}
    judged = metric_rows.Judged(
        lists, relevant, items, known_by, everybody, vectors[beside] if beside else None
    )
    catalogue = _catalogue(world)
    found = list(
        metric_rows.rows(
            split.name, judged, slices(users, split.cut, known_by, catalogue), settings
        )
    )
    identical = {name: guards.identical(each) for name, each in vectors.items()}
    above = [
        name
        for name, each in metric_rows.shuffled(judged, settings).items()
        if guards.above_chance(each, settings.k, items)
    ]
    for name, count in identical.items():
        if count > guards.ALARM * items:
            say(
                f"{split.name}: {count:,} of {items:,} candidates share their {name} vector with another: their texts "
                "or photos are the same, or lost what told them apart"
            )
    for name in above:
        say(f"{split.name}: {name} finds more of exchanged items than chance does: something leaks")
    facts: dict[str, object] = {
        "cut": split.cut,
        "users": len(users),
        "candidates": items,
        "identical_vectors": identical,
        "above_chance": above,
        "apart": _discordant_users(world, lists, relevant, beside),
    }
    return found, facts | ({"settled": world.chosen} if world.chosen else {})


def codes(lists: pd.Series, items: pd.Index) -> np.ndarray:
    """Sorted codes, as in `metrics`, of lists of ids; ids that are no candidates are skipped."""
    sizes = [0 if each is None else len(each) for each in lists]
    flat = [item for each in lists if each is not None for item in each]
    place = items.get_indexer(pd.Index(flat, dtype=object))
    codes = np.repeat(np.arange(len(lists), dtype=np.int64), sizes) * len(items) + place
    return np.sort(codes[place >= 0])


def _of(world: PointInTime, representation: str) -> np.ndarray:
    searcher = world.searcher(representation)
    return np.asarray(searcher.vectors[searcher.positions(world.items.tolist())])


def _catalogue(world: PointInTime) -> pd.DataFrame:
    """category and first_seen_at of the candidates; null where the table hasn't got them."""
    there = world.tables.items
    names = ("category", "first_seen_at")
    columns = [F.col(name) if name in there.columns else F.lit(None).alias(name) for name in names]
    mine = there.join(world.candidates, on="item_id", how="left_semi")
    rows = cast(pd.DataFrame, mine.select("item_id", *columns).toPandas())
    return rows.set_index("item_id").reindex(world.items)


def _discordant_users(
    world: PointInTime, lists: dict[str, np.ndarray], relevant: np.ndarray, beside: str | None
) -> list[dict]:
    """Users for whom the arm of the lists in use found something and the control nothing, and the other way round."""
    settings = world.settings
    mine = arms.BLEND if world.in_use.item_item.share else world.in_use.representation
    shape = world.in_use.profiles.shape
    mine = mine if mine == arms.BLEND or shape == "mean" else f"{mine}/{shape}"
    mine = mine if mine in lists else beside or ""
    if mine not in lists or settings.control not in lists or mine == settings.control:
        return []
    found = {
        arm: hits(lists[arm][:, : settings.k], relevant, len(world.items))
        for arm in (mine, settings.control)
    }
    apart = []
    for one, other in ((mine, settings.control), (settings.control, mine)):
        only = np.flatnonzero(found[one].any(axis=1) & ~found[other].any(axis=1))
        for user in np.random.default_rng(settings.seed).permutation(only)[:_APART]:
            rank = int(found[one][user].argmax())
            apart.append(
                {
                    "user_id": world.users["user_id"][user],
                    "by": one,
                    "not_by": other,
                    "rank": rank + 1,
                    "item_id": world.items[lists[one][user, rank]],
                    "instead": [world.items[item] for item in lists[other][user, :3] if item >= 0],
                }
            )
    return apart
