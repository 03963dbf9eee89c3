"""The UDF around the model: photos in, a small row for every photo out.

The model runs in a supervised child process. Knows rows and the progress channel; knows neither
tables nor which backend runs.
"""

import atexit
import json
import time
from collections.abc import Iterable, Iterator
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
from vlm4rec_spark.models.photos import download, photo_reader
from vlm4rec_spark.models.photos.download import HttpSettings

Batches = Iterator[pd.DataFrame]
RESULT = (
    "caption_key STRING, image_sha256 STRING, caption STRING, attributes MAP<STRING, STRING>, "
    "input_tokens INT, output_tokens INT, status STRING, error_class STRING, error STRING, "
    "attempts INT, seconds DOUBLE, starved_seconds DOUBLE"
)
_MAX_ROWS = 512
_MAX_SECONDS = 2.0
"""A task returns frames of so many rows, or one this often: a frame costs milliseconds."""

_supervisors: dict[str, Supervisor] = {}
"""Spark reuses Python workers, and the child with them: by the JSON of all that made it."""


@dataclass(frozen=True)
class Job:
    """What the tasks need to know, next to their photos."""

    settings: CaptionSettings
    prompt: Prompt
    """Its text is for photos that have none of their own."""
    http: HttpSettings
    """For photos that aren't stored and are behind a URL."""
    progress_address: Address | None
    """The driver's ProgressServer."""


def caption_photos(
    photos: DataFrame,
    job: Job,
    tasks: int,
    profile: ResourceProfile | None = None,
) -> DataFrame:
    """Caption every row once: a row as in RESULT for each.

    `photos` has caption_key, image_sha256, uri, image, attempts, prompt and rank. Every one of
    `tasks` claims the resources of `profile`. A photo has no result if it wasn't tried, because the
    driver said stop or the model died again and again.
    """

    def caption(batches: Batches) -> Batches:
        progress = ProgressClient(job.progress_address)
        progress.flush()
        try:
            yield from _frames(_caption_rows(batches, job, progress))
        finally:
            progress.close()

    # Not by a hash, which gives one task a tenth more than another.
    even = photos.repartitionById(tasks, (F.col("rank") % tasks).cast("int"))
    return even.mapInPandas(caption, RESULT, profile=profile)


def _caption_rows(
    batches: Batches,
    job: Job,
    progress: ProgressClient,
) -> Iterator[dict]:
    structured = job.prompt.structured
    supervisor = _supervisor(job.settings, _gpu(), structured)
    supervisor.run = job.progress_address.token if job.progress_address else ""
    task = _TaskPhotos(batches, job)
    results = supervisor.caption(task.readable(), lambda: progress.stopped)
    for result in task.with_unreadable(results):
        photo = task.pop(result.key)
        result_row = {
            "image_sha256": photo["image_sha256"],
            "attempts": photo["attempts"] + 1,
        } | row(result, photo["prompt"], structured)
        progress.add(_counts(result_row))
        yield result_row


def _frames(rows: Iterator[dict]) -> Batches:
    """Rows in frames of _MAX_ROWS, or fewer rows where _MAX_SECONDS are over."""
    frame: list[dict] = []
    started = time.monotonic()
    for result_row in rows:
        frame.append(result_row)
        if len(frame) >= _MAX_ROWS or time.monotonic() - started > _MAX_SECONDS:
            yield pd.DataFrame(frame)
            frame = []
            started = time.monotonic()
    if frame:
        yield pd.DataFrame(frame)


class _TaskPhotos:
    """A task's photos, read lazily. Holds the row of a photo, without image, until its result."""

    def __init__(self, batches: Batches, job: Job):
        self._batches = batches
        self._job = job
        self._rows: dict[str, dict] = {}
        self._unreadable: list[Result] = []

    def readable(self) -> Iterator[Photo]:
        """The photos that the model gets."""
        for batch in self._batches:
            for photo, image in self._with_images(batch.to_dict("records")):
                photo["prompt"] = photo["prompt"] or self._job.prompt.text
                self._rows[photo["caption_key"]] = photo
                if isinstance(image, Result):
                    self._unreadable.append(image)
                else:
                    yield Photo(photo["caption_key"], image, photo["prompt"])

    def with_unreadable(self, results: Iterator[Result]) -> Iterator[Result]:
        """The model's results, and the errors of photos that couldn't be read."""
        for result in results:
            yield result
            while self._unreadable:
                yield self._unreadable.pop()
        yield from self._unreadable

    def pop(self, key: str) -> dict:
        return self._rows.pop(key)

    def _with_images(self, rows: Iterable[dict]) -> Iterator[tuple[dict, bytes | Result]]:
        """Rows without `image`, and the photo's bytes: the stored ones, or those at its URI."""
        not_stored = []
        for photo in rows:
            image = photo.pop("image")
            if image is None and photo["uri"]:
                not_stored.append(photo)
            else:
                yield photo, image or b""
        http = self._job.http
        yield from download.concurrently(
            lambda photo: (photo, _read(photo, http)), not_stored, http.concurrency
        )


def _read(photo: dict, http: HttpSettings) -> bytes | Result:
    """The bytes at the photo's URI, or why they can't be described."""
    try:
        return photo_reader.read_unchanged(photo["uri"], photo["image_sha256"], http)
    except photo_reader.ChangedError as changed:
        return _unreadable(photo["caption_key"], "changed_since", str(changed))
    except Exception as error:
        return _unreadable(photo["caption_key"], "unreadable", f"the photo can't be read: {error}")


def _unreadable(key: str, error_class: str, error: str) -> Result:
    return Result(key, None, error_class=error_class, error=error)


def row(
    result: Result,
    prompt: str,
    structured: bool = False,
) -> dict:
    """The columns of RESULT that come from the model: the caption, or why there is none."""
    text = result.text
    parsed = None
    rejection = None
    if text is not None and structured:
        text, parsed, rejection = caption_checks.check_structured(text, prompt)
    elif text is not None:
        rejection = caption_checks.check_caption(text, prompt)
    error_class, error = rejection or (result.error_class, result.error)
    if rejection or result.error_class == "refusal":
        status = "rejected"
    else:
        status = "failed" if result.text is None else "ok"
    return {
        "caption_key": result.key,
        "caption": text if status == "ok" else None,
        "attributes": parsed if status == "ok" else None,
        "input_tokens": result.input_tokens,
        "output_tokens": result.output_tokens,
        "status": status,
        "error_class": error_class,
        "error": error[:1_000] if error else error,
        "seconds": result.seconds,
        "starved_seconds": result.starved_seconds,
    }


def _counts(result_row: dict) -> dict[str, float]:
    """What a result adds to the driver's counts."""
    counts = {
        "photos": 1,
        "tokens": result_row["output_tokens"] or 0,
        "seconds": result_row["seconds"],
        "starved_seconds": result_row["starved_seconds"],
    }
    if result_row["status"] != "ok":
        counts |= {"failed": 1, f"failed {result_row['error_class']}": 1}
    return counts


def _gpu() -> str | None:
    """The address of the task's own GPU; None where Spark gives none, as in local mode."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    return gpu.addresses[0] if gpu else None


def _supervisor(
    settings: CaptionSettings,
    gpu: str | None,
    structured: bool,
) -> Supervisor:
    """The supervisor of these settings; the one of other settings ends."""
    model = settings.model
    limits = (settings.batch_size, settings.batch_seconds, settings.memory_gb)
    key = json.dumps([model.model_dump(), *limits, gpu, structured])
    if key not in _supervisors:
        # One model at a time: two wouldn't fit a GPU.
        _close_all()
        _supervisors.clear()
        memory = int(settings.memory_gb * 1e9) if settings.memory_gb else None
        schema = attributes.SCHEMA if structured else None
        _supervisors[key] = Supervisor(
            model, settings.batch_size, settings.batch_seconds, memory, gpu, schema
        )
    return _supervisors[key]


@atexit.register
def _close_all() -> None:
    for supervisor in _supervisors.values():
        supervisor.close()
