"""Rules, groups and exclusions in SQL, with literal rows; and all of them in the stage's lists."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from shop import MakePipeline, Shop, build_exact, item_row, log

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.list_rules import Rule
from vlm4rec_spark.pipeline import Pipeline
from vlm4rec_spark.stages import rules
from vlm4rec_spark.storage import schemas

CAPS = {"brand": 2, "attributes.fit": 1}


def items(spark: SparkSession, *rows: dict[str, Any]) -> DataFrame:
    return spark.createDataFrame([item_row(**row) for row in rows], schemas.ITEMS.schema)


@pytest.fixture
def searcher(tmp_path) -> Searcher:
    """Items a to e; e isn't in the catalogue of `rule_rows`."""
    vectors = np.eye(5, dtype=np.float32)
    return Searcher.open(build_exact(tmp_path / "x", "abcde", vectors))


@pytest.fixture
def rule_rows(spark: SparkSession) -> DataFrame:
    """a and b have the same parent, b and c the same photo."""
    slim = {"fit": "slim"}
    catalogue = items(
        spark,
        {"item_id": "a", "price": 5.0, "parent_id": "P", "brand": "x", "attributes": slim},
        {"item_id": "b", "price": 50.0, "parent_id": "P", "brand": "x"},
        {"item_id": "c", "price": None, "brand": "y"},
        {"item_id": "d", "price": 7.0, "available": False, "attributes": slim},
        {"item_id": "not indexed", "price": 1.0},
    )
    photos = spark.createDataFrame(
        [("b", 0, "s1"), ("c", 0, "s1"), ("a", 1, "s2"), ("d", 0, "s2")],
        "item_id STRING, position INT, image_sha256 STRING",
    )
    shop_rules = [Rule(items="price < 10"), Rule(items="true", users="region = 'EU'")]
    return rules.rules_by_item(catalogue, photos, shop_rules, CAPS)


def test_rules_decide_which_items_are_eligible(rule_rows: DataFrame, searcher: Searcher):
    list_rules = rules.list_rules(rule_rows.toArrow(), searcher, [], CAPS)
    assert list_rules.passed_rules.tolist() == [0b111, 0b101, 0b101, 0b110, 0]
    assert list_rules.eligible(0).tolist() == [True, True, True, False, False]
    assert list_rules.eligible(0b010).tolist() == [True, False, False, False, False]
    assert list_rules.variants is None


def test_caps_group_items_by_column_or_attribute(rule_rows: DataFrame, searcher: Searcher):
    list_rules = rules.list_rules(rule_rows.toArrow(), searcher, [], CAPS)
    (brands, brand_limit), (fits, fit_limit) = list_rules.caps
    assert brand_limit == 2
    assert fit_limit == 1
    assert brands[0] == brands[1] != brands[2] != -1
    assert brands[3] == brands[4] == fits[1] == fits[4] == -1
    assert fits[0] == fits[3] >= 0


def test_variants_are_joined_through_a_third_item(rule_rows: DataFrame, searcher: Searcher):
    rows = rule_rows.toArrow()
    a, b, c, d, _ = rules.list_rules(
        rows,
        searcher,
        ["parent", "photo"],
        {},
    ).variants.tolist()
    assert a == b == c != d
    a, b, c, *_ = rules.list_rules(rows, searcher, ["parent"], {}).variants.tolist()
    assert a == b != c


def test_rules_apply_to_the_users_they_name(spark: SparkSession):
    users = spark.createDataFrame(
        [
            ("eu", "new", "EU", None, None),
            ("us", "new", "US", True, None),
            ("nowhere", None, None, False, None),
        ],
        schemas.USERS.schema,
    )
    shop_rules = [
        Rule(items="a", users="region = 'EU'"),
        Rule(items="b"),
        Rule(items="c", users="segment = 'new'"),
    ]
    everybody, by_user = rules.rules_by_user(users, shop_rules)
    assert everybody == 0b0100
    assert by_user is not None
    bits = {row["user_id"]: row["rules"] for row in by_user.collect()}
    assert bits == {"eu": 0b1010, "us": 0b1000}
    assert rules.rules_by_user(users, shop_rules[1:2]) == (0b0010, None)


@pytest.mark.parametrize(
    ("rule", "caps", "message"),
    [
        (
            Rule(items="prize < 3"),
            {},
            r"recommend\.rules\[0\]\.items: 'prize < 3' doesn't fit the table items: ",
        ),
        (
            Rule(items="price <"),
            {},
            r"recommend\.rules\[0\]\.items: 'price <' doesn't fit the table items: ",
        ),
        (
            Rule(items="price"),
            {},
            r"recommend\.rules\[0\]\.items: expected a boolean expression, got a double: 'price'",
        ),
        (
            Rule(items="true", users="town = 'X'"),
            {},
            r"recommend\.rules\[0\]\.users: .* the table users: ",
        ),
        (
            Rule(items="true"),
            {"colour": 1},
            r"recommend\.caps: the table items has no column 'colour'",
        ),
    ],
)
def test_rules_and_caps_of_unknown_columns_are_usage_errors(
    spark: SparkSession, rule: Rule, caps: dict[str, int], message: str
):
    tables = [spark.createDataFrame([], table.schema) for table in (schemas.ITEMS, schemas.USERS)]
    with pytest.raises(UsageError, match=message):
        rules.check(*tables, [rule], caps)


@pytest.fixture
def coffee_log(spark: SparkSession) -> DataFrame:
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
    return log(spark, events)


def test_views_repeat_purchases_do_not_and_coffee_repeats_after_a_month(
    spark: SparkSession, coffee_log: DataFrame
):
    catalogue = items(
        spark,
        {"item_id": "tv", "category": None},
        {"item_id": "cup", "category": "cup"},
        {"item_id": "coffee", "category": "food"},
    )

    def seen(*repeatable: str, **days: int) -> dict[str, list[str]]:
        rows = rules.not_repeatable(coffee_log, catalogue, repeatable, days).collect()
        return {row["user_id"]: row["seen"] for row in rows}

    assert seen("view", food=30) == {"ann": ["cup"], "ben": ["coffee", "tv"]}
    assert seen("view", food=31) == {"ann": ["cup"], "ben": ["coffee", "tv"], "cat": ["coffee"]}
    assert seen()["ann"] == ["coffee", "cup", "tv"]


USERS = ("u0", "u1", "u2", "u3", "u4")
ALLOWED = {"u3": range(5, 17), "picky": range(3, 15)}


def write_csv(
    file: Path,
    header: str,
    rows: list[str],
) -> None:
    file.write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture(scope="module")
def shop(pipeline: MakePipeline, tmp_path_factory) -> Shop:
    """Lists of thirty items of three brands and ten parents, for two markets."""
    folder = tmp_path_factory.mktemp("shop")
    catalogue = [f"i{n:02d},Thing {n} of {n % 7},b{n % 3},P{n % 10},{n}" for n in range(30)]
    write_csv(folder / "shop.csv", "item_id,title,brand,parent_id,price", catalogue)
    log = [
        f"u{user},i{(7 * user + n) % 30:02d},{event_type},2025-01-0{n + 1}T00:00:00Z"
        for user in range(6)
        for n, event_type in enumerate(("view", "purchase", "view"))
    ]
    write_csv(folder / "log.csv", "user_id,item_id,event_type,event_time", log)
    users = [f"u{user},{'EU' if user % 2 else 'US'}," for user in range(5)]
    users += ["u5,EU,no", "fresh,EU,yes", "picky,EU,yes"]
    write_csv(folder / "users.csv", "user_id,region,consent", users)
    write_csv(folder / "deny.csv", "user_id,item_id", [",i01", "u0,i02"])
    pairs = [f"{user},i{n:02d}" for user, numbers in ALLOWED.items() for n in numbers]
    write_csv(folder / "allow.csv", "user_id,item_id", pairs)
    settings = (
        f"ingest.items.path=[{folder}/shop.csv]",
        f"ingest.interactions.path=[{folder}/log.csv]",
        f"ingest.users.path=[{folder}/users.csv]",
        f"recommend.deny.path=[{folder}/deny.csv]",
        f"recommend.allow.path=[{folder}/allow.csv]",
        "recommend.k=6",
        "representation=title",
        "recommend.caps={brand: 3}",
        "recommend.repeatable_events=[view]",
        "recommend.rules=[{items: price < 25}, {items: price >= 5, users: \"region = 'EU'\"}]",
    )
    run = pipeline(folder, *settings)
    run.run(["ingest", "embed", "index", "profiles", "recommend"])
    return Shop(folder, settings, run)


def read_lists(pipeline: Pipeline) -> dict[str, list]:
    rows = pipeline.tables.read(schemas.RECOMMENDATIONS).collect()
    return {row["user_id"]: row["items"] for row in rows}


def numbers(items: list) -> list[int]:
    return [int(item["item_id"][1:]) for item in items]


def check_list(user: str, items: list) -> None:
    """Price, market, denied items, brands, parents and purchases."""
    listed = numbers(items)
    market_start = 5 if user in ("u1", "u3") else 0
    assert len(listed) == 6
    assert market_start <= min(listed) <= max(listed) < 25
    assert 1 not in listed
    assert user != "u0" or 2 not in listed
    assert max(Counter(number % 3 for number in listed).values()) <= 3
    assert len({number % 10 for number in listed}) == 6
    for number, item in zip(listed, items, strict=True):
        assert all(int(variant[1:]) % 10 == number % 10 for variant in item["collapsed"])
    assert (7 * int(user[1]) + 1) % 30 not in listed


def test_lists_obey_rules_caps_variants_and_exclusions(shop: Shop):
    lists = read_lists(shop.run)
    assert set(lists) == {*USERS, "fresh", "picky"}  # u5 refused
    for user in USERS:
        check_list(user, lists[user])
    assert any(item["collapsed"] for user in USERS for item in lists[user])
    viewed = [{(7 * int(user[1]) + n) % 30 for n in (0, 2)} for user in USERS]
    assert any(views & {*numbers(lists[user])} for user, views in zip(USERS, viewed, strict=True))
    assert {item["source"] for item in lists["fresh"]} == {"popular"}
    assert 5 <= min(numbers(lists["fresh"])) <= max(numbers(lists["fresh"])) < 25
    for user, allowed in ALLOWED.items():
        assert {*numbers(lists[user])} <= {number for number in allowed if number >= 5}
    assert len(lists["picky"]) > 1


def test_a_longer_deny_list_changes_lists_though_no_table_has_changed(shop: Shop):
    lists = read_lists(shop.run)
    best = lists["u1"][0]["item_id"]
    with (shop.folder / "deny.csv").open("a") as deny:
        deny.write(f"u1,{best}\n")
    (result,) = shop.run.run(["recommend"])
    assert result.status == "ok"
    changed = read_lists(shop.run)
    assert best not in {item["item_id"] for item in changed["u1"]}
    assert numbers(changed["u2"]) == numbers(lists["u2"])


def test_diversity_reorders_lists_and_popularity_follows_the_log(
    pipeline: MakePipeline, shop: Shop
):
    lists = read_lists(shop.run)
    least_popular = lists["fresh"][-1]["item_id"]
    assert lists["fresh"][0]["item_id"] != least_popular
    with (shop.folder / "log.csv").open("a") as log:
        log.writelines(f"new{n},{least_popular},view,2025-01-04T00:00:00Z\n" for n in range(9))
    run = pipeline(shop.folder, *shop.settings, "recommend.diversity=0.7")
    run.run(["ingest", "profiles", "recommend"])
    diverse = read_lists(run)
    assert diverse["fresh"][0]["item_id"] == least_popular
    # The best item stays first. The order of the others isn't that of the scores.
    scores = {user: [item["score"] for item in diverse[user]] for user in USERS}
    for user in USERS:
        assert max(scores[user]) == scores[user][0] == lists[user][0]["score"]
    assert any(user_scores != sorted(user_scores, reverse=True) for user_scores in scores.values())
