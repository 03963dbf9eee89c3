"""The whole way on a tiny shop: the tables, a second run, kills, and errors that users make."""

import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import deltalake
import numpy as np
import pytest
from pyspark.sql import Column, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.classic.dataframe import DataFrame
from shop import MakePipeline, Shop, demo_settings, paths, source_counts

from vlm4rec_spark.cli import main
from vlm4rec_spark.config import load
from vlm4rec_spark.errors import RunError, UsageError, Vlm4RecError
from vlm4rec_spark.evaluation import tune
from vlm4rec_spark.evaluation.metrics import ACCURACY
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import STAGES, Pipeline, StageResult
from vlm4rec_spark.storage.schemas import (
    CAPTIONS,
    EMBEDDINGS,
    EXPORT_LONG,
    EXPORT_WIDE,
    INTERACTIONS,
    ITEM_CAPTIONS,
    ITEMS,
    METRICS,
    PHOTOS,
    PROFILES,
    RECOMMENDATIONS,
    REJECTED,
    RUNS,
    STATE,
    TABLES,
    Table,
)

K = 5
SHARE = 0.6
QUICK = """spark.conf={spark.sql.shuffle.partitions: "1", spark.sql.codegen.wholeStage: "false",
    spark.sql.codegen.factoryMode: NO_CODEGEN, spark.databricks.delta.snapshotPartitions: "1"}"""


@dataclass
class RecordedShop(Shop):
    """What the first run made of the shop."""

    collected: dict[str, int] = field(default_factory=dict)
    """Rows that each function of the package brought to the driver, at most."""
    results: dict[str, StageResult] = field(default_factory=dict)


@pytest.fixture(scope="module")
def shop(pipeline: MakePipeline, tmp_path_factory) -> RecordedShop:
    folder = tmp_path_factory.mktemp("shop")
    settings = (
        *demo_settings(folder / "raw"),
        "evaluate.arms=[popularity,caption/max_similarity,blend]",
        "profiles.shape=max_similarity",
        f"item_item.share={SHARE}",
    )
    shop = RecordedShop(folder, settings, pipeline(folder, *settings))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "toPandas", "toArrow"):
            patch.setattr(DataFrame, name, _recording(getattr(DataFrame, name), shop.collected))
        shop.run.run(STAGES, lambda result: shop.results.update({result.stage: result}))
    return shop


def _recording(collect: Callable, collected: dict[str, int]) -> Callable:
    """`collect`, with the rows of each call recorded under the package's calling function."""

    def recording(rows: DataFrame, *args: object) -> object:
        result = collect(rows, *args)
        package = [frame for frame in inspect.stack()[1:] if "/vlm4rec_spark/" in frame.filename]
        if package:
            name = f"{Path(package[0].filename).stem}.{package[0].function}"
            collected[name] = max(collected.get(name, 0), len(result))
        return result

    return recording


def counts(result: StageResult) -> tuple[int, int, int]:
    return result.ok, result.failed, result.skipped


def test_ingest_takes_or_rejects_every_row(shop: RecordedShop):
    details = shop.results["ingest"].details
    # catalogue.py: 60 items, three bad rows and one twice; three items without a photo, five
    # with two.
    items = source_counts(shop.results["ingest"], "items")
    assert items == {"in": 64, "ok": 60, "rejected": 3, "skipped": 1}
    photos = source_counts(shop.results["ingest"], "photos")
    assert photos == {"in": 62, "ok": 62, "rejected": 0, "skipped": 0}
    assert details["items_without_photo"] == "3"
    events = source_counts(shop.results["ingest"], "interactions")
    # 12 without a user, 12 without an item, 6 from the future; one event 25 times.
    assert events["rejected"] == 30
    assert events["skipped"] >= 24
    assert events["in"] == events["ok"] + events["rejected"] + events["skipped"]
    assert sum(row["occurrences"] for row in shop.rows(REJECTED)) == 33


def test_every_photo_is_captioned_and_every_item_embedded(shop: RecordedShop):
    # 57 photos. Two repeat the first, and the two HTML pages are alike. Two are corrupt, one is
    # empty, one is HTML.
    assert counts(shop.results["caption"]) == (50, 4, 3)
    assert len(shop.rows(CAPTIONS)) == 54
    assert len(shop.rows(ITEM_CAPTIONS)) == 52
    assert counts(shop.results["embed"]) == (180, 0, 0)
    # Three have no photo, and five a photo that can't be read.
    assert shop.results["embed"].details["fallback"] == "8"
    assert shop.results["index"].ok == 60


def test_every_user_with_a_history_has_k(shop: RecordedShop):
    # A bot, a user of unknown items and one who only scrolled have none.
    assert counts(shop.results["profiles"]) == (60, 0, 3)
    assert shop.results["profiles"].details["bot_events"] == "3000"
    # Two of the three get what is popular with all.
    assert counts(shop.results["recommend"]) == (62, 0, 0)
    assert shop.results["recommend"].details["popular_lists"] == "2"
    available = {row["item_id"] for row in shop.rows(ITEMS) if row["available"]}
    seen = {row["user_id"]: set(row["seen"]) for row in shop.rows(PROFILES)}
    lists = {
        row["user_id"]: [item["item_id"] for item in row["items"]]
        for row in shop.rows(RECOMMENDATIONS)
    }
    assert set(lists) == {*seen, "user-lost", "user-odd"}
    seen |= {
        "user-lost": set(),
        "user-odd": {
            row["item_id"] for row in shop.rows(INTERACTIONS) if row["user_id"] == "user-odd"
        },
    }
    for user, items in lists.items():
        assert len(set(items)) == len(items) == min(K, len(available - seen[user]))
        assert set(items) <= available - seen[user]
    assert min(map(len, lists.values())) == K


def co_occurrence_strengths(histories: dict[str, list]) -> dict[str, dict[str, float]]:
    """How strongly each item occurs together with each other one, by the defaults."""
    weights = defaultdict[str, Counter](Counter)
    users = Counter[str]()
    for history in histories.values():
        items = [item["item_id"] for item in history]
        users.update(items)
        for first, second in itertools.combinations(range(len(items)), 2):
            if second - first <= 20:
                weight = 0.8 ** (second - first - 1)
                weights[items[first]][items[second]] += weight
                weights[items[second]][items[first]] += weight
    return {
        item: {
            neighbor: weight / (users[item] * users[neighbor]) ** 0.2
            for neighbor, weight in neighbors.items()
        }
        for item, neighbors in weights.items()
    }


def item_item_scores(
    history: list, strengths: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Of each item the share that each history item has in its score, scaled to the best item."""
    heaviest = max(item["weight"] for item in history)
    scores = defaultdict[str, Counter](Counter)
    for position, past in enumerate(history):
        weight = past["weight"] / heaviest * 0.85**position
        for item, strength in strengths.get(past["item_id"], {}).items():
            scores[item][past["item_id"]] += weight * strength
    best = max((shares.total() for shares in scores.values()), default=1)
    return {
        item: {past: share / best for past, share in shares.items()}
        for item, shares in scores.items()
    }


def content_scores(
    item_id: str,
    history: list,
    vectors: dict[str, np.ndarray],
) -> dict[str, float]:
    """The weighted similarity of the item to each history item."""
    heaviest = max(item["weight"] for item in history)
    return {
        past["item_id"]: past["weight"] / heaviest * (vectors[past["item_id"]] @ vectors[item_id])
        for past in history
    }


def check_score(
    item: Row,
    content: dict[str, float],
    item_item: dict[str, float],
) -> None:
    """`content` and `item_item`: the share that each history item has in the item's scores."""
    scores = {
        "content": (1 - SHARE) * max(content.values()),
        "cooccurrence": SHARE * sum(item_item.values()),
    }
    assert item["score"] == pytest.approx(sum(scores.values()), abs=3e-6)
    assert scores[item["source"]] == pytest.approx(max(scores.values()), abs=3e-6)
    shares = content if item["source"] == "content" else item_item
    assert shares[item["because_item_id"]] == pytest.approx(max(shares.values()), abs=2e-6)


def test_a_score_blends_the_highest_weighted_similarity_and_co_occurrence(shop: RecordedShop):
    vectors = {
        row["item_id"]: np.array(row["embedding"])
        for row in shop.rows(EMBEDDINGS)
        if row["representation"] == "caption"
    }
    histories = {row["user_id"]: row["history"] for row in shop.rows(PROFILES)}
    assert max(map(len, histories.values())) > 5
    strengths = co_occurrence_strengths(histories)
    sources = set()
    for row in shop.rows(RECOMMENDATIONS):
        if row["user_id"] not in histories:
            continue
        history = histories[row["user_id"]]
        item_item = item_item_scores(history, strengths)
        for item in row["items"]:
            content = content_scores(item["item_id"], history, vectors)
            check_score(item, content, item_item.get(item["item_id"], {}))
            sources.add(item["source"])
    assert sources == {"content", "cooccurrence"}


WITHOUT_SPARK = """
import json, sys
from pathlib import Path
import numpy as np
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, recommend_lists
from vlm4rec_spark.models.ranking.user_queries import MaxSimilarityQuery

index, item_item, share, k, facts = sys.argv[1:]
searcher = Searcher.open(Path(index))
facts = json.loads(facts)
history = searcher.positions([item for item, _ in facts["history"]])
weights = np.array([weight for _, weight in facts["history"]])
weights = weights / weights.max()
content = MaxSimilarityQuery([history], [weights.astype(np.float32)])
later = weights * 0.85 ** np.arange(len(weights))
scores = ItemItemScores.open(Path(item_item))
query = BlendedQuery(content, scores, float(share), [history], [later])
allowed = np.zeros(len(searcher), np.int64)
allowed[searcher.positions(facts["available"])] = 1
parents = searcher.positions(facts["variants"][0]), np.array(facts["variants"][1])
variants = np.full(len(searcher), -1, np.int64)
variants[parents[0]] = parents[1]
seen = [searcher.positions(facts["seen"])]
rules = ListRules(allowed, variants)
requests = ListRequests(query, seen, np.zeros(1, np.int64))
top, scores, _ = recommend_lists(searcher, requests, rules, int(k), None)
assert "pyspark" not in sys.modules
print(json.dumps([[searcher.ids[item], score] for item, score in zip(top[0], scores[0])]))
"""


def variant_groups(shop: RecordedShop) -> dict[str, int]:
    """By item the number of its group: items with one parent or one photo, over others too."""
    photos = {
        row["item_id"]: row["image_sha256"] for row in shop.rows(PHOTOS) if row["position"] == 0
    }
    parents = {row["item_id"]: row["parent_id"] for row in shop.rows(ITEMS)}
    group = {item: number for number, item in enumerate(parents)}
    for _ in parents:
        for first, second in itertools.combinations(parents, 2):
            same_photo = first in photos and photos[first] == photos.get(second)
            if same_photo or parents[first] == parents[second] is not None:
                group[first] = group[second] = min(group[first], group[second])
    return group


def test_a_process_without_spark_makes_the_list_of_the_table(shop: RecordedShop):
    profile = shop.rows(PROFILES)[0]
    groups = variant_groups(shop)
    facts = {
        "history": [(item["item_id"], item["weight"]) for item in profile["history"]],
        "seen": profile["seen"],
        "available": [row["item_id"] for row in shop.rows(ITEMS) if row["available"]],
        "variants": [list(groups), list(groups.values())],
    }
    folder = shop.folder / "index"
    (index,) = (path for path in folder.iterdir() if (path / "vectors.npy").exists())
    (item_item,) = (folder / "item_item").iterdir()
    arguments = [str(index), str(item_item), str(SHARE), str(K), json.dumps(facts)]
    command = [sys.executable, "-c", WITHOUT_SPARK, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (row,) = (row for row in shop.rows(RECOMMENDATIONS) if row["user_id"] == profile["user_id"])
    assert json.loads(output) == [[item["item_id"], item["score"]] for item in row["items"]]


def test_metrics_and_exports(shop: RecordedShop):
    metrics = {
        (row["arm"], row["metric"]): row
        for row in shop.rows(METRICS)
        if row["slice"] == "all"
        and row["split"] == "time"
        and row["k"] == 10
        and row["metric"] in ACCURACY
    }
    assert set(metrics) == set(
        itertools.product(("popularity", "caption/max_similarity", "blend"), ACCURACY)
    )
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in metrics.values())
    assert len({row["users"] for row in metrics.values()}) == 1
    assert len(shop.rows(EXPORT_LONG)) == 62 * K
    assert len(shop.rows(EXPORT_WIDE)) == 62
    page = (shop.folder / "report.html").read_text()
    assert len(page) > 10_000
    assert '<tr class="highlight"><th scope="row">blend</th>' in page


def test_the_captions_are_audited(shop: RecordedShop):
    rows = [row for row in shop.rows(METRICS) if row["split"] == "captions"]
    metrics = {row["metric"]: row for row in rows}
    # No photo is captioned again unless configured, and the demo's catalogue has no attributes.
    assert set(metrics) == {"distinct_share", "distinct_share_all"}
    # 54 contents, of which four have no caption. The fake model names mean colors, and some photos
    # look the same to it.
    captions = [row["caption"] for row in shop.rows(CAPTIONS) if row["status"] == "ok"]
    assert metrics["distinct_share"]["users"] == len(captions) == 50
    assert metrics["distinct_share"]["value"] == len(set(captions)) / 50
    assert {row["arm"] for row in metrics.values()} == {shop.results["caption"].details["model"]}
    (captioner,) = shop.results["evaluate"].output.evaluation["caption_audit"]["captioners"]
    assert (captioner["captions"], captioner["sampled"]) == (50, 50)
    assert "Do the captions come from the photos?" in (shop.folder / "report.html").read_text()


def test_every_stage_is_recorded(shop: RecordedShop):
    runs = {row["stage"]: row for row in shop.rows(RUNS)}
    assert set(runs) == set(STAGES)
    for stage, row in runs.items():
        assert row["status"] == "ok"
        assert (row["rows_ok"], row["rows_failed"], row["rows_skipped"]) == counts(
            shop.results[stage]
        )
        assert row["rows_in"] == sum(counts(shop.results[stage]))
    assert runs["embed"]["versions"].keys() == {"items", "captions", "item_captions", "photos"}
    states = {row["stage"]: row for row in shop.rows(STATE)}
    assert set(states) == set(STAGES)
    assert all(len(row["fingerprint"]) == 64 for row in states.values())
    assert {row["run_id"] for row in states.values()} == {row["run_id"] for row in runs.values()}


def test_another_reader_opens_every_table(shop: RecordedShop):
    for table in TABLES.values():
        other = deltalake.DeltaTable(str(shop.folder / "tables" / table.name))
        assert other.count() == len(shop.rows(table)), table.name
    assert not list((shop.folder / "tables").glob("_*"))


COLLECTED = {
    "index.index": "the one index build, whose memory is reported before it starts",
    "recommend._matching": "the co-occurring pairs, whose memory is reported before",
    "arm_indexes._vectors": "the index of an arm",
    "point_in_time.count_pairs": "the pairs of items of an arm",
    "point_in_time.relevant": "at most evaluate.max_users test users",
    "point_in_time.users": "what those users have seen",
    "point_in_time.compute": "their histories, if the driver ranks",
    "point_in_time._counts": "the popularity of the candidates",
    "list_batches.map_batches": "the lists of those users",
    "evaluate._available_items": "category and date of the available items",
    "figures.__init__": "the counts of the report, and as many keys of each as it shows",
    "thumbnails._photos": "the photos that the report shows, and the kinds of about 1,000",
    "thumbnails._items": "the items that the report shows, by report.photos and report.users",
    "thumbnails._captions": "their captions",
    "caption_audit._samples": "at most evaluate.audit_photos captions of each captioner",
    "caption_audit._add_catalogue": "the items of those captions",
    "caption_audit._vectors": "vectors of the texts of those captions",
    "collect._metrics": "the rows of the last evaluation, 20,000 at most",
    "recommend._load": "the items with what rules say of them",
    "recommend._choose_search": "at most recommend.recall_sample profiles",
    "recommend._popular_items": "at most 1,000 popular items for each segment and set of rules",
}
"""What may bring more than a few rows to the driver, and why that doesn't grow with the shop."""
FEW_ROWS = 24
"""Such as reasons, stages, tables and samples."""


def test_nothing_that_grows_is_brought_to_the_driver(shop: RecordedShop):
    many = {name for name, rows in shop.collected.items() if rows > FEW_ROWS}
    assert many - COLLECTED.keys() == set()
    assert shop.collected["index.index"] == 60


def _doubled(number: Column) -> Column:
    return (number * 2).cast("float")


@pytest.mark.parametrize(
    ("table", "column", "bad", "refusal"),
    [
        (
            EMBEDDINGS,
            "embedding",
            lambda: F.transform("embedding", _doubled),
            "CHECK constraint unit_length",
        ),
        (
            CAPTIONS,
            "status",
            lambda: F.lit("perhaps"),
            "CHECK constraint (status_is_known|caption_or_error)",
        ),
        (
            INTERACTIONS,
            "user_id",
            lambda: F.lit(None).cast("string"),
            "NOT NULL|CHECK constraint ids_not_empty",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Table) else "",
)
def test_the_real_tables_refuse_a_bad_row(
    shop: RecordedShop, table: Table, column: str, bad: Callable[[], Column], refusal: str
):
    rows = shop.run.tables.read(table).limit(1).withColumn(column, bad())
    with pytest.raises(Exception, match=refusal):
        rows.write.format("delta").mode("append").save(shop.run.tables.name_of(table))


def test_a_second_run_has_nothing_to_do(shop: RecordedShop, pipeline: MakePipeline):
    again = pipeline(shop.folder, *shop.settings)
    before = again.tables.versions(TABLES.values())
    recorded = again.tables.read(RUNS).count()
    # As a killed run leaves it.
    again.tables.staged(ITEM_CAPTIONS, again.tables.read(ITEM_CAPTIONS))
    results = again.run(STAGES)
    assert list((shop.folder / "tables").glob("_*")) == []
    assert [result.stage for result in results] == list(STAGES)
    assert {result.status for result in results} == {"unchanged"}
    assert {result.details["unchanged_since"] for result in results} == {shop.run.run_id}
    after = again.tables.versions(TABLES.values())
    assert after.pop("runs") == before.pop("runs") + 1
    assert after == before
    assert again.tables.read(RUNS).count() == recorded + len(STAGES)


def command_options(shop: RecordedShop) -> list[str]:
    """The shop's settings, as the command line takes them."""
    return ["--config", "test.yaml", *assignments(*paths(shop.folder), *shop.settings)]


def assignments(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_the_figures_of_an_evaluation_are_printed_as_json(shop: RecordedShop, capsys):
    assert main(["evaluate", "--json", *command_options(shop)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run_id"], printed["config"]["k"]) == (shop.run.run_id, 10)
    assert printed["versions"] == shop.results["evaluate"].versions
    assert printed["details"]["time"]["users"] > 30
    assert len(printed["metrics"]) == shop.run.tables.read(METRICS).count()
    blend = [
        row
        for row in printed["metrics"]
        if (row["arm"], row["metric"], row["k"]) == ("blend", "recall", 20)
    ]
    assert [row["slice"] for row in blend] == ["all"]


def test_tune_writes_a_configuration_that_can_be_used(
    shop: RecordedShop,
    tmp_path,
    monkeypatch,
):
    tried = dict.fromkeys(tune.OPTIONS, ()) | {"item_item.share": (0.5,)}
    monkeypatch.setattr(tune, "OPTIONS", tried)
    out = tmp_path / "tuned.yaml"
    options = command_options(shop)
    assert main(["tune", "--out", str(out), "--representation", "title", *options]) == 0
    comments = [line for line in out.read_text().splitlines() if line.startswith("#")]
    # The best may be one of content only.
    assert sum("<- best" in line for line in comments) in (1, 2)
    config = load([out])
    assert (config.representation, set(config.evaluate.custom_arms)) == ("title", {"content"})
    assert config.item_item.share in {0.0, 0.4, 0.45, 0.5, 0.55, 0.6}
    missing = str(tmp_path / "gone" / "tuned.yaml")
    assert main(["tune", "--out", missing, *options]) == 2


@pytest.fixture
def catalogued(
    spark: SparkSession, shop: RecordedShop, pipeline: MakePipeline, tmp_path
) -> Iterator[Pipeline]:
    """A copy of the shop with its tables in a catalog, but for those of publish."""
    shop.copy(tmp_path)
    spark.sql("CREATE SCHEMA whole")
    for table in TABLES.values():
        if table not in (EXPORT_LONG, EXPORT_WIDE):
            location = tmp_path / "tables" / table.name
            spark.sql(f"CREATE TABLE whole.{table.name} USING DELTA LOCATION '{location}'")
    yield pipeline(tmp_path, *shop.settings, "tables=spark_catalog.whole")
    spark.sql("DROP SCHEMA whole CASCADE")


@pytest.mark.cluster
def test_a_run_that_redoes_everything_in_a_catalog_changes_nothing(
    spark: SparkSession, shop: RecordedShop, catalogued: Pipeline
):
    # As after a run that was killed before it could record itself.
    spark.sql("DELETE FROM whole.state WHERE stage != 'index'")
    results = {result.stage: result for result in catalogued.run(STAGES)}
    assert results["index"].status == "unchanged"
    # No log file and no photo is opened again.
    assert source_counts(results["ingest"], "interactions") == {}
    photos = source_counts(results["ingest"], "photos")
    assert photos == {"in": 62, "ok": 0, "rejected": 0, "skipped": 62}
    assert counts(results["caption"]) == (0, 0, 57)
    assert counts(results["embed"]) == (0, 0, 180)
    # A run's metrics are its own.
    assert content(catalogued, METRICS) == sorted(2 * content(shop.run, METRICS))
    assert_same_content(catalogued, shop.run)
    made = {row["tableName"] for row in spark.sql("SHOW TABLES IN whole").collect()}
    assert {EXPORT_LONG.name, EXPORT_WIDE.name} <= made


def test_a_copied_shop_opens_its_own_index(
    shop: RecordedShop, pipeline: MakePipeline, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shop.copy(copy)
    opened: set[Path] = set()
    open_searcher = Searcher.open

    def recording(
        folder: Path,
        *args: object,
        **options: object,
    ) -> Searcher:
        opened.add(folder.parent)
        return open_searcher(folder, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Searcher, "open", recording)
    moved = pipeline(copy, *shop.settings)
    index, profiles = moved.run(["index", "profiles"])
    assert (index.status, profiles.status) == ("unchanged", "unchanged")
    (recommend,) = pipeline(copy, *shop.settings, "recommend.explain=false").run(["recommend"])
    assert counts(recommend) == counts(shop.results["recommend"])
    assert opened == {copy / "index"}


def test_a_failed_stage_leaves_its_state(
    shop: RecordedShop,
    pipeline: MakePipeline,
    tmp_path,
):
    shutil.copytree(shop.folder / "tables", tmp_path / "tables")
    # Without the index folder.
    run = pipeline(tmp_path, *shop.settings)
    before = run.context.states()["recommend"]
    with pytest.raises(RunError):
        run.run(["recommend"])
    run.context.forget()
    assert run.context.states()["recommend"] == before


@pytest.mark.cluster
def test_a_killed_driver_and_a_killed_worker_leave_tables_that_the_next_run_completes(
    shop: RecordedShop, pipeline: MakePipeline, tmp_path
):
    # The tables are named by a URI here.
    tables = f"tables=file://{tmp_path}/tables"
    _kill_a_driver(shop, tables, tmp_path)
    left = [path.name for path in (tmp_path / "tables").glob("_*")]
    assert left == ["_lease-000001.json", "_staging_photos"]
    stages = [stage for stage in STAGES if stage != "evaluate"]
    again = pipeline(tmp_path, *shop.settings, tables)
    killed = threading.Event()
    killer = threading.Thread(target=_kill_a_worker, args=(killed,))
    killer.start()
    try:
        again.run(stages)
    except Exception as error:
        assert "Python worker exited unexpectedly" in str(error)
        again.run(stages)
    finally:
        killed.set()
        killer.join()
    assert_same_content(again, shop.run)
    assert list((tmp_path / "tables").glob("_*")) == []


def _kill_a_driver(
    shop: RecordedShop,
    tables: str,
    folder: Path,
) -> None:
    """Run all stages in a process, and kill it when photos are staged and not yet in `photos`."""
    code = "import sys; from vlm4rec_spark.cli import main; main(sys.argv[1:])"
    options = ["--config", "test.yaml", *assignments(*paths(folder), tables, *shop.settings, QUICK)]
    command = [sys.executable, "-c", code, "run", *options]
    with (folder / "log").open("wb") as log:
        driver = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    while not (folder / "tables" / "_staging_photos").exists():
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


def _kill_a_worker(killed: threading.Event) -> None:
    """SIGKILL to the first Python worker of this process's Spark that is at work."""
    while not killed.wait(0.02):
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                worker = _process_state(process)
                daemon = _process_state(Path("/proc", worker.parent))
                jvm = _process_state(Path("/proc", daemon.parent))
                if worker.state == "R" and int(jvm.parent) == os.getpid():
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.set()


class _ProcessState(NamedTuple):
    state: str
    """R while it runs."""
    parent: str


def _process_state(process: Path) -> _ProcessState:
    return _ProcessState(*(process / "stat").read_text().rpartition(")")[2].split()[:2])


def content(run: Pipeline, table: Table) -> list[str]:
    """Every row as text, without photos' bytes and what says when or by which run it was made."""
    ignored = {"image", "run_id", *table.volatile}
    return sorted(str(row) for row in run.tables.read(table).drop(*ignored).collect())


def contents(run: Pipeline) -> dict[str, list[str]]:
    """The content of every table whose rows don't differ from run to run."""
    of_runs = (RUNS, STATE, METRICS)
    return {table.name: content(run, table) for table in TABLES.values() if table not in of_runs}


def assert_same_content(run: Pipeline, other: Pipeline) -> None:
    expected = contents(other)
    for name, rows in contents(run).items():
        assert rows == expected[name], name


FAULTS: dict[str, tuple[type[Vlm4RecError], str, list[str]]] = {
    "missing file": (UsageError, "nowhere.csv", ["ingest.items.path=[{tmp}/nowhere.csv]"]),
    "empty catalogue": (RunError, "no usable row", ["ingest.items.path=[{tmp}/empty.csv]"]),
    "log of other items": (
        RunError,
        "no event is about an item",
        ["ingest.interactions.path=[{tmp}/others.csv]"],
    ),
    "missing photo folder": (
        UsageError,
        "ingest.photos.folder",
        ["ingest.photos.folder={tmp}/nowhere"],
    ),
    "missing model": (
        UsageError,
        "no model folder",
        ["caption.model.backend=transformers", "caption.model.model={tmp}/nowhere"],
    ),
    "missing encoder": (UsageError, "no model folder", ["embed.encoder={tmp}/nowhere"]),
    "table of another schema": (RunError, "size is missing", ["tables={tmp}/other"]),
    "no permission": (RunError, "nothing can be written to", ["tables=/proc/nowhere/tables"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_one_paragraph_and_changes_no_table(
    spark: SparkSession, shop: RecordedShop, pipeline: MakePipeline, tmp_path, fault: str
):
    (tmp_path / "empty.csv").write_text("item_id,title\n")
    (tmp_path / "others.csv").write_text(
        "user_id,item_id,event_type,event_time\nann,gone,view,2025-01-01\n"
    )
    if fault == "table of another schema":
        other = spark.sql("SELECT 'x' AS file")
        other.write.format("delta").save(str(tmp_path / "other" / "ingested_files"))
    kind, message, settings = FAULTS[fault]
    folders = [tmp_path / "other", shop.folder / "tables"]
    before = [sorted(folder.rglob("*")) for folder in folders]
    settings = [setting.format(tmp=tmp_path) for setting in settings]
    with pytest.raises(kind, match=message) as raised:
        pipeline(shop.folder, *shop.settings, *settings).run(STAGES)
    assert raised.value.exit_code == (2 if kind is UsageError else 1)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert [sorted(folder.rglob("*")) for folder in folders] == before
