"""The UDF around the model: photos in, one small row each out. Loaded once per worker process.

Knows decoding, batches and failures; knows neither tables nor which backend runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

import pandas as pd
from pyspark.sql import DataFrame

from vlm4rec_spark.caption.plan import CaptionSettings
from vlm4rec_spark.models.captioners import Caption, Captioner, ModelSettings, load_captioner
from vlm4rec_spark.models.images import PhotoError, decode

RESULT = (
    "caption_key STRING, image_sha256 STRING, caption STRING, input_tokens INT, output_tokens INT, status STRING, "
    "error_class STRING, error STRING, attempts INT, seconds DOUBLE"
)

_loaded: dict[str, Captioner] = {}
"""Python workers are reused from query to query: the model is keyed by the settings that made it."""


def caption_photos(photos: DataFrame, settings: CaptionSettings, prompt: str, tasks: int) -> DataFrame:
    """Caption every row (caption_key, image_sha256, image) once: a row each in the columns of RESULT."""
    photos = photos.repartition(tasks, "caption_key")
    return photos.mapInPandas(_captioner_udf(settings, prompt), RESULT)


Batches = Iterator[pd.DataFrame]


def _captioner_udf(settings: CaptionSettings, prompt: str) -> Callable[[Batches], Batches]:
    def caption(batches: Batches) -> Batches:
        rows = (row for batch in batches for row in batch.to_dict("records"))
        while some := list(islice(rows, settings.batch_size)):
            captioner = _captioner(settings.model)
            yield pd.DataFrame(caption_batch(captioner, some, prompt, settings.model.max_side))

    return caption


def caption_batch(captioner: Captioner, rows: list[dict], prompt: str, max_side: int) -> list[dict]:
    """A result row per row; a photo that can't be decoded, or on which the model fails alone, is one with an error."""
    results, images = {}, {}
    for row in rows:
        try:
            images[row["caption_key"]] = decode(bytes(row["image"]), max_side)
        except PhotoError as bad:
            results[row["caption_key"]] = _failed(bad.error_class, str(bad), attempts=1)
    started = time.perf_counter()
    keys = list(images)
    try:
        answers = captioner.caption([images[key] for key in keys], [prompt] * len(keys)) if keys else []
        results |= {key: _answered(answer, attempts=1) for key, answer in zip(keys, answers, strict=True)}
    except Exception:
        # Somebody in the batch is to blame; alone, only the culprit fails.
        results |= {key: _alone(captioner, images[key], prompt) for key in keys}
    share = (time.perf_counter() - started) / max(1, len(keys))
    return [
        {"caption_key": row["caption_key"], "image_sha256": row["image_sha256"]}
        | results[row["caption_key"]]
        | {"seconds": share if row["caption_key"] in images else 0.0}
        for row in rows
    ]


def _alone(captioner: Captioner, image, prompt: str) -> dict:  # type: ignore[no-untyped-def]
    try:
        return _answered(captioner.caption([image], [prompt])[0], attempts=2)
    except Exception as failure:
        return _failed(type(failure).__name__, str(failure), attempts=2)


def _answered(answer: Caption, attempts: int) -> dict:
    tokens = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
    if not answer.text:
        return _failed("empty_caption", "the model said nothing", attempts) | {"status": "rejected"} | tokens
    return {"caption": answer.text, "status": "ok", "error_class": None, "error": None, "attempts": attempts} | tokens


def _failed(error_class: str, error: str, attempts: int) -> dict:
    return {
        "caption": None,
        "input_tokens": None,
        "output_tokens": None,
        "status": "failed",
        "error_class": error_class,
        "error": error[:1_000],
        "attempts": attempts,
    }


def _captioner(settings: ModelSettings) -> Captioner:
    key = settings.model_dump_json()
    if key not in _loaded:
        _loaded.clear()  # one model at a time: two wouldn't fit a GPU
        _loaded[key] = load_captioner(settings)
    return _loaded[key]
