"""The UDF around the model: photos in, one small row each out. The model sits in a supervised child process.

Knows rows, and what the driver wants to hear; knows neither tables nor which backend runs.
"""

from __future__ import annotations

import atexit
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
from pyspark import TaskContext
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.caption.progress_channel import Address, ProgressClient
from vlm4rec_spark.caption.settings import CaptionSettings
from vlm4rec_spark.models.captioning import attributes, caption_checks
from vlm4rec_spark.models.captioning.prompts import Prompt
from vlm4rec_spark.models.captioning.supervisor import Photo, Result, Supervisor
from vlm4rec_spark.models.photos import download, photo_storage
from vlm4rec_spark.models.photos.download import HttpSettings

RESULT = (
    "caption_key STRING, image_sha256 STRING, caption STRING, attributes MAP<STRING, STRING>, input_tokens INT, "
    "output_tokens INT, status STRING, error_class STRING, error STRING, attempts INT, seconds DOUBLE, waited DOUBLE"
)
_ROWS, _SECONDS = 512, 2.0
"""Results go back to Spark so many at a time, or this often: each time costs some milliseconds."""

_running: dict[str, Supervisor] = {}
"""Python workers are reused from task to task, and the child with them: keyed by all that made it."""


@dataclass(frozen=True)
class Job:
    """What the tasks need to know beside their photos."""

    settings: CaptionSettings
    prompt: Prompt
    """Its text is for photos that have none of their own."""
    http: HttpSettings
    """For photos that were not kept and lie behind a URL."""
    line: Address | None
    """To the driver."""


def caption_photos(
    photos: DataFrame, job: Job, tasks: int, profile: ResourceProfile | None = None
) -> DataFrame:
    """Caption every row (caption_key, image_sha256, uri, image, attempts, prompt, rank) once: a row each as in RESULT.

    `profile` is what each of so many `tasks` claims.
    None for a photo that wasn't tried, because the driver said stop or the model kept dying.
    """
    # Not by a hash, which gives one task a tenth more than another.
    even = photos.repartitionById(tasks, (F.col("rank") % tasks).cast("int"))
    return even.mapInPandas(_captioner_udf(job), RESULT, profile=profile)


Batches = Iterator[pd.DataFrame]


def _captioner_udf(job: Job) -> Callable[[Batches], Batches]:
    def caption(batches: Batches) -> Batches:
        rows: dict[str, dict] = {}
        lost: list[Result] = []
        caller = ProgressClient(job.line)

        def photos() -> Iterator[Photo]:
            for batch in batches:
                records = (
                    {**row, "prompt": row["prompt"] or job.prompt.text}
                    for row in batch.to_dict("records")
                )
                for row, image in _with_images(records, job.http):
                    rows[row["caption_key"]] = row
                    if isinstance(image, Result):
                        lost.append(image)
                    else:
                        yield Photo(row["caption_key"], image, row["prompt"])

        caller.flush()
        ready: list[dict] = []
        began = time.monotonic()
        supervisor = _supervisor(job.settings, _gpu(), job.prompt.structured)
        supervisor.run = job.line.token if job.line else ""
        try:
            for result in _beside(supervisor.caption(photos(), lambda: caller.stopped), lost):
                asked = rows.pop(result.key)
                known = {"image_sha256": asked["image_sha256"], "attempts": asked["attempts"] + 1}
                ready.append(known | row(result, asked["prompt"], job.prompt.structured))
                caller.say(_figures(ready[-1]))
                if len(ready) >= _ROWS or time.monotonic() - began > _SECONDS:
                    yield pd.DataFrame(ready)
                    ready, began = [], time.monotonic()
            if ready:
                yield pd.DataFrame(ready)
        finally:
            caller.close()

    return caption


def _with_images(rows: Iterable[dict], http: HttpSettings) -> Iterator[tuple[dict, bytes | Result]]:
    """Each row, without its image, and the photo's bytes: those that were kept, or those that lie at its place."""
    bare = []
    for row in rows:
        image = row.pop("image")
        if image is None and row["uri"]:
            bare.append(row)
        else:
            yield row, image or b""
    yield from download.concurrently(lambda row: (row, _read(row, http)), bare, http.concurrency)


def _read(row: dict, http: HttpSettings) -> bytes | Result:
    """The bytes at the photo's place, or why they can't be described."""
    try:
        return photo_storage.read_unchanged(row["uri"], row["image_sha256"], http)
    except photo_storage.ChangedError as changed:
        return _lost(row["caption_key"], "changed_since", str(changed))
    except Exception as unreadable:
        return _lost(row["caption_key"], "unreadable", f"the photo can't be read: {unreadable}")


def _lost(key: str, error_class: str, error: str) -> Result:
    return Result(key, None, None, None, error_class, error, 0.0, 0.0)


def _beside(results: Iterator[Result], lost: list[Result]) -> Iterator[Result]:
    """Results, and those that come without the model as they are found."""
    for result in results:
        yield result
        while lost:
            yield lost.pop()
    yield from lost


def row(result: Result, prompt: str, structured: bool = False) -> dict:
    """A row of RESULT without the columns that don't come from the model: the caption, or why there is none."""
    text, known, fault = result.text, None, None
    if text is not None and structured:
        text, known, fault = caption_checks.check_structured(text, prompt)
    elif text is not None:
        fault = caption_checks.check_caption(text, prompt)
    refused = fault or result.error_class == "refusal"
    status = "rejected" if refused else "failed" if result.text is None else "ok"
    error_class, error = fault or (result.error_class, result.error)
    return {
        "caption_key": result.key,
        "caption": text if status == "ok" else None,
        "attributes": known if status == "ok" else None,
        "input_tokens": result.input_tokens,
        "output_tokens": result.output_tokens,
        "status": status,
        "error_class": error_class,
        "error": error[:1_000] if error else error,
        "seconds": result.seconds,
        "waited": result.waited,
    }


def _figures(row: dict) -> dict[str, float]:
    counts = {
        "photos": 1,
        "tokens": row["output_tokens"] or 0,
        "seconds": row["seconds"],
        "waited": row["waited"],
    }
    return (
        counts
        if row["status"] == "ok"
        else counts | {"failed": 1, f"failed {row['error_class']}": 1}
    )


def _gpu() -> str | None:
    """The address of the GPU that Spark gives to this task alone; None where Spark gives none, as in local mode."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    return gpu.addresses[0] if gpu else None


def _supervisor(settings: CaptionSettings, gpu: str | None, structured: bool) -> Supervisor:
    made_by = (
        settings.model.model_dump(),
        settings.batch_size,
        settings.batch_seconds,
        settings.memory_gb,
        gpu,
        structured,
    )
    key = json.dumps(made_by)
    if key not in _running:
        for other in _running.values():  # one model at a time: two wouldn't fit a GPU
            other.close()
        _running.clear()
        memory = int(settings.memory_gb * 1e9) if settings.memory_gb else None
        _running[key] = Supervisor(
            settings.model,
            settings.batch_size,
            settings.batch_seconds,
            memory,
            gpu,
            attributes.SCHEMA if structured else None,
        )
    return _running[key]


@atexit.register
def _close_all() -> None:
    for supervisor in _running.values():
        supervisor.close()
