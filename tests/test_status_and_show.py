"""`status` and `show`: their output for a small shop of literal rows. They change nothing."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from shop import MakePipeline

from vlm4rec_spark.cli import main, show, status
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import Pipeline
from vlm4rec_spark.storage import schemas

INDEX = "0123456789abcdef"
DELETED_INDEX = "fedcba9876543210"
MONDAY = datetime(2025, 3, 3, 12, 30, tzinfo=UTC)
# A title may contain anything: markup of the terminal's library, line ends, terminal commands.
HOSTILE_TITLE = "Mug [red]2[/]\n\x1b[2J"
ITEMS = {"mug-red": "Mug 1", "mug-blue": HOSTILE_TITLE, "hat-red": "Hat 1", "o'brien": "Cap"}
VECTORS = {"hat-red": (0.6, 0.8), "mug-blue": (0.8, 0.6), "mug-red": (1.0, 0.0)}


def run(
    stage: str, hour: int, run_status: str = "ok", counts: tuple = (3, 2, 1), **details: str
) -> dict:
    rows = dict(zip(("rows_ok", "rows_failed", "rows_skipped"), counts, strict=True))
    return rows | {
        "run_id": f"{stage}{hour}",
        "stage": stage,
        "status": run_status,
        "versions": {},
        "config": "{}",
        "rows_in": sum(counts),
        "started_at": MONDAY.replace(hour=hour),
        "seconds": 1.25,
        "details": details,
    }


def photo(item_id: str, position: int, sha: str) -> tuple:
    uri = f"s3a://shop/{item_id}.{position}.jpg"
    return item_id, position, uri, b"x", sha * 64, 15_100, MONDAY, None


def caption(
    key: str, sha: str | None, text: str | None, state: str, error: tuple = (None, None)
) -> tuple:
    model = "llava@1" if sha else None
    prompt = "describe.1" if sha else None
    attributes = {"colour": "red"} if state == "ok" else None
    return (
        key,
        sha and sha * 64,
        prompt,
        model,
        text,
        attributes,
        None,
        None,
        state,
        *error,
        1,
        MONDAY,
        "r1",
    )


ROWS: dict[schemas.Table, list] = {
    schemas.ITEMS: [
        (
            item,
            title,
            "Kintsu",
            None,
            None,
            None,
            9.5,
            None,
            None,
            {"colour": "red"},
            item != "hat-red",
            None,
            MONDAY,
        )
        for item, title in ITEMS.items()
    ],
    schemas.PHOTOS: [photo("mug-red", 0, "a"), photo("mug-red", 1, "b"), photo("mug-red", 2, "c")],
    schemas.CAPTIONS: [
        caption("k1", "a", "A red mug.", "ok"),
        caption("k2", "b", None, "failed", ("ImageError", "no image")),
        caption("k3", None, "A blue mug.", "imported"),
        caption("old", "a", "An older text.", "ok"),
    ],
    schemas.ITEM_CAPTIONS: [("mug-red", 0, "k1"), ("mug-blue", 0, "k3")],
    schemas.INTERACTIONS: [
        (f"e{n}", user, "mug-red", "view", MONDAY, MONDAY.date())
        for n, user in enumerate(("ann", "bob"))
    ],
    schemas.PROFILES: [
        (
            "ann",
            "caption",
            [("mug-red", 4.25), ("hat-red", 0.5)],
            ["hat-red", "mug-red", "o'brien"],
            None,
            3,
            MONDAY,
        )
    ],
    schemas.RECOMMENDATIONS: [
        (
            "ann",
            "default",
            [("mug-blue", 0.875, "mug-red", ["blue", "mug"], "content", [])],
            5,
            INDEX,
            "r1",
            MONDAY,
        ),
        (
            "cid",
            "default",
            [("hat-red", 0.5, None, [], "content", [])],
            5,
            DELETED_INDEX,
            "r1",
            MONDAY + timedelta(hours=1),
        ),
    ],
    schemas.RUNS: [
        run("ingest", 8),
        run("ingest", 9, "failed", (0, 1_234_567, 0)),
        run("embed", 11, "unchanged", (0, 0, 0)),
        run("maintain", 12),
    ],
}


@pytest.fixture(scope="module")
def shop(pipeline: MakePipeline, tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("shop")
    shop = pipeline(folder)
    index_run = run("index", 10, index_id=INDEX, representation="caption")
    in_force = ("index", 1, None, {}, "caption", INDEX, None, None, None, "r1", MONDAY)
    index_rows = {schemas.RUNS: [*ROWS[schemas.RUNS], index_run], schemas.STATE: [in_force]}
    for table, rows in (ROWS | index_rows).items():
        shop.tables.replace(table, shop.spark.createDataFrame(rows, table.schema))
    vectors = np.asarray(list(VECTORS.values()), np.float32)
    Searcher.build(
        folder / "index" / INDEX,
        INDEX,
        list(VECTORS),
        vectors,
        ["a", "b", "c"],
        ann_min_items=10**6,
    )
    return shop


def output(print_to: Callable[..., None], *arguments: object, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    print_to(*arguments, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def line(text: str, *words: str) -> str:
    """The first line that contains these words, with single spaces."""
    for text_line in text.splitlines():
        single_spaced = " ".join(text_line.split())
        if all(word in single_spaced for word in words):
            return single_spaced
    raise AssertionError(f"no line with {words} in:\n{text}")


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_a_user(shop: Pipeline):
    text = output(show.user, shop, "ann")
    assert line(text, "User") == (
        "User ann: events that count: 3, the last on 2025-03-03; items seen: 3; compared by caption"
    )
    assert line(text, "4.25") == "mug-red Mug 1 4.25 A red mug."
    assert line(text, "0.50") == "hat-red Hat 1 0.50"
    assert (
        line(text, "Recommendations") == f"Recommendations of 2025-03-03, made with index {INDEX}"
    )
    assert line(text, "0.875") == "1 mug-blue Mug [red]2[/] [2J 0.875 mug-red blue, mug"
    assert "\x1b[2J" not in text
    # On a narrow terminal texts are cut, and ids are not.
    assert line(output(show.user, shop, "ann", width=36), "4.25").startswith("mug-red M")


def test_a_user_without_a_list_and_one_without_a_profile(shop: Pipeline):
    text = output(show.user, shop, "bob")
    assert line(text, "User bob").startswith("User bob: events in the log: 1, but no history")
    assert line(text, "No recommendations").startswith("No recommendations yet")
    assert line(output(show.user, shop, "cid"), "0.500") == "1 hat-red Hat 1 0.500 -"


def test_an_item(shop: Pipeline):
    text = output(show.item, shop, "mug-red")
    assert line(text, "Item") == "Item mug-red: Mug 1"
    for row in ("brand Kintsu", "price 9.50", "colour red", "available yes"):
        assert line(text, row.split()[0]) == row
    assert (
        line(text, "Photo 0") == f"Photo 0: s3a://shop/mug-red.0.jpg (15.1 kB, sha256 {'a' * 64})"
    )
    # The caption in force, not the older one of the same photo.
    assert line(text, "caption ok") == "caption ok by llava@1, prompt describe.1: A red mug."
    assert line(text, "in it") == "attributes in it: colour: red"
    assert (
        line(text, "caption failed")
        == "caption failed by llava@1, prompt describe.1: ImageError, no image"
    )
    assert text.index("Photo 2") < text.index("not captioned")
    assert line(text, "Nearest") == f"Nearest in index {INDEX}"
    assert line(text, "0.800") == "mug-blue Mug [red]2[/] [2J 0.800 A blue mug."
    assert text.index("0.800") < text.index("0.600")
    assert "1.000" not in text
    assert line(text, "lists") == "On the lists of: 0 of 2 users"


def test_items_without_photo_or_vector(shop: Pipeline):
    text = output(show.item, shop, "o'brien")
    assert line(text, "No photo") == "No photo and no caption: its title is compared instead."
    assert (
        line(text, "No neighbors") == f"No neighbors: the index {INDEX} doesn't contain this item."
    )
    text = output(show.item, shop, "mug-blue")
    assert line(text, "Text 0") == "Text 0: imported, without a photo"
    assert line(text, "caption imported") == "caption imported: A blue mug."
    assert line(text, "lists") == "On the lists of: 1 of 2 users"
    assert (
        line(output(show.item, shop, "hat-red"), "available") == "available no: never recommended"
    )


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        ("user", "anna", "There is no user 'anna' in the log. Did you mean 'ann'?"),
        ("user", "ann' OR '1'='1", "There is no user \"ann' OR '1'='1\" in the log."),
        ("item", "MUG-RAD", "There is no item 'MUG-RAD' in the catalogue. Did you mean 'mug-red'?"),
        ("item", "%", "There is no item '%' in the catalogue."),
        ("item", "\x1b[2J", r"There is no item '\x1b[2J' in the catalogue."),
        ("item", "", "There is no item '' in the catalogue."),
    ],
)
def test_an_unknown_id(shop: Pipeline, kind: str, wanted: str, message: str):
    with pytest.raises(RunError) as error:
        output(getattr(show, kind), shop, wanted)
    assert str(error.value) == message
    assert error.value.exit_code == 1


def test_few_ids_are_collected_however_many_there_are(shop: Pipeline):
    many = shop.spark.range(100_000).selectExpr("concat('i', id) AS item_id")
    collected: list[int] = []

    class CountingFrame:
        """Forwards to a DataFrame, and counts the rows that are collected."""

        def __init__(self, frame: object):
            self.frame = frame

        def __getattr__(self, name: str) -> Callable:
            def call(*arguments: object) -> object:
                result = getattr(self.frame, name)(*arguments)
                if name == "collect":
                    collected.append(len(result))
                    return result
                return CountingFrame(result)

            return call

    error = show._unknown("item", "i99999x", CountingFrame(many))  # type: ignore[arg-type]
    assert "Did you mean 'i99999'" in str(error)
    assert collected == [50]


def test_status(shop: Pipeline):
    folder = Path(shop.tables.location).parent
    before = files(folder)
    text = output(status.show, shop, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert line(text, "Tables at").startswith("Tables at /")
    words = line(text, "interactions").split()
    assert (words[0], words[3], words[4]) == ("interactions", "2", "1")
    assert datetime.fromisoformat(f"{words[1]} {words[2]}+00:00") <= datetime.now(UTC)
    assert line(text, "metrics") == "metrics not there yet"
    assert line(text, "ingest 2025") == "ingest 2025-03-03 09:30 failed 0 1,234,567 0 1.2"
    assert line(text, "embed", "2025") == "embed 2025-03-03 11:30 unchanged 0 0 0 1.2"
    assert line(text, "profiles not") == "profiles not yet"
    assert line(text, "maintain") == "maintain 2025-03-03 12:30 ok 3 2 1 1.2"
    # The latest list was made with an index whose folder is gone.
    assert line(text, INDEX).startswith(f"{INDEX} caption 20")
    assert line(text, DELETED_INDEX) == f"{DELETED_INDEX} the lists gone"
    assert files(folder) == before


def test_before_the_first_run(
    shop: Pipeline,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setenv("COLUMNS", "100")
    paths = ["--set", f"tables={tmp_path}/nowhere", "--set", f"index.folder={tmp_path}/index"]
    assert main(["status", *paths]) == 0
    out, err = capsys.readouterr()
    assert line(out, "items") == "items not there yet"
    assert line(out, "ingest not") == "ingest not yet"
    assert line(out, "none") == "none yet"
    # What is waited for, also where nobody sees a terminal.
    assert err == "  starting Spark\n"
    assert main(["show", "user", "ann", *paths]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    error = f"Error: The table {tmp_path}/nowhere/interactions isn't there yet. Run the stage"
    assert err.startswith(f"  starting Spark\n{error}")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_passes_an_id_on_as_it_is(shop: Pipeline, capsys):
    tables = f"tables={shop.tables.location}"
    index = f"index.folder={shop.config.index.folder}"
    paths = ["--set", tables, "--set", index]
    assert main(["show", "item", *paths, "--", "o'brien"]) == 0
    assert line(capsys.readouterr().out, "Item") == "Item o'brien: Cap"
    assert main(["show", "item", "-x", *paths]) == 2
    assert main(["show", "item", *paths, "--", "-x"]) == 1
    assert capsys.readouterr().err.endswith("Error: There is no item '-x' in the catalogue.\n")
