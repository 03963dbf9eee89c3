"""The whole way on a tiny shop: what the tables hold, that a second run changes nothing, and what goes wrong aloud."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import deltalake
import numpy as np
import pytest
from pyspark.sql import functions as F
from pyspark.sql.classic.dataframe import DataFrame

from vlm4rec_spark.cli import main
from vlm4rec_spark.config import load
from vlm4rec_spark.errors import RunError, UsageError, Vlm4RecError
from vlm4rec_spark.evaluation import tune
from vlm4rec_spark.evaluation.metrics import ACCURACY
from vlm4rec_spark.pipeline import STAGES, Pipeline, StageResult
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession

K, SHARE = 5, 0.6
QUICK = """spark.conf={spark.sql.shuffle.partitions: "1", spark.sql.codegen.wholeStage: "false",
    spark.sql.codegen.factoryMode: NO_CODEGEN, spark.databricks.delta.snapshotPartitions: "1"}"""


@dataclass
class Shop:
    """A folder with raw files, the settings that read them, and what the first run made of them."""

    folder: Path
    settings: tuple[str, ...]
    first: Pipeline | None = None
    collected: dict[str, int] = field(default_factory=dict)
    """Rows that each function of the package brought to the driver, at most."""
    outcomes: dict[str, StageResult] = field(default_factory=dict)

    def rows(self, table: schemas.Table) -> list:
        assert self.first is not None
        return self.first.tables.read(table).collect()


@pytest.fixture(scope="module")
def shop(pipeline: Callable[..., Pipeline], tmp_path_factory: pytest.TempPathFactory) -> Shop:
    from vlm4rec_spark.demo import catalogue

    folder = tmp_path_factory.mktemp("shop")
    raw = folder / "raw"
    catalogue.write(raw, items=60, users=60)
    made = Shop(
        folder,
        (
            f"ingest.items.path=[{raw}/catalogue.csv]",
            f"ingest.interactions.path=['{raw}/events-*.csv.gz']",
            f"ingest.photos.folder={raw}/photos",
            f"ingest.users.path=[{raw}/users.csv]",
            f"ingest.identities.path=[{raw}/identities.csv]",
            f"recommend.k={K}",
            f"evaluate.cut={catalogue.CUT}",
            "evaluate.splits=[time]",
            "evaluate.arms=[popularity,caption/max_similarity,blend]",
            "report.photos=4",
            "report.users=2",
            "profiles.shape=max_similarity",
            f"item_item.share={SHARE}",
        ),
    )
    made.first = pipeline(folder, *made.settings)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "toPandas", "toArrow"):
            patch.setattr(DataFrame, name, _noted(getattr(DataFrame, name), made.collected))
        made.first.run(STAGES, lambda outcome: made.outcomes.update({outcome.stage: outcome}))
    return made


def _noted(bring: Callable, collected: dict[str, int]) -> Callable:
    def noting(rows: DataFrame, *args: object) -> object:
        brought = bring(rows, *args)
        ours = [frame for frame in inspect.stack()[1:] if "/vlm4rec_spark/" in frame.filename]
        if ours:
            name = f"{Path(ours[0].filename).stem}.{ours[0].function}"
            collected[name] = max(collected.get(name, 0), len(brought))
        return brought

    return noting


def counts(outcome: StageResult) -> tuple[int, int, int]:
    return outcome.ok, outcome.failed, outcome.skipped


def test_what_went_in(shop: Shop) -> None:
    details = shop.outcomes["ingest"].details
    # catalogue.py: 60 items, three bad rows and one twice; three items without a photo, five with two.
    assert json.loads(details["items"]) == {"in": 64, "ok": 60, "rejected": 3, "skipped": 1}
    assert json.loads(details["photos"]) == {"in": 62, "ok": 62, "rejected": 0, "skipped": 0}
    assert details["items_without_photo"] == "3"
    events = json.loads(details["interactions"])
    # 12 without a user, 12 without an item, 6 from the future; one event 25 times.
    assert events["rejected"] == 30
    assert events["skipped"] >= 24
    assert events["in"] == events["ok"] + events["rejected"] + events["skipped"]
    assert sum(row["occurrences"] for row in shop.rows(schemas.REJECTED)) == 33


def test_what_was_captioned_and_embedded(shop: Shop) -> None:
    # 57 photos, of which two repeat the first and the two HTML pages are alike; two corrupt ones, an empty one, HTML.
    assert counts(shop.outcomes["caption"]) == (50, 4, 3)
    assert len(shop.rows(schemas.CAPTIONS)) == 54
    assert len(shop.rows(schemas.ITEM_CAPTIONS)) == 52
    assert counts(shop.outcomes["embed"]) == (180, 0, 0)
    # Three without a photo and five whose photo is none.
    assert shop.outcomes["embed"].details["fallback"] == "8"
    assert shop.outcomes["index"].ok == 60


def test_every_user_with_a_history_has_k(shop: Shop) -> None:
    # A bot, a user of unknown items and one who only scrolled have none.
    assert counts(shop.outcomes["profiles"]) == (60, 0, 3)
    assert shop.outcomes["profiles"].details["bot_events"] == "3000"
    # Two of the three get what is popular with all.
    assert counts(shop.outcomes["recommend"]) == (62, 0, 0)
    assert shop.outcomes["recommend"].details["popular_lists"] == "2"
    available = {row["item_id"] for row in shop.rows(schemas.ITEMS) if row["available"]}
    seen = {row["user_id"]: set(row["seen"]) for row in shop.rows(schemas.PROFILES)}
    lists = {
        row["user_id"]: [item["item_id"] for item in row["items"]]
        for row in shop.rows(schemas.RECOMMENDATIONS)
    }
    assert set(lists) == {*seen, "user-lost", "user-odd"}
    seen |= {
        "user-lost": set(),
        "user-odd": {
            row["item_id"]
            for row in shop.rows(schemas.INTERACTIONS)
            if row["user_id"] == "user-odd"
        },
    }
    for user, items in lists.items():
        assert len(set(items)) == len(items) == min(K, len(available - seen[user]))
        assert set(items) <= available - seen[user]
    assert min(map(len, lists.values())) == K


def found_together(histories: dict[str, list]) -> dict[str, dict[str, float]]:
    """How strongly each item is found with each other one, by the defaults."""
    weights, users = defaultdict[str, Counter](Counter), Counter[str]()
    for history in histories.values():
        items = [item["item_id"] for item in history]
        users.update(items)
        for place, other in itertools.combinations(range(len(items)), 2):
            if other - place <= 20:
                for one, two in ((place, other), (other, place)):
                    weights[items[one]][items[two]] += 0.8 ** (other - place - 1)
    return {
        one: {two: weight / (users[one] * users[two]) ** 0.2 for two, weight in with_it.items()}
        for one, with_it in weights.items()
    }


def test_a_score_is_the_highest_weighted_similarity_and_a_share_of_what_is_found_together(
    shop: Shop,
) -> None:
    vectors = {
        row["item_id"]: np.array(row["embedding"])
        for row in shop.rows(schemas.EMBEDDINGS)
        if row["representation"] == "caption"
    }
    histories = {row["user_id"]: row["history"] for row in shop.rows(schemas.PROFILES)}
    assert max(map(len, histories.values())) > 5
    strengths, spoke = found_together(histories), Counter[str]()
    for row in shop.rows(schemas.RECOMMENDATIONS):
        if row["user_id"] not in histories:
            continue
        history = histories[row["user_id"]]
        heaviest = max(item["weight"] for item in history)
        found = defaultdict[str, Counter](Counter)
        for place, past in enumerate(history):
            for other, strength in strengths.get(past["item_id"], {}).items():
                found[other][past["item_id"]] += past["weight"] / heaviest * 0.85**place * strength
        most = max((by.total() for by in found.values()), default=1)
        for item in row["items"]:
            vector = vectors[item["item_id"]]
            similar = {
                past["item_id"]: past["weight"] / heaviest * (vectors[past["item_id"]] @ vector)
                for past in history
            }
            with_it = found[item["item_id"]]
            parts = {
                "content": (1 - SHARE) * max(similar.values()),
                "cooccurrence": SHARE * with_it.total() / most,
            }
            assert item["score"] == pytest.approx(sum(parts.values()), abs=3e-6)
            assert parts[item["source"]] == pytest.approx(max(parts.values()), abs=3e-6)
            by = similar if item["source"] == "content" else with_it
            assert by[item["because_item_id"]] == pytest.approx(max(by.values()), abs=2e-6)
            spoke[item["source"]] += 1
    assert spoke.keys() == {"content", "cooccurrence"}


WITHOUT_SPARK = """
import json, sys
from pathlib import Path
import numpy as np
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k_lists import recommend_lists
from vlm4rec_spark.models.ranking.user_queries import MaxSimilarityQuery

index, item_item, share, k, facts = sys.argv[1:]
searcher = Searcher.open(Path(index))
facts = json.loads(facts)
history = searcher.positions([item for item, _ in facts["history"]])
weights = np.array([weight for _, weight in facts["history"]])
weights = weights / weights.max()
content = MaxSimilarityQuery([history], [weights.astype(np.float32)])
later = weights * 0.85 ** np.arange(len(weights))
query = BlendedQuery(content, ItemItemScores.open(Path(item_item)), float(share), [history], [later])
allowed = np.zeros(len(searcher), np.int64)
allowed[searcher.positions(facts["available"])] = 1
parents = searcher.positions(facts["variants"][0]), np.array(facts["variants"][1])
variants = np.full(len(searcher), -1, np.int64)
variants[parents[0]] = parents[1]
seen = [searcher.positions(facts["seen"])]
rules = ListRules(allowed, variants)
top, scores, _ = recommend_lists(searcher, query, seen, rules, np.zeros(1, np.int64), int(k), None)
assert "pyspark" not in sys.modules
print(json.dumps([[searcher.ids[item], score] for item, score in zip(top[0], scores[0])]))
"""


def test_a_process_without_spark_answers_a_user_with_the_list_of_the_table(shop: Shop) -> None:
    profile = shop.rows(schemas.PROFILES)[0]
    photos = {
        row["item_id"]: row["image_sha256"]
        for row in shop.rows(schemas.PHOTOS)
        if row["position"] == 0
    }
    items = {row["item_id"]: row for row in shop.rows(schemas.ITEMS)}
    # Whatever has a parent or a photo in common, over others too, is one group.
    group = {item: number for number, item in enumerate(items)}
    for _ in items:
        for one, other in itertools.combinations(items, 2):
            same_photo = one in photos and photos[one] == photos.get(other)
            if same_photo or items[one]["parent_id"] == items[other]["parent_id"] is not None:
                group[one] = group[other] = min(group[one], group[other])
    told = {
        "history": [(item["item_id"], item["weight"]) for item in profile["history"]],
        "seen": profile["seen"],
        "available": [item for item, row in items.items() if row["available"]],
        "variants": [list(group), list(group.values())],
    }
    (index,) = (
        path for path in (shop.folder / "index").iterdir() if (path / "vectors.npy").exists()
    )
    (item_item,) = (shop.folder / "index" / "item_item").iterdir()
    command = [
        sys.executable,
        "-c",
        WITHOUT_SPARK,
        str(index),
        str(item_item),
        str(SHARE),
        str(K),
        json.dumps(told),
    ]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (row,) = (
        row for row in shop.rows(schemas.RECOMMENDATIONS) if row["user_id"] == profile["user_id"]
    )
    assert said == [[item["item_id"], item["score"]] for item in row["items"]]


def test_metrics_and_exports(shop: Shop) -> None:
    metrics = {
        (row["arm"], row["metric"]): row
        for row in shop.rows(schemas.METRICS)
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
    assert len(shop.rows(schemas.EXPORT_LONG)) == 62 * K
    assert len(shop.rows(schemas.EXPORT_WIDE)) == 62
    page = (shop.folder / "report.html").read_text()
    assert len(page) > 10_000
    assert '<tr class="mine"><th scope="row">blend</th>' in page


def test_the_captions_are_audited(shop: Shop) -> None:
    found = {row["metric"]: row for row in shop.rows(schemas.METRICS) if row["split"] == "captions"}
    # Nobody is asked again unless that is wanted, and the demo's catalogue says nothing of how things look.
    assert set(found) == {"distinct_share", "distinct_share_all"}
    # 54 contents, of which four have no caption; the fake model tells mean colours, and some look alike to it.
    captions = [row["caption"] for row in shop.rows(schemas.CAPTIONS) if row["status"] == "ok"]
    assert found["distinct_share"]["users"] == len(captions) == 50
    assert found["distinct_share"]["value"] == len(set(captions)) / 50
    assert {row["arm"] for row in found.values()} == {shop.outcomes["caption"].details["model"]}
    (captioner,) = json.loads(shop.outcomes["evaluate"].details["caption_audit"])["captioners"]
    assert (captioner["in_force"], captioner["sampled"]) == (50, 50)
    assert "Do the captions come from the photos?" in (shop.folder / "report.html").read_text()


def test_every_stage_is_recorded(shop: Shop) -> None:
    runs = {row["stage"]: row for row in shop.rows(schemas.RUNS)}
    assert set(runs) == set(STAGES)
    for stage, row in runs.items():
        assert row["status"] == "ok"
        assert (row["rows_ok"], row["rows_failed"], row["rows_skipped"]) == counts(
            shop.outcomes[stage]
        )
        assert row["rows_in"] == sum(counts(shop.outcomes[stage]))
    assert runs["embed"]["versions"].keys() == {"items", "captions", "item_captions", "photos"}
    states = {row["stage"]: row for row in shop.rows(schemas.STATE)}
    assert set(states) == set(STAGES)
    assert all(len(row["fingerprint"]) == 64 for row in states.values())
    assert {row["run_id"] for row in states.values()} == {row["run_id"] for row in runs.values()}


def test_another_reader_opens_every_table(shop: Shop) -> None:
    for table in schemas.TABLES.values():
        other = deltalake.DeltaTable(str(shop.folder / "tables" / table.name))
        assert other.count() == len(shop.rows(table)), table.name
    assert not list((shop.folder / "tables").glob("_*"))


COLLECTED = {
    "matching.index": "the one index build, whose need is said before it starts",
    "asof._index": "the index of an arm",
    "cooccurrence.build": "the pairs of items that are found together, whose need is said before",
    "asof.users": "at most evaluate.max_users judged users, with what they have seen",
    "asof._placed": "the lists of those users",
    "asof._of_items": "the popularity of the candidates",
    "evaluate.opened": "the candidates' ids",
    "evaluate._catalogue": "category and date of the candidates",
    "album._thumbs": "the photos that the report shows, report.photos and the lists of report.users",
    "album._titles": "the items that the report shows",
    "album._captions": "the same",
    "album._first_positions": "the same",
    "auditing._samples": "at most evaluate.audit_photos captions of each captioner",
    "auditing._vectors": "vectors of the texts of those captions",
    "collect._metrics": "the figures of the last evaluation, one row each, 20,000 at most",
    "listing._load": "the items with what rules say of them",
    "listing._choose_search": "at most recommend.recall_sample profiles",
    "listing._popular": "at most 1,000 popular items for each segment and set of rules",
}
"""What may bring more than a few rows to the driver, and why that doesn't grow with the shop."""


def test_nothing_that_grows_is_brought_to_the_driver(shop: Shop) -> None:
    many = {
        name for name, rows in shop.collected.items() if rows > 24
    }  # reasons, stages, tables, a few exhibits
    assert many - COLLECTED.keys() == set()
    assert shop.collected["matching.index"] == 60


def test_tables_in_a_catalog_hold_the_same(
    spark: SparkSession, shop: Shop, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    assert shop.first is not None
    spark.sql("CREATE SCHEMA IF NOT EXISTS whole")
    try:
        other = pipeline(tmp_path, *shop.settings, "tables=spark_catalog.whole")
        other.run([stage for stage in STAGES if stage != "evaluate"])
        for table in schemas.TABLES.values():
            if table.name not in ("runs", "metrics"):
                assert content(other, table) == content(shop.first, table), table.name
    finally:
        spark.sql("DROP SCHEMA whole CASCADE")


def _doubled(x: Column) -> Column:
    return (x * 2).cast("float")


def test_the_real_tables_refuse_a_bad_row(shop: Shop) -> None:
    assert shop.first is not None
    for table, column, bad, refusal in (
        (
            schemas.EMBEDDINGS,
            "embedding",
            F.transform("embedding", _doubled),
            "CHECK constraint unit_length",
        ),
        (
            schemas.CAPTIONS,
            "status",
            F.lit("perhaps"),
            "CHECK constraint (status_is_known|caption_or_error)",
        ),
        (
            schemas.INTERACTIONS,
            "user_id",
            F.lit(None).cast("string"),
            "NOT NULL|CHECK constraint ids_not_empty",
        ),
    ):
        rows = shop.first.tables.read(table).limit(1).withColumn(column, bad)
        with pytest.raises(Exception, match=refusal):
            rows.write.format("delta").mode("append").save(shop.first.tables.name_of(table))


def test_a_second_run_has_nothing_to_do(shop: Shop, pipeline: Callable[..., Pipeline]) -> None:
    assert shop.first is not None
    again = pipeline(shop.folder, *shop.settings)
    before = again.tables.versions(schemas.TABLES.values())
    # What a run that was killed has left.
    again.tables.staged(schemas.ITEM_CAPTIONS, again.tables.read(schemas.ITEM_CAPTIONS))
    outcomes = again.run(STAGES)
    assert list((shop.folder / "tables").glob("_*")) == []
    assert [(outcome.stage, outcome.status) for outcome in outcomes] == [
        (stage, "unchanged") for stage in STAGES
    ]
    assert {outcome.details["unchanged_since"] for outcome in outcomes} == {shop.first.run_id}
    after = again.tables.versions(schemas.TABLES.values())
    assert after.pop("runs") == before.pop("runs") + len(STAGES)
    assert after == before


def told(shop: Shop) -> list[str]:
    """The shop's settings, as the command line takes them."""
    places = (
        f"tables={shop.folder}/tables",
        f"index.folder={shop.folder}/index",
        f"report.path={shop.folder}/r.html",
    )
    return [
        "--config",
        "test.yaml",
        *[part for each in (*places, *shop.settings) for part in ("--set", each)],
    ]


def test_the_figures_of_an_evaluation_are_printed_as_json(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.first is not None
    assert main(["evaluate", "--json", *told(shop)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run_id"], found["config"]["k"]) == (shop.first.run_id, 10)
    assert found["versions"] == shop.outcomes["evaluate"].versions
    assert found["details"]["time"]["users"] > 30
    assert len(found["metrics"]) == shop.first.tables.read(schemas.METRICS).count()
    blend = [
        row
        for row in found["metrics"]
        if (row["arm"], row["metric"], row["k"]) == ("blend", "recall", 20)
    ]
    assert [row["slice"] for row in blend] == ["all"]


def test_tune_writes_a_configuration_that_can_be_used(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_DECAYS", "_HALF_LIVES", "_LAST", "_TASTES", "_SPOKEN", "_POWERS", "_APART"):
        monkeypatch.setattr(tune, name, ())
    monkeypatch.setattr(tune, "_SHARES", (0.5,))
    out = tmp_path / "tuned.yaml"
    assert main(["tune", "--out", str(out), "--representation", "title", *told(shop)]) == 0
    comments = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert sum("<- best" in line for line in comments) in (
        1,
        2,
    )  # the best may be one of content only
    config = load([out])
    assert (config.representation, set(config.evaluate.custom_arms)) == ("title", {"content"})
    assert config.item_item.share in {0.0, 0.4, 0.45, 0.5, 0.55, 0.6}
    assert main(["tune", "--out", str(tmp_path / "gone" / "tuned.yaml"), *told(shop)]) == 2


def test_a_run_that_redoes_everything_changes_nothing(
    shop: Shop, pipeline: Callable[..., Pipeline]
) -> None:
    assert shop.first is not None
    before = {
        table.name: content(shop.first, table)
        for table in schemas.TABLES.values()
        if table.name != "runs"
    }
    # As after a run that was killed before it could record itself.
    shop.first.spark.sql(
        f"DELETE FROM delta.`{shop.first.tables.name_of(schemas.RUNS)}` WHERE stage != 'index'"
    )
    again = pipeline(shop.folder, *shop.settings)
    outcomes = {outcome.stage: outcome for outcome in again.run(STAGES)}
    # No log file and no photo is opened again.
    assert "interactions" not in outcomes["ingest"].details
    assert json.loads(outcomes["ingest"].details["photos"]) == {
        "in": 62,
        "ok": 0,
        "rejected": 0,
        "skipped": 62,
    }
    assert counts(outcomes["caption"]) == (0, 0, 57)
    assert counts(outcomes["embed"]) == (0, 0, 180)
    for table in schemas.TABLES.values():
        if table.name == "metrics":
            assert content(again, table) == sorted(
                2 * before[table.name]
            )  # a run's metrics are its own
        elif table.name != "runs":
            assert content(again, table) == before[table.name], table.name


def test_a_killed_driver_and_a_killed_worker_leave_tables_that_the_next_run_makes_whole(
    shop: Shop, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    assert shop.first is not None
    # The tables are named by a URI here.
    tables, index, page = (
        f"tables=file://{tmp_path}/tables",
        f"{tmp_path}/index",
        f"{tmp_path}/report.html",
    )
    settings = (tables, f"index.folder={index}", f"report.path={page}", *shop.settings, QUICK)
    command = [
        sys.executable,
        "-c",
        "import sys; from vlm4rec_spark.cli import main; main(sys.argv[1:])",
        "run",
    ]
    command += ["--config", "test.yaml", *[part for each in settings for part in ("--set", each)]]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
    # In the middle of a stage: its photos are read, and not yet in their table.
    while not (tmp_path / "tables" / "_staging_photos").exists():
        assert driver.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert [path.name for path in (tmp_path / "tables").glob("_*")] == [
        "_lease-000001.json",
        "_staging_photos",
    ]

    stages = [stage for stage in STAGES if stage != "evaluate"]
    again, killed = pipeline(tmp_path, *shop.settings, tables), threading.Event()
    killer = threading.Thread(target=_kill_a_worker, args=(killed,))
    killer.start()
    try:
        again.run(stages)
    except Exception as died:
        assert "Python worker exited unexpectedly" in str(died)
        again.run(stages)
    finally:
        killed.set()
        killer.join()
    for table in schemas.TABLES.values():
        if table.name not in ("runs", "metrics"):
            assert content(again, table) == content(shop.first, table), table.name
    assert list((tmp_path / "tables").glob("_*")) == []


def _kill_a_worker(killed: threading.Event) -> None:
    """SIGKILL to the first Python worker of this process's Spark that is at work."""
    while not killed.wait(0.02):
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, daemon = _state(place)
                _, jvm = _state(Path("/proc", daemon))
                _, driver = _state(Path("/proc", jvm))
                if state == "R" and int(driver) == os.getpid():
                    os.kill(int(place.name), signal.SIGKILL)
                    killed.set()


def _state(process: Path) -> tuple[str, str]:
    """Its state, R while it runs, and its parent."""
    state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    return state, parent


def content(run: Pipeline, table: schemas.Table) -> list[str]:
    """Every row as text, without photos' bytes and the columns that say when or by whom it was made."""
    left_out = {"image", "run_id", *table.volatile}
    return sorted(str(row) for row in run.tables.read(table).drop(*left_out).collect())


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
    "table of another schema": (RunError, "bytes is missing", ["tables={tmp}/other"]),
    "no permission": (RunError, "nothing can be written to", ["tables=/proc/nowhere/tables"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_said_in_one_paragraph_and_changes_no_table(
    spark: SparkSession, shop: Shop, pipeline: Callable[..., Pipeline], tmp_path: Path, fault: str
) -> None:
    (tmp_path / "empty.csv").write_text("item_id,title\n")
    (tmp_path / "others.csv").write_text(
        "user_id,item_id,event_type,event_time\nann,gone,view,2025-01-01\n"
    )
    if fault == "table of another schema":
        spark.sql("SELECT 'x' AS uri").write.format("delta").save(str(tmp_path / "other" / "files"))
    kind, said, settings = FAULTS[fault]
    places = [tmp_path / "other", shop.folder / "tables"]
    before = [sorted(place.rglob("*")) for place in places]
    with pytest.raises(kind, match=said) as raised:
        pipeline(
            shop.folder, *shop.settings, *[each.format(tmp=tmp_path) for each in settings]
        ).run(STAGES, lambda outcome: None)
    assert raised.value.exit_code == (2 if kind is UsageError else 1)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert [sorted(place.rglob("*")) for place in places] == before
