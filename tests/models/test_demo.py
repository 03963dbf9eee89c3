"""The demo's shop: same bytes for a seed, looks that only photos show, errors of real data.

That ingest rejects, repeats and skips as many rows as are planted is in test_pipeline.py.
"""

from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.demo.drawing import ATTRIBUTES, SIZE, draw
from vlm4rec_spark.models.captioning.caption_template import extract_attributes
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.photo_errors import PhotoError

SHIRT = {
    "kind": "shirt",
    "colour": "red",
    "pattern": "striped",
    "material": "cotton",
    "style": "sporty",
}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_generator_draws_the_same_photo():
    photo, same, different = (draw(SHIRT, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (photo.size, photo.mode) == ((SIZE, SIZE), "RGB")
    assert photo.tobytes() == same.tobytes()
    assert photo.tobytes() != different.tobytes()


def test_the_same_seed_writes_the_same_shop(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        catalogue.write(tmp_path / name, seed=seed, items=40, users=12)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_titles_brands_and_categories_say_nothing_about_the_look(tmp_path):
    catalogue.write(tmp_path, items=40, users=12)
    rows = pd.read_csv(tmp_path / "catalogue.csv", dtype=str, keep_default_na=False)
    texts = [" ".join(row) for row in rows[["title", "brand", "category"]].to_numpy()]
    assert len(texts) == 44
    assert not any(extract_attributes(text, ATTRIBUTES) for text in texts)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    catalogue.write(folder, items=60, users=60)
    return folder


def photo_files(shop: Path) -> list[Path]:
    return sorted((shop / "photos").iterdir())


def test_some_photos_are_broken_or_in_odd_formats(shop):
    errors: Counter[str] = Counter()
    kinds: Counter[object] = Counter()
    sizes = set()
    for file in photo_files(shop):
        try:
            sizes.add(decode(file.read_bytes(), 224).size)
        except PhotoError as refused:
            errors[refused.error_class] += 1
            continue
        with Image.open(file) as image:
            kinds[image.format, image.mode] += 1
            kinds["animated"] += getattr(image, "is_animated", False)
            kinds["rotated"] += 0x0112 in image.getexif()
    assert errors == {"truncated": 2, "empty": 1, "html_page": 2}
    assert (kinds["JPEG", "CMYK"], kinds["PNG", "RGBA"], kinds["WEBP", "RGB"]) == (2, 2, 1)
    assert (kinds["animated"], kinds["rotated"]) == (2, 2)
    # All are upright once decoded.
    assert sizes == {(SIZE, SIZE)}


def test_twins_are_alike_in_truth_as_in_their_photos(shop):
    truth = pd.read_parquet(shop / "truth.parquet")
    assert truth.loc[[0, 8, 9], list(ATTRIBUTES)].drop_duplicates().shape == (1, 5)


def read_csv(*files: Path) -> pd.DataFrame:
    return pd.concat(pd.read_csv(file, dtype=str, keep_default_na=False) for file in files)


@pytest.fixture(scope="module")
def log(shop: Path) -> pd.DataFrame:
    return read_csv(*sorted(shop.glob("events-*.gz")))


def test_the_log_has_the_errors_of_real_data(shop, log):
    months = sorted(file.name[7:14] for file in shop.glob("events-*.gz"))
    assert months == [f"2025-0{month}" for month in range(1, 6)]
    assert set(log["event_type"]) == {"view", "cart", "purchase", "scroll"}
    assert ((log["user_id"] == "").sum(), (log["item_id"] == "").sum()) == (12, 12)
    assert log["item_id"].str.startswith("GONE-").sum() == 40
    assert (log["event_time"] > "2099").sum() == 6


def test_some_items_nobody_views(shop, log):
    items = set(pd.read_parquet(shop / "truth.parquet")["item_id"])
    assert items - set(log[log["user_id"].str.match(r"user-\d+$")]["item_id"])
