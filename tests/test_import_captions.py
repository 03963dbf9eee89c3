"""import-captions: another shop's captions are taken over, and nothing is paid for twice."""

from collections.abc import Callable

import pytest
from hostile_photos import GOOD
from shop import MakePipeline

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.pipeline import Pipeline
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.storage.schemas import CAPTIONS, ITEM_CAPTIONS

PHOTOS = {"A": GOOD["jpeg"], "B": GOOD["grey"], "C": b"<html></html>"}


@pytest.fixture
def shop(pipeline: MakePipeline, tmp_path) -> Callable[[str], Pipeline]:
    """A function from a name to a pipeline with ingested photos, one of which is an HTML page."""
    for item, data in PHOTOS.items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{item}.jpg").write_bytes(data)
    (tmp_path / "shop.csv").write_text("item_id\n" + "\n".join(PHOTOS))

    def open_shop(name: str) -> Pipeline:
        run = pipeline(
            tmp_path / name,
            f"ingest.items.path=[{tmp_path}/shop.csv]",
            f"ingest.photos.folder={tmp_path}/photos",
            "caption.max_failed_share=1",
            f"caption.model.model=count={tmp_path}/calls",
        )
        run.run(["ingest"])
        return run

    return open_shop


def test_captions_of_another_shop_leave_nothing_to_caption(
    shop: Callable[[str], Pipeline], tmp_path
):
    old = shop("old")
    old.run(["caption"])
    calls = (tmp_path / "calls").read_bytes()
    new = shop("new")
    assert new.plan().now == 3
    source = Source(path=(f"{tmp_path}/old/tables/captions",), format="delta")
    result = new.import_captions(source)
    assert [result.ok, result.failed, result.skipped] == [2, 0, 1]
    captions = old.tables.read(CAPTIONS).where("status = 'ok'").orderBy("caption_key")
    taken_over = new.tables.read(CAPTIONS).orderBy("caption_key")
    assert taken_over.collect() == captions.collect()

    # Only the HTML page is left, for which no model is asked.
    assert new.plan().now == 1
    new.run(["caption"])
    assert (tmp_path / "calls").read_bytes() == calls
    in_force = new.tables.read(ITEM_CAPTIONS).select("item_id").collect()
    assert {row["item_id"] for row in in_force} == {"A", "B"}
    result = new.import_captions(source)
    assert [result.ok, result.failed, result.skipped] == [0, 0, 3]


def test_a_table_without_a_good_caption_is_refused(shop: Callable[[str], Pipeline], tmp_path):
    run = shop("empty")
    rows = run.spark.createDataFrame([], CAPTIONS.schema)
    rows.write.format("delta").save(f"{tmp_path}/captions")
    with pytest.raises(RunError, match="the table has no caption of status ok"):
        run.import_captions(Source(path=(f"{tmp_path}/captions",), format="delta"))
