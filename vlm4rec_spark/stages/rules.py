"""Rules, groups and exclusions in SQL: what may be recommended, to whom, and what a user may not get again.

Knows tables; which of the allowed items get a place is `models/offer.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.list_rules import AVAILABLE, Cap, ListRules, Rule

_MORE = "attributes."


def check(
    items: DataFrame, users: DataFrame, rules: Sequence[Rule], caps: Mapping[str, int]
) -> None:
    """Raise UsageError for a predicate or a column that the tables' columns don't know; reads no row."""
    for number, rule in enumerate(rules):
        for rows, name, predicate in ((items, "items", rule.items), (users, "users", rule.users)):
            if predicate is None:
                continue
            try:
                kind = rows.select(F.expr(predicate)).schema[0].dataType.typeName()
            except AnalysisException as wrong:
                said = str(wrong).splitlines()[0]
                raise UsageError(
                    f"recommend.rules[{number}].{name}: {predicate!r} can't be asked of the table {name}: "
                    f"{said}"
                ) from None
            if kind != "boolean":
                raise UsageError(
                    f"recommend.rules[{number}].{name}: {predicate!r} is no condition, it gives a {kind}."
                )
    for column in caps:
        if not column.startswith(_MORE) and column not in items.columns:
            raise UsageError(
                f"recommend.caps: the table items has no column {column!r}. It has "
                f"{', '.join(items.columns)}; other columns are attributes.NAME."
            )


def item_rows(
    items: DataFrame, photos: DataFrame, rules: Sequence[Rule], caps: Mapping[str, int]
) -> DataFrame:
    """item_id, allowed (bits as in Offer), parent, photo (of the main one), cap_0, cap_1, …: for the driver."""
    allowed = F.when(F.col("available"), AVAILABLE).otherwise(0).cast("bigint")
    for number, rule in enumerate(rules):
        allowed = allowed.bitwiseOR(
            F.when(F.expr(rule.items), F.lit(2 << number)).otherwise(0).cast("bigint")
        )
    main = photos.where(F.col("position") == 0).select(
        "item_id", F.col("image_sha256").alias("photo")
    )
    groups = [
        _group(column).cast("string").alias(f"cap_{number}") for number, column in enumerate(caps)
    ]
    rows = items.select(
        "item_id", allowed.alias("allowed"), F.col("parent_id").alias("parent"), *groups
    )
    return rows.join(main, on="item_id", how="left")


def _group(column: str) -> Column:
    return (
        F.col("attributes")[column.removeprefix(_MORE)]
        if column.startswith(_MORE)
        else F.col(column)
    )


def list_rules(
    rows: pa.Table,
    searcher: Searcher,
    variants: Sequence[str],
    caps: Mapping[str, int],
    alike: float | None,
    least: float | None,
    diversity: float = 0.0,
) -> ListRules:
    """The offer of `item_rows`, by the positions of an index; an item of the index that isn't there isn't offered.

    variants: of "parent" and "photo" what makes two items variants of each other, also over a third one.
    """
    place = searcher.positions_of(rows["item_id"].combine_chunks())
    known, place = place >= 0, place[place >= 0]
    allowed = np.zeros(len(searcher), np.int64)
    allowed[place] = rows["allowed"].to_numpy()[known]

    def numbers(name: str) -> np.ndarray:
        codes = (
            rows[name]
            .combine_chunks()
            .dictionary_encode()
            .indices.fill_null(-1)
            .to_numpy()
            .astype(np.int64)
        )
        spread = np.full(len(searcher), -1, np.int64)
        spread[place] = codes[known]
        return spread

    same = _joined([numbers(name) for name in variants]) if variants else None
    if same is not None and len(np.unique(same)) == len(same):
        same = None  # nobody's variants: lists are simply the best items
    limits = [Cap(numbers(f"cap_{number}"), most) for number, most in enumerate(caps.values())]
    return ListRules(allowed, same, limits, alike, least, diversity)


def _joined(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of the groups that come of joining all that share an item."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    items, start, ones, others = len(groups[0]), len(groups[0]), [], []
    for numbers in groups:
        there = np.flatnonzero(numbers >= 0)
        ones.append(there)
        others.append(start + numbers[there])
        start += int(numbers.max(initial=-1)) + 1
    one, other = np.concatenate(ones), np.concatenate(others)
    graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(start, start))
    return connected_components(graph, directed=False)[1][:items].astype(np.int64)


def applying(users: DataFrame, rules: Sequence[Rule]) -> tuple[int, DataFrame | None]:
    """The bits of the rules for everybody; and user_id, rules of those to whom others apply, None if none does."""
    everybody, some = 0, list[Column]()
    for number, rule in enumerate(rules):
        if rule.users is None:
            everybody |= 2 << number
        else:
            some.append(F.when(F.expr(rule.users), F.lit(2 << number)).otherwise(0).cast("bigint"))
    if not some:
        return everybody, None
    bits = some[0]
    for other in some[1:]:
        bits = bits.bitwiseOR(other)
    return everybody, users.select("user_id", bits.alias("rules")).where(F.col("rules") != 0)


def not_again(
    log: DataFrame, items: DataFrame, again: Sequence[str], repurchase_days: Mapping[str, int]
) -> DataFrame:
    """user_id, seen: the items that a user's events keep off the list.

    Events of the types `again` keep nothing off; others do so for ever, or where the item's category has a window for
    that many days before the log's last event.
    """
    events = log.where(~F.col("event_type").isin(*again)) if again else log
    known = events.join(items.select("item_id", "category"), on="item_id", how="inner")
    if repurchase_days:
        days = F.create_map(*[F.lit(part) for pair in repurchase_days.items() for part in pair])
        end = log.agg(F.max("event_time").alias("end"))
        window = days[F.col("category")]
        past = F.unix_micros("end") - F.unix_micros("event_time") > window * F.lit(86_400_000_000)
        known = known.crossJoin(F.broadcast(end)).where(window.isNull() | ~past)
    return known.groupBy("user_id").agg(F.array_sort(F.collect_set("item_id")).alias("seen"))
