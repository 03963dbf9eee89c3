"""Rules, groups and exclusions in SQL: which items may be recommended to whom.

Knows tables. Which of the allowed items get on a list is decided by `models/ranking/list_rules.py`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy import ndarray
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.list_rules import AVAILABLE, Cap, ListRules, Rule

_ATTRIBUTE_PREFIX = "attributes."
_MICROS_PER_DAY = 86_400_000_000


class UserRules(NamedTuple):
    """Which rules apply to whom, as bits.

    `by_user` (user_id, rules) holds the users to whom more rules apply than to everybody. It is
    None if no rule is limited to some users.
    """

    everybody: int
    by_user: DataFrame | None


def check(
    items: DataFrame,
    users: DataFrame,
    rules: Sequence[Rule],
    caps: Mapping[str, int],
) -> None:
    """Raise UsageError for a rule or a cap that doesn't fit the tables' columns; reads no row."""
    for number, rule in enumerate(rules):
        key = f"recommend.rules[{number}]"
        _check_predicate(f"{key}.items", rule.items, items, "items")
        if rule.users is not None:
            _check_predicate(f"{key}.users", rule.users, users, "users")
    for column in caps:
        if not column.startswith(_ATTRIBUTE_PREFIX) and column not in items.columns:
            raise UsageError(
                f"recommend.caps: the table items has no column {column!r}. It has "
                f"{', '.join(items.columns)}. Other columns are named attributes.NAME."
            )


def _check_predicate(
    key: str,
    predicate: str,
    rows: DataFrame,
    table: str,
) -> None:
    try:
        schema = rows.select(F.expr(predicate)).schema
    except AnalysisException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{key}: {predicate!r} doesn't fit the table {table}: {reason}") from None
    kind = schema[0].dataType.typeName()
    if kind != "boolean":
        raise UsageError(f"{key}: expected a boolean expression, got a {kind}: {predicate!r}")


def rules_by_item(
    items: DataFrame,
    photos: DataFrame,
    rules: Sequence[Rule],
    caps: Mapping[str, int],
) -> DataFrame:
    """item_id, allowed (bits as in ListRules), parent, photo, cap_0, cap_1, …: for the driver.

    `photo` is the hash of the main photo. `cap_n` is the group of the n-th cap.
    """
    allowed = _bit(F.col("available"), AVAILABLE)
    for number, rule in enumerate(rules):
        passed = _bit(F.expr(rule.items), _rule_bit(number))
        allowed = allowed.bitwiseOR(passed)
    groups = []
    for number, column in enumerate(caps):
        group = _group(column).cast("string")
        groups.append(group.alias(f"cap_{number}"))
    photo = F.col("image_sha256").alias("photo")
    main_photos = photos.where(F.col("position") == 0).select("item_id", photo)
    rows = items.select(
        "item_id",
        allowed.alias("allowed"),
        F.col("parent_id").alias("parent"),
        *groups,
    )
    return rows.join(main_photos, on="item_id", how="left")


def _rule_bit(number: int) -> int:
    # Bit 0 is AVAILABLE.
    return 2 << number


def _bit(condition: Column, bit: int) -> Column:
    value = F.when(condition, bit).otherwise(0)
    return value.cast("bigint")


def _group(column: str) -> Column:
    if column.startswith(_ATTRIBUTE_PREFIX):
        return F.col("attributes")[column.removeprefix(_ATTRIBUTE_PREFIX)]
    return F.col(column)


def list_rules(
    rows: pa.Table,
    searcher: Searcher,
    variants: Sequence[str],
    caps: Mapping[str, int],
) -> ListRules:
    """Rows of `rules_by_item` by the positions of an index, without thresholds.

    An item of the index without a row isn't allowed. Variants share a value of one of the columns
    `variants` ("parent", "photo"), or are joined through a third item.
    """
    positions = searcher.positions_of(rows["item_id"].combine_chunks())
    indexed = positions >= 0
    positions = positions[indexed]

    def by_position(values: ndarray, default: int) -> ndarray:
        column = np.full(len(searcher), default, np.int64)
        column[positions] = values[indexed]
        return column

    def codes(name: str) -> ndarray:
        """The column's values as numbers, -1 for null."""
        indices = rows[name].combine_chunks().dictionary_encode().indices
        return by_position(indices.fill_null(-1).to_numpy(), -1)

    groups = None
    if variants:
        groups = _connected_groups([codes(name) for name in variants])
        if len(np.unique(groups)) == len(groups):
            groups = None  # No item has a variant: lists are simply the best items.
    limits = []
    for number, limit in enumerate(caps.values()):
        cap_groups = codes(f"cap_{number}")
        limits.append(Cap(cap_groups, limit))
    allowed = by_position(rows["allowed"].to_numpy(), 0)
    return ListRules(allowed, groups, limits)


def _connected_groups(groupings: Sequence[ndarray]) -> ndarray:
    """The group number of each item after joining all groups that share an item.

    groupings: of each column the number per item, int64 (items,), -1 for none.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # A graph whose nodes are the items and then the groups of each column.
    nodes = len(groupings[0])
    item_nodes = []
    group_nodes = []
    for numbers in groupings:
        grouped = np.flatnonzero(numbers >= 0)
        item_nodes.append(grouped)
        group_nodes.append(nodes + numbers[grouped])
        nodes += int(numbers.max(initial=-1)) + 1
    sources = np.concatenate(item_nodes)
    targets = np.concatenate(group_nodes)
    edges = np.ones(len(sources), np.int8)
    graph = coo_array((edges, (sources, targets)), shape=(nodes, nodes))
    _, components = connected_components(graph, directed=False)
    return components[: len(groupings[0])].astype(np.int64)


def rules_by_user(users: DataFrame, rules: Sequence[Rule]) -> UserRules:
    """The rules that apply to everybody, and those that apply to some users."""
    everybody = 0
    bits = F.lit(0).cast("bigint")
    for number, rule in enumerate(rules):
        if rule.users is None:
            everybody |= _rule_bit(number)
        else:
            applies = _bit(F.expr(rule.users), _rule_bit(number))
            bits = bits.bitwiseOR(applies)
    if all(rule.users is None for rule in rules):
        return UserRules(everybody, None)
    by_user = users.select("user_id", bits.alias("rules"))
    return UserRules(everybody, by_user.where(F.col("rules") != 0))


def not_repeatable(
    log: DataFrame,
    items: DataFrame,
    repeatable_events: Sequence[str],
    repurchase_days: Mapping[str, int],
) -> DataFrame:
    """user_id, seen: the items that may not be recommended to a user again.

    Events of the types `repeatable_events` exclude nothing. Any other event excludes its item for
    ever, or for the days that its category has in `repurchase_days`, counted back from the log's
    last event.
    """
    events = log
    if repeatable_events:
        repeatable = F.col("event_type").isin(*repeatable_events)
        events = log.where(~repeatable)
    categories = items.select("item_id", "category")
    events = events.join(categories, on="item_id", how="inner")
    if repurchase_days:
        pairs = [F.lit(value) for pair in repurchase_days.items() for value in pair]
        days_by_category = F.create_map(*pairs)
        days = days_by_category[F.col("category")]
        log_end = log.agg(F.max("event_time").alias("log_end"))
        age = F.unix_micros("log_end") - F.unix_micros("event_time")
        repurchase_age = days * F.lit(_MICROS_PER_DAY)
        excluded = days.isNull() | (age <= repurchase_age)
        events = events.crossJoin(F.broadcast(log_end)).where(excluded)
    seen = F.array_sort(F.collect_set("item_id"))
    return events.groupBy("user_id").agg(seen.alias("seen"))
