"""The UDF that perturbs photos, for a second caption. Knows rows; knows no table."""

from collections.abc import Iterator

import pandas as pd
from pyspark.sql import DataFrame

from vlm4rec_spark.models.photos import perturbations, photo_reader
from vlm4rec_spark.models.photos.download import HttpSettings


def recaption(
    photos: DataFrame,
    max_side: int,
    http: HttpSettings,
) -> DataFrame:
    """Rows for `worker.caption_photos`, with every photo perturbed; empty where it is lost."""

    def perturb(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            images = [
                _perturbed(image, uri, max_side, http)
                for image, uri in zip(batch["image"], batch["uri"], strict=True)
            ]
            # Without its URI, or the worker would read there what is empty here.
            yield batch.assign(image=images, uri=None)

    return photos.mapInPandas(perturb, photos.schema)


def _perturbed(
    image: bytes | None,
    uri: str | None,
    max_side: int,
    http: HttpSettings,
) -> bytes:
    """Empty for a photo that can't be read any more: it counts as one that can't be described."""
    try:
        if image is None and uri:
            stored = photo_reader.read_if_changed(uri, http)
            image = stored[0] if stored else None
        return perturbations.perturbed(bytes(image or b""), max_side)
    # A storage raises errors of any class. The photo was good once: it has a caption.
    except Exception:
        return b""
