"""Embed: which text an item has in each representation, which texts are pending, and their vectors."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from vlm4rec_spark.models.encoding.text_encoder import FakeEmbedder
from vlm4rec_spark.models.encoding.vision_encoder import FakeVision
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.download import HttpSettings
from vlm4rec_spark.stages import embed
from vlm4rec_spark.stages.embed import EmbedSettings
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

FAKE = EmbedSettings(encoder="fake")


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


def test_every_item_has_its_text_in_every_representation(texts: DataFrame) -> None:
    found = {
        (row["item_id"], row["representation"]): (row["text"], row["fallback"])
        for row in texts.collect()
    }
    assert found == {
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


def test_only_new_and_changed_texts_are_pending(spark: SparkSession, texts: DataFrame) -> None:
    sha256 = hashlib.sha256(b"256\nChair").hexdigest()
    vector = [1.0, 0.0]
    done = spark.createDataFrame(
        [
            ("two", "title", "fake", sha256, False, vector),
            ("same", "title", "other", sha256, False, vector),
            ("bare", "title", "fake", "0" * 64, False, vector),
        ],
        schemas.EMBEDDINGS.schema,
    )
    titles = texts.where("representation = 'title'")
    pending = embed.pending_texts(titles, done, "fake", max_words=256)
    assert sorted(row["item_id"] for row in pending.collect()) == ["bare", "same"]
    # Cut elsewhere, every text is another one.
    assert embed.pending_texts(titles, done, "fake", max_words=8).count() == 3


def test_vectors_are_those_of_the_cleaned_text(spark: SparkSession) -> None:
    rows = [
        ("plain", "a red chair"),
        ("markup", "<b>a red</b>&nbsp;chair<script>x()</script>"),
        ("long", "a red chair " * 9),
        ("empty", "<p></p>"),
        ("other", "one blue lamp"),
    ]
    texts = spark.createDataFrame(
        [(item, "title", text, "0" * 64, False) for item, text in rows],
        "item_id STRING, representation STRING, text STRING, content_sha256 STRING, fallback BOOLEAN",
    )
    made = embed.embed(
        texts.repartition(2), "fake-64@1", FAKE.model_copy(update={"max_words": 3})
    ).collect()
    red, blue = FakeEmbedder().embed(["a red chair", "one blue lamp"])
    expected = {"plain": red, "markup": red, "long": red, "other": blue}
    assert {row["item_id"] for row in made} == set(expected)
    for row in made:
        np.testing.assert_array_equal(np.float32(row["embedding"]), expected[row["item_id"]])
    assert {(row["representation"], row["encoder_id"], row["fallback"]) for row in made} == {
        ("title", "fake-64@1", False)
    }


def jpeg(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    photo = Image.new("RGB", (16, 16), colour)
    photo.paste((0, 0, 0), (0, 0, 8, 8))
    photo.save(file, "PNG")
    return file.getvalue()


def test_main_photos_become_vectors_and_bad_ones_no_row(
    spark: SparkSession, tmp_path: Path
) -> None:
    red, blue = jpeg((200, 0, 0)), jpeg((0, 0, 200))
    (tmp_path / "away.png").write_bytes(blue)
    (tmp_path / "other.png").write_bytes(red)
    digest = {data: hashlib.sha256(data).hexdigest() for data in (red, blue, b"no photo")}
    rows = [
        ("kept", 1, None, red, digest[red]),
        ("kept", 2, None, blue, digest[blue]),
        ("away", 0, str(tmp_path / "away.png"), None, digest[blue]),
        ("changed", 0, str(tmp_path / "other.png"), None, digest[blue]),
        ("bad", 0, None, b"no photo", digest[b"no photo"]),
        ("done", 0, None, red, digest[red]),
        ("was other", 0, None, red, digest[red]),
    ]
    photos = spark.createDataFrame(
        rows, "item_id STRING, position INT, uri STRING, image BINARY, image_sha256 STRING"
    )
    done = spark.createDataFrame(
        [
            ("done", "image", "v", digest[red], False, [1.0]),
            ("was other", "image", "v", digest[blue], False, [1.0]),
            ("kept", "image", "another", digest[red], False, [1.0]),
        ],
        schemas.EMBEDDINGS.schema,
    )
    pending = embed.pending_photos(embed.main_photos(photos), done, "v")
    found = {(row["item_id"], row["position"]) for row in pending.collect()}
    assert found == {("kept", 1), ("away", 0), ("changed", 0), ("bad", 0), ("was other", 0)}

    wanted = photos.join(
        pending.select("item_id", "position"), on=["item_id", "position"], how="left_semi"
    )
    settings = EmbedSettings(encoder="fake", vision="fake")
    made = embed.embed_photos(
        wanted.withColumnRenamed("image_sha256", "content_sha256"), "v", settings, HttpSettings()
    )
    red_vector, blue_vector = FakeVision().embed([decode(data, 64) for data in (red, blue)])
    vectors = {row["item_id"]: np.float32(row["embedding"]) for row in made.collect()}
    assert set(vectors) == {"kept", "away", "was other"}
    np.testing.assert_array_equal(vectors["kept"], red_vector)
    np.testing.assert_array_equal(vectors["away"], blue_vector)
    assert {
        (row["representation"], row["encoder_id"], row["fallback"]) for row in made.collect()
    } == {("image", "v", False)}


def test_untidy_texts_are_counted(spark: SparkSession) -> None:
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
    (found,) = embed.untidy(texts, 3).collect()
    assert found.asDict() == {"scripts": 1, "markup": 1, "too_long": 3}
