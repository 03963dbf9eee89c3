"""Rules, groups and exclusions in SQL, with literal rows; and all of them in the stage's lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.list_rules import Rule
from vlm4rec_spark.stages import rules
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from vlm4rec_spark.pipeline import Pipeline

TEN = datetime(2025, 1, 1, 10)


def items(spark: SparkSession, *rows: dict[str, object]) -> DataFrame:
    bare = dict.fromkeys(schemas.ITEMS.columns) | {"available": True, "updated_at": TEN}
    return spark.createDataFrame(
        [tuple((bare | row).values()) for row in rows], schemas.ITEMS.schema
    )


def test_rules_groups_and_joined_variants(spark: SparkSession, tmp_path: Path) -> None:
    there = items(
        spark,
        {
            "item_id": "a",
            "price": 5.0,
            "parent_id": "P",
            "brand": "x",
            "attributes": {"fit": "slim"},
        },
        {"item_id": "b", "price": 50.0, "parent_id": "P", "brand": "x"},
        {"item_id": "c", "price": None, "brand": "y"},
        {"item_id": "d", "price": 7.0, "available": False, "attributes": {"fit": "slim"}},
        {"item_id": "not indexed", "price": 1.0},
    )
    # a and b have a parent in common, b and c a photo.
    photos = spark.createDataFrame(
        [("b", 0, "s1"), ("c", 0, "s1"), ("a", 1, "s2"), ("d", 0, "s2")],
        "item_id STRING, position INT, image_sha256 STRING",
    )
    rules = [Rule(items="price < 10"), Rule(items="true", users="region = 'EU'")]
    caps = {"brand": 2, "attributes.fit": 1}
    rows = rules.item_rows(there, photos, rules, caps).toArrow()
    Searcher.build(tmp_path / "x", "x", list("abcde"), np.eye(5, dtype=np.float32), [""] * 5, 2**62)
    searcher = Searcher.open(tmp_path / "x")
    made = rules.offer(rows, searcher, ["parent", "photo"], caps, None, None)
    assert made.passed_rules.tolist() == [0b111, 0b101, 0b101, 0b110, 0]
    assert made.eligible(0).tolist() == [True, True, True, False, False]
    assert made.eligible(0b010).tolist() == [True, False, False, False, False]
    a, b, c, d, _ = made.variants.tolist()
    assert a == b == c != d
    (brands, most), (fits, one) = made.caps
    assert (most, one) == (2, 1)
    assert brands[0] == brands[1] != brands[2] != -1
    assert brands[3] == brands[4] == fits[1] == fits[4] == -1
    assert fits[0] == fits[3] >= 0
    parents = rules.offer(rows, searcher, ["parent"], {}, 0.9, 0.1, 0.3)
    assert parents.variants[0] == parents.variants[1] != parents.variants[2]
    assert (parents.caps, parents.alike, parents.least, parents.diversity) == ([], 0.9, 0.1, 0.3)


def test_rules_apply_to_whom_they_say(spark: SparkSession) -> None:
    users = spark.createDataFrame(
        [
            ("eu", "new", "EU", None, None),
            ("us", "new", "US", True, None),
            ("nowhere", None, None, False, None),
        ],
        schemas.USERS.schema,
    )
    rules = [
        Rule(items="a", users="region = 'EU'"),
        Rule(items="b"),
        Rule(items="c", users="segment = 'new'"),
    ]
    everybody, some = rules.applying(users, rules)
    assert everybody == 0b0100
    assert some is not None
    assert {row["user_id"]: row["rules"] for row in some.collect()} == {"eu": 0b1010, "us": 0b1000}
    assert rules.applying(users, rules[1:2]) == (0b0010, None)


@pytest.mark.parametrize(
    ("rule", "caps", "message"),
    [
        (
            Rule(items="prize < 3"),
            {},
            r"recommend\.rules\[0\]\.items: 'prize < 3' can't be asked of the table items",
        ),
        (Rule(items="price <"), {}, r"recommend\.rules\[0\]\.items: 'price <' can't be asked"),
        (
            Rule(items="price"),
            {},
            r"recommend\.rules\[0\]\.items: 'price' is no condition, it gives a double",
        ),
        (
            Rule(items="true", users="town = 'X'"),
            {},
            r"recommend\.rules\[0\]\.users: .* of the table users",
        ),
        (
            Rule(items="true"),
            {"colour": 1},
            r"recommend\.caps: the table items has no column 'colour'",
        ),
    ],
)
def test_what_the_tables_do_not_know_is_wrong_use(
    spark: SparkSession, rule: Rule, caps: dict[str, int], message: str
) -> None:
    tables = [spark.createDataFrame([], table.schema) for table in (schemas.ITEMS, schemas.USERS)]
    with pytest.raises(UsageError, match=message):
        rules.check(*tables, [rule], caps)


def test_bought_stays_away_viewed_comes_again_and_coffee_after_a_month(spark: SparkSession) -> None:
    kinds = {"tv": None, "cup": "cup", "coffee": "food"}
    there = items(spark, *({"item_id": item, "category": kind} for item, kind in kinds.items()))
    events = [
        ("ann", "tv", "view", "2025-03-01"),
        ("ann", "coffee", "purchase", "2025-01-01"),
        ("ann", "cup", "purchase", "2025-01-01"),
        ("ben", "coffee", "purchase", "2025-01-30"),
        ("ben", "tv", "purchase", "2024-01-01"),
        ("ben", "gone", "purchase", "2025-01-01"),
        ("cat", "coffee", "purchase", "2025-01-29"),
        ("cat", "coffee", "view", "2025-02-27"),
        ("end", "tv", "view", "2025-03-01"),
    ]
    rows = [
        (f"e{n}", user, item, kind, datetime.fromisoformat(at), datetime.fromisoformat(at).date())
        for n, (user, item, kind, at) in enumerate(events)
    ]
    log = spark.createDataFrame(rows, schemas.INTERACTIONS.schema)

    def kept_off(*again: str, **days: int) -> dict[str, list[str]]:
        return {
            row["user_id"]: row["seen"]
            for row in rules.not_again(log, there, again, days).collect()
        }

    assert kept_off("view", food=30) == {"ann": ["cup"], "ben": ["coffee", "tv"]}
    assert kept_off("view", food=31) == {"ann": ["cup"], "ben": ["coffee", "tv"], "cat": ["coffee"]}
    assert kept_off()["ann"] == ["coffee", "cup", "tv"]


def test_the_lists_obey_all_of_it(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Thirty items of three brands and ten parents, two markets, and a list of what nobody or one user may get."""
    rows = [f"i{n:02d},Thing {n} of {n % 7},b{n % 3},P{n % 10},{n}" for n in range(30)]
    (tmp_path / "shop.csv").write_text(
        "item_id,title,brand,parent_id,price\n" + "\n".join(rows) + "\n"
    )
    log = [
        f"u{u},i{(7 * u + n) % 30:02d},{kind},2025-01-0{n + 1}T00:00:00Z"
        for u in range(6)
        for n, kind in enumerate(("view", "purchase", "view"))
    ]
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,event_type,event_time\n" + "\n".join(log) + "\n"
    )
    markets = "".join(f"u{u},{'EU' if u % 2 else 'US'},\n" for u in range(5))
    (tmp_path / "users.csv").write_text(
        f"user_id,region,consent\n{markets}u5,EU,no\nfresh,EU,yes\npicky,EU,yes\n"
    )
    (tmp_path / "deny.csv").write_text("user_id,item_id\n,i01\nu0,i02\n")
    allowed = {"u3": range(5, 17), "picky": range(3, 15)}
    pairs = [f"{user},i{n:02d}" for user, numbers in allowed.items() for n in numbers]
    (tmp_path / "allow.csv").write_text("user_id,item_id\n" + "\n".join(pairs) + "\n")
    settings = (
        f"ingest.items.path=[{tmp_path}/shop.csv]",
        f"ingest.interactions.path=[{tmp_path}/log.csv]",
        f"ingest.users.path=[{tmp_path}/users.csv]",
        f"recommend.deny.path=[{tmp_path}/deny.csv]",
        f"recommend.allow.path=[{tmp_path}/allow.csv]",
        "recommend.k=6",
        "representation=title",
        "recommend.caps={brand: 3}",
        "recommend.repeatable_events=[view]",
        "recommend.rules=[{items: price < 25}, {items: price >= 5, users: \"region = 'EU'\"}]",
    )
    run = pipeline(tmp_path, *settings)
    run.run(["ingest", "embed", "index", "profiles", "recommend"])
    lists = {
        row["user_id"]: row["items"] for row in run.tables.read(schemas.RECOMMENDATIONS).collect()
    }
    assert set(lists) == {"u0", "u1", "u2", "u3", "u4", "fresh", "picky"}  # u5 refused
    hidden, viewed = 0, 0
    for user in ("u0", "u1", "u2", "u3", "u4"):
        numbers = [int(item["item_id"][1:]) for item in lists[user]]
        collapsed = [
            (int(item["item_id"][1:]), int(other[1:]))
            for item in lists[user]
            for other in item["collapsed"]
        ]
        assert len(numbers) == 6
        assert max(numbers) < 25
        assert min(numbers) >= (5 if user in ("u1", "u3") else 0)
        assert 1 not in numbers
        assert user != "u0" or 2 not in numbers
        assert max(Counter(n % 3 for n in numbers).values()) <= 3
        assert len({n % 10 for n in numbers}) == 6
        assert all(one % 10 == other % 10 for one, other in collapsed)
        bought = (7 * int(user[1]) + 1) % 30
        assert bought not in numbers
        hidden += len(collapsed)
        viewed += len({(7 * int(user[1]) + n) % 30 for n in (0, 2)} & {*numbers})
    assert hidden > 0
    assert viewed > 0
    assert {item["source"] for item in lists["fresh"]} == {"popular"}
    # Another list of what is denied makes other lists, though no table has changed.
    first = lists["u1"][0]["item_id"]
    with (tmp_path / "deny.csv").open("a") as more:
        more.write(f"u1,{first}\n")
    (again,) = run.run(["recommend"])
    assert again.status == "ok"
    changed = {
        row["user_id"]: row["items"] for row in run.tables.read(schemas.RECOMMENDATIONS).collect()
    }
    assert first not in {item["item_id"] for item in changed["u1"]}
    assert [item["item_id"] for item in changed["u2"]] == [item["item_id"] for item in lists["u2"]]
    fresh = {int(item["item_id"][1:]) for item in lists["fresh"]}
    assert min(fresh) >= 5
    assert max(fresh) < 25
    for user, numbers in allowed.items():
        assert {int(item["item_id"][1:]) for item in lists[user]} <= {n for n in numbers if n >= 5}
    assert len(lists["picky"]) > 1
    last = lists["fresh"][-1]["item_id"]
    assert lists["fresh"][0]["item_id"] != last
    # What is popular is counted anew.
    with (tmp_path / "log.csv").open("a") as more:
        more.writelines(f"new{n},{last},view,2025-01-04T00:00:00Z\n" for n in range(9))
    # Diversity makes other lists of the same best items, in an order that isn't that of the scores.
    run = pipeline(tmp_path, *settings, "recommend.diversity=0.7")
    run.run(["ingest", "profiles", "recommend"])
    diverse = {
        row["user_id"]: row["items"] for row in run.tables.read(schemas.RECOMMENDATIONS).collect()
    }
    assert diverse["fresh"][0]["item_id"] == last
    scores = {
        user: [item["score"] for item in diverse[user]] for user in ("u0", "u1", "u2", "u3", "u4")
    }
    assert {user: max(mine) for user, mine in scores.items()} == {
        user: mine[0] for user, mine in scores.items()
    }
    assert {user: mine[0] for user, mine in scores.items()} == {
        user: changed[user][0]["score"] for user in scores
    }
    assert any(mine != sorted(mine, reverse=True) for mine in scores.values())
