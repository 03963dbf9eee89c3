"""Photos of which the model is asked a second time, each slightly changed, by a UDF. Knows rows; knows no table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd
from pyspark.sql import DataFrame

from vlm4rec_spark.models.photos import perturbations, photo_storage
from vlm4rec_spark.models.photos.download import HttpSettings


def recaption(photos: DataFrame, max_side: int, http: HttpSettings) -> DataFrame:
    """Rows as `worker.caption_photos` takes them, with another photo in place of each; empty where there is none."""
    return photos.mapInPandas(_retaking_udf(max_side, http), photos.schema)


def _retaking_udf(
    max_side: int, http: HttpSettings
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def retake(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            images = [
                _retaken(*pair, max_side, http)
                for pair in zip(batch["image"], batch["uri"], strict=True)
            ]
            # Without its place, or the worker would look there for what is empty here.
            yield batch.assign(image=images, uri=None)

    return retake


def _retaken(image: bytes | None, uri: str | None, max_side: int, http: HttpSettings) -> bytes:
    """Empty for a photo that can't be had any more: it then counts among those that can't be described."""
    try:
        if image is None and uri:
            found = photo_storage.read_if_changed(uri, http)
            image = found[0] if found else None
        return perturbations.perturbed(bytes(image or b""), max_side)
    except (
        Exception
    ):  # a place raises whatever it likes, and the caption in force says that the photo was good
        return b""
