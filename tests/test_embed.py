"""Embed: the text of each representation, which texts and photos are pending, and their vectors."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from pyspark.sql import DataFrame, Row, SparkSession

from vlm4rec_spark.models.encoding.text_encoder import FakeEmbedder
from vlm4rec_spark.models.encoding.vision_encoder import FakeVision
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.download import HttpSettings
from vlm4rec_spark.stages import embed
from vlm4rec_spark.stages.embed import EmbedSettings
from vlm4rec_spark.storage.schemas import EMBEDDINGS


def assert_vectors(rows: list[Row], expected: dict[str, np.ndarray]) -> None:
    """The rows are of these items, with exactly these vectors."""
    assert {row["item_id"] for row in rows} == set(expected)
    for row in rows:
        np.testing.assert_array_equal(np.float32(row["embedding"]), expected[row["item_id"]])


def kinds(rows: list[Row]) -> set[tuple[str, str, bool]]:
    return {(row["representation"], row["encoder_id"], row["fallback"]) for row in rows}


@pytest.fixture(scope="module")
def texts(spark: SparkSession) -> DataFrame:
    items = spark.createDataFrame(
        [
            ("two", "Chair"),
            ("same", "Chair"),
            ("bare", "Lamp"),
            ("untitled", None),
            ("nothing", None),
        ],
        "item_id STRING, title STRING",
    )
    links = spark.createDataFrame(
        [
            ("two", 1, "k2"),
            ("two", 0, "k1"),
            ("same", 0, "k1"),
            ("same", 1, "k1"),
            ("untitled", 0, "k2"),
        ],
        "item_id STRING, position INT, caption_key STRING",
    )
    captions = spark.createDataFrame(
        [("k1", "Red."), ("k2", "Old.")], "caption_key STRING, caption STRING"
    )
    return embed.item_texts(items, links, captions)


def test_every_item_has_a_text_in_every_representation(texts: DataFrame):
    rows = {
        (row["item_id"], row["representation"]): (row["text"], row["fallback"])
        for row in texts.collect()
    }
    assert rows == {
        ("two", "title"): ("Chair", False),
        ("two", "caption"): ("Red. Old.", False),
        ("two", "title_caption"): ("Chair. Red. Old.", False),
        ("same", "title"): ("Chair", False),
        ("same", "caption"): ("Red.", False),
        ("same", "title_caption"): ("Chair. Red.", False),
        ("bare", "title"): ("Lamp", False),
        ("bare", "caption"): ("Lamp", True),
        ("bare", "title_caption"): ("Lamp", True),
        ("untitled", "title"): (None, False),
        ("untitled", "caption"): ("Old.", False),
        ("untitled", "title_caption"): ("Old.", False),
        ("nothing", "title"): (None, False),
        ("nothing", "caption"): (None, True),
        ("nothing", "title_caption"): (None, True),
    }


def test_only_new_and_changed_texts_are_pending(spark: SparkSession, texts: DataFrame):
    sha256 = hashlib.sha256(b"256\nChair").hexdigest()
    vector = [1.0, 0.0]
    embeddings = spark.createDataFrame(
        [
            ("two", "title", "fake", sha256, False, vector),
            ("same", "title", "other", sha256, False, vector),
            ("bare", "title", "fake", "0" * 64, False, vector),
        ],
        EMBEDDINGS.schema,
    )
    titles = texts.where("representation = 'title'")
    marked = embed.marked_texts(titles, embeddings, "fake", max_words=256)
    pending = marked.where("is_pending").collect()
    assert {row["item_id"]: row["has_vector"] for row in pending} == {"bare": True, "same": False}
    (figures,) = marked.agg(*embed.pending_figures()).collect()
    assert figures.asDict() == {"rows": titles.count(), "pending": 2, "changed": 1}
    # With another limit of words, every text is another one.
    marked = embed.marked_texts(titles, embeddings, "fake", max_words=8)
    assert marked.where("is_pending").count() == 3


def test_vectors_are_those_of_the_cleaned_text(spark: SparkSession):
    rows = [
        ("plain", "a red chair"),
        ("markup", "<b>a red</b>&nbsp;chair<script>x()</script>"),
        ("long", "a red chair " * 9),
        ("empty", "<p></p>"),
        ("other", "one blue lamp"),
    ]
    texts = spark.createDataFrame(
        [(item, "title", text, "0" * 64, False) for item, text in rows],
        "item_id STRING, representation STRING, text STRING, content_sha256 STRING, "
        "fallback BOOLEAN",
    )
    three_words = EmbedSettings(encoder="fake", max_words=3)
    rows = embed.embed(texts.repartition(2), "fake-64@1", three_words).collect()
    red, blue = FakeEmbedder().embed(["a red chair", "one blue lamp"])
    assert_vectors(rows, {"plain": red, "markup": red, "long": red, "other": blue})
    assert kinds(rows) == {("title", "fake-64@1", False)}


def png(color: tuple[int, int, int]) -> bytes:
    photo = Image.new("RGB", (16, 16), color)
    photo.paste((0, 0, 0), (0, 0, 8, 8))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


RED = png((200, 0, 0))
BLUE = png((0, 0, 200))
NO_PHOTO = b"no photo"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def photos(spark: SparkSession, tmp_path) -> DataFrame:
    (tmp_path / "stored.png").write_bytes(BLUE)
    (tmp_path / "changed.png").write_bytes(RED)
    rows = [
        ("two photos", 1, None, RED, sha256(RED)),
        ("two photos", 2, None, BLUE, sha256(BLUE)),
        ("in a file", 0, str(tmp_path / "stored.png"), None, sha256(BLUE)),
        ("changed file", 0, str(tmp_path / "changed.png"), None, sha256(BLUE)),
        ("bad", 0, None, NO_PHOTO, sha256(NO_PHOTO)),
        ("embedded", 0, None, RED, sha256(RED)),
        ("other embedded", 0, None, RED, sha256(RED)),
    ]
    return spark.createDataFrame(
        rows, "item_id STRING, position INT, uri STRING, image BINARY, image_sha256 STRING"
    )


def test_main_photos_without_a_vector_are_pending(spark: SparkSession, photos: DataFrame):
    embedded = spark.createDataFrame(
        [
            ("embedded", "image", "v", sha256(RED), False, [1.0]),
            ("other embedded", "image", "v", sha256(BLUE), False, [1.0]),
            ("two photos", "image", "another", sha256(RED), False, [1.0]),
        ],
        EMBEDDINGS.schema,
    )
    marked = embed.marked_photos(embed.main_photos(photos), embedded, "v")
    pending = marked.where("is_pending")
    assert {(row["item_id"], row["position"]) for row in pending.collect()} == {
        ("two photos", 1),
        ("in a file", 0),
        ("changed file", 0),
        ("bad", 0),
        ("other embedded", 0),
    }


def test_photos_become_vectors_and_bad_ones_no_row(photos: DataFrame):
    settings = EmbedSettings(encoder="fake", vision="fake")
    main = photos.where("position < 2 AND item_id != 'embedded'")
    rows = embed.embed_photos(
        main.withColumnRenamed("image_sha256", "content_sha256"), "v", settings, HttpSettings()
    ).collect()
    red, blue = FakeVision().embed([decode(data, 64) for data in (RED, BLUE)])
    assert_vectors(rows, {"two photos": red, "in a file": blue, "other embedded": red})
    assert kinds(rows) == {("image", "v", False)}


def test_problems_of_texts_are_counted(spark: SparkSession):
    rows = [
        ("a", "title", "<script>var x = 1</script> Mug", False),
        ("a", "caption", "A <b>red</b> mug", False),
        ("b", "title", "Tray, width < 40 cm, height > 2", False),
        ("b", "caption", " one two  three four ", False),
        ("c", "title", None, False),
        ("c", "caption", "<i>bare</i>", True),
        ("c", "title_caption", "<i>x</i>", False),
    ]
    texts = spark.createDataFrame(
        rows, "item_id STRING, representation STRING, text STRING, fallback BOOLEAN"
    )
    marked = embed.marked_texts(texts, spark.createDataFrame([], EMBEDDINGS.schema), "fake", 3)
    (figures,) = embed.text_figures(marked, 3).collect()
    counts = {"rows": 7, "pending": 6, "changed": 0}
    assert figures.asDict() == counts | {"scripts": 1, "markup": 1, "too_long": 3}
