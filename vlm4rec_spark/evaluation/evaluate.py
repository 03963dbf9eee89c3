"""Runs the arms as of each cut and judges their lists. Knows how the stages fit together; writes nothing but a
temporary index per arm."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation import arms, splits
from vlm4rec_spark.evaluation.arms import EvaluateSettings, InUse
from vlm4rec_spark.evaluation.inference import bootstrap_interval, paired_p_value
from vlm4rec_spark.evaluation.metrics import METRICS, hits, per_user
from vlm4rec_spark.models.cooccurrence import Cooccurrence
from vlm4rec_spark.models.searcher import Searcher
from vlm4rec_spark.stages import cooccurrence, index, profiles, recommend

SLICES = (("history 1-4", 1, 4), ("history 5-19", 5, 19), ("history 20+", 20, 10**9))
_SHARE = 0.4
"""Co-occurrence's share in the arm `blend` where the lists in use have none."""
LEAST_USERS = 30
"""A slice of fewer users gives no number: its interval would be wider than any difference."""


@dataclass(frozen=True)
class Tables:
    """What an evaluation reads; embeddings hold one encoder per representation."""

    interactions: DataFrame
    items: DataFrame
    embeddings: DataFrame


def evaluate(
    spark: SparkSession, tables: Tables, settings: EvaluateSettings, in_use: InUse, say: Callable[[str], None],
) -> tuple[list[dict], dict[str, str]]:  # fmt: skip
    """Rows of `metrics` (without run_id) and, per split, what was judged; none where nobody can be judged."""
    rows, details, profile = [], {}, in_use.profiles
    # A bot's clicks would blur the popularity that arms are compared with, and a bot can't be judged.
    robots = profiles.bots(tables.interactions, profile.bot_events_per_day)
    log = tables.interactions.join(robots, on="user_id", how="left_anti")
    candidates = arms.candidates(tables.embeddings, tables.items, arms.needed(settings.arms, in_use)).persist()
    there = candidates.count()
    available = tables.items.where("available").count()
    if not there:
        say(f"nothing to judge: no available item has a vector of its own in each of {', '.join(settings.arms)}")
        return [], {}
    for split in settings.splits:
        cut = None
        if split == "time":
            cut = settings.cut or splits.last_share(log, settings.test_share)
            known, hidden = splits.time_split(log, cut)
        else:
            known, hidden = splits.leave_one_out(log)
        known.persist()
        judged = _judged(splits.relevant(known, hidden, candidates), settings).persist()
        users = judged.count()
        if not users:
            say(f"{split}: nobody to judge, no user has a new item after {cut or 'the first event'}")
            known.unpersist()
            continue
        theirs = known.join(judged.select("user_id"), on="user_id", how="left_semi")
        histories = profiles.histories(theirs, tables.items, profile).persist()
        everybody = profiles.histories(known, tables.items, profile)
        events = _events_per_item(known, candidates)
        lists = {}
        for arm in settings.arms:
            say(f"{split}: {arm}, {users:,} users, {there:,} candidates")
            with tempfile.TemporaryDirectory(prefix=f"vlm4rec-{os.getpid()}-evaluate-") as folder:
                if arm in ("random", "popularity"):
                    seed = settings.seed if arm == "random" else None
                    ranked = arms.scored_lists(histories, events, settings.k, seed)
                else:
                    ranked = _matched(
                        spark, arm, tables, histories, everybody, candidates, settings.k, in_use, Path(folder)
                    )
                lists[arm] = _collected(judged, ranked)
        sizes = _pandas(histories.select("user_id", F.size("seen").alias("seen"))).set_index("user_id")["seen"]
        rows += list(_rows(split, lists, sizes, settings))
        share = 1 - there / available
        details[split] = json.dumps(
            {"cut": cut, "users": users, "candidates": there, "left_out_share": round(share, 4)}
        )
        for cached in (histories, judged, known):
            cached.unpersist()
    candidates.unpersist()
    return rows, details


def _judged(relevant: DataFrame, settings: EvaluateSettings) -> DataFrame:
    order = F.xxhash64("user_id", F.lit(settings.seed))
    return relevant.orderBy(order, "user_id").limit(settings.max_users)


def _events_per_item(known: DataFrame, candidates: DataFrame) -> pd.Series:
    """How many events each candidate has, by item_id in its order."""
    counts = known.groupBy("item_id").agg(F.count(F.lit(1)).alias("events"))
    everyone = candidates.join(counts, on="item_id", how="left").select("item_id", F.coalesce("events", F.lit(0)))
    return _pandas(everyone.toDF("item_id", "events").orderBy("item_id")).set_index("item_id")["events"]


def _matched(
    spark: SparkSession, arm: str, tables: Tables, histories: DataFrame, everybody: DataFrame, candidates: DataFrame,
    k: int, in_use: InUse, folder: Path,
) -> DataFrame:  # fmt: skip
    """user_id, items of an arm that matches profiles with items, as recommend does; `folder` must outlive the lists."""
    representation, shape = (in_use.representation, in_use.profiles.shape) if arm == arms.BLEND else arms.parts(arm)
    share = {arms.BLEND: in_use.cooccurrence.share or _SHARE, "cooccurrence": 1.0}.get(arm, 0.0)
    if arm == "cooccurrence":  # content has no share in it: any vector will do
        vector, none = F.array(F.lit(1.0).cast("float")), F.lit("")
        rows = candidates.select("item_id", vector.alias("embedding"), none.alias("text_sha256"), none.alias("text"))
        rows = rows.orderBy("item_id")
    else:
        rows = (
            tables.embeddings.where((F.col("representation") == representation) & ~F.col("fallback"))
            .select("item_id", "embedding", "text_sha256", F.lit("").alias("text")).orderBy("item_id")
        )  # fmt: skip
    out = rows.select("item_id").join(candidates.select("item_id"), on="item_id", how="left_anti")
    # Exact search: an arm is judged by its vectors, not by what an approximate index loses.
    built = index.build(rows.toArrow(), representation, "evaluate", folder, scann_from=2**62)
    open_searcher = index.ship(spark, built, float("inf"), Searcher.open)
    matching = recommend.Matching(shape)
    if share:
        found = cooccurrence.pairs(everybody, in_use.cooccurrence)
        counted = cooccurrence.build(found, Searcher.open(built), folder / "cooccurrence")
        opens = index.ship(spark, counted, float("inf"), Cooccurrence.open)
        matching = recommend.Matching(shape, share, in_use.cooccurrence.position_decay, opens)
    vectors = profiles.with_embedding(histories, representation, open_searcher)
    withdrawn = [row["item_id"] for row in out.collect()]
    lists = recommend.recommend(vectors, open_searcher, withdrawn, k, None, matching)
    return lists.select("user_id", F.col("items.item_id").alias("items"))


def _collected(judged: DataFrame, lists: DataFrame) -> pd.DataFrame:
    """user_id, relevant, items of every judged user, sorted; an empty list where the arm gave none."""
    joined = _pandas(judged.join(lists, on="user_id", how="left")).sort_values("user_id", ignore_index=True)
    joined["items"] = [[] if items is None else list(items) for items in joined["items"]]
    return joined


def _pandas(rows: DataFrame) -> pd.DataFrame:
    return cast(pd.DataFrame, rows.toPandas())


def _rows(split: str, lists: dict[str, pd.DataFrame], sizes: pd.Series, settings: EvaluateSettings) -> Iterable[dict]:
    values = {
        arm: per_user(hits(table["items"], table["relevant"], settings.k), table["relevant"].map(len).to_numpy())
        for arm, table in lists.items()
    }
    seen = sizes.reindex(next(iter(lists.values()))["user_id"]).fillna(0).to_numpy()
    groups = [("all", np.ones(len(seen), bool))]
    groups += [(name, (seen >= least) & (seen <= most)) for name, least, most in SLICES]
    for arm, by_metric in values.items():
        for metric in METRICS:
            for name, members in groups:
                users = int(members.sum())
                row = {
                    "split": split, "arm": arm, "metric": metric, "k": settings.k, "slice": name, "users": users,
                    "value": None, "low": None, "high": None, "control": None, "p_value": None,
                }  # fmt: skip
                if users >= LEAST_USERS:
                    chosen = by_metric[metric][members]
                    low, high = bootstrap_interval(chosen, settings.seed)
                    row |= {"value": float(chosen.mean()), "low": low, "high": high}
                    if name == "all" and arm != settings.control and settings.control in values:
                        against = values[settings.control][metric][members]
                        p_value = paired_p_value(chosen, against, settings.seed)
                        row |= {"control": settings.control, "p_value": p_value}
                yield row
