"""A table of labelled photos as arrays to learn from.

Knows files, pixels and words; knows no network.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray
from PIL import Image

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioning.caption_template import (
    attribute_values,
    caption_from_attributes,
)
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.photo_errors import PhotoError

_VALIDATION_EVERY = 20
"""One photo in this many is for validation."""
_DECODED_SIDE = 512
_MIN_PHOTOS = 100
_CHUNK = 2_000


@dataclass(frozen=True)
class Labelled:
    """Photos and what is known of them."""

    photos: ndarray
    """uint8 (n, 3, side, side), memory-mapped."""
    labels: dict[str, ndarray]
    """By attribute, int64 (n,): an index into `values`, -1 where the value isn't known."""
    values: dict[str, list[str]]
    sentences: list[str]
    weights: ndarray
    held_out: ndarray
    """bool (n,). It depends on a photo's bytes, so that copies of it are on one side."""
    rejected: dict[str, int]
    """How many photos couldn't be used, by error class."""


class _Decoded(NamedTuple):
    """The photos of a table; a reason is "" for a photo that could be decoded."""

    pixels: ndarray
    reasons: list[str]
    digests: list[str]
    """SHA-256 of the bytes."""


def read(
    table: Path,
    photo_column: str,
    attributes: Mapping[str, str],
    side: int,
    work: Path,
    log: Callable[[str], None],
) -> Labelled:
    """The labelled photos of a Parquet file or folder, or of a CSV file.

    `attributes` maps our names to the table's columns. Its column `photo_column` has bytes, or a
    path relative to the table's folder. A column `caption` may have sentences in place of those
    made from the attributes, and a column `weight` how often a photo is drawn relative to 1. Photos
    are decoded once, into `work`.

    Raises UsageError for a missing table or column, RunError when too few photos can be used.
    """
    rows = _rows(table, {photo_column, *attributes.values()})
    truth = _truth(rows, attributes)
    sentences = _sentences(rows, truth)
    decoded = _decoded(rows[photo_column].tolist(), table, side, work, log)
    reasons = [
        reason or ("" if words else "unlabelled")
        for reason, words in zip(decoded.reasons, sentences, strict=True)
    ]
    rejected = dict(Counter(filter(None, reasons)))
    good = np.flatnonzero([not reason for reason in reasons])
    if len(good) < _MIN_PHOTOS:
        raise RunError(
            f"{table}: {len(good):,} of {len(rows):,} photos can be learnt from, "
            f"at least {_MIN_PHOTOS} are needed. Left out: {json.dumps(rejected)}."
        )
    truth = [truth[row] for row in good]
    values = attribute_values(truth)
    weights = rows["weight"].to_numpy(float) if "weight" in rows else np.ones(len(rows))
    return Labelled(
        # A subset would be a copy in memory; all photos stay memory-mapped.
        photos=decoded.pixels if len(good) == len(rows) else decoded.pixels[good],
        labels=_labels(truth, values),
        values=values,
        sentences=[sentences[row] for row in good],
        weights=weights[good],
        held_out=_held_out([decoded.digests[row] for row in good]),
        rejected=rejected,
    )


def _rows(table: Path, required: set[str]) -> pd.DataFrame:
    if not table.exists():
        raise UsageError(
            f"{table}: there is no such table. Give a Parquet file or folder, or a CSV file."
        )
    is_csv = table.suffix == ".csv"
    try:
        rows = pd.read_csv(table, dtype=str) if is_csv else pd.read_parquet(table)
    except Exception as error:
        kind = "CSV" if is_csv else "Parquet"
        message = str(error).splitlines()[0]
        raise UsageError(f"{table}: it can't be read as {kind}: {message}") from error
    if missing := sorted(required.difference(rows)):
        names = ", ".join(map(str, rows.columns))
        raise UsageError(f"{table}: it has no column {', '.join(missing)}; it has {names}.")
    return rows


def _truth(rows: pd.DataFrame, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """The rows' values by our names, without those that are missing or blank."""
    truth = []
    for row in rows[list(columns.values())].to_dict("records"):
        values = {name: row[column] for name, column in columns.items() if pd.notna(row[column])}
        words = {name: " ".join(str(value).split()) for name, value in values.items()}
        truth.append({name: value for name, value in words.items() if value})
    return truth


def _sentences(rows: pd.DataFrame, truth: Sequence[dict[str, str]]) -> list[str]:
    """The table's captions, or sentences from the attributes; "" where there are none."""
    captions = rows["caption"].fillna("") if "caption" in rows else [""] * len(rows)
    return [
        " ".join(caption.split()) or (caption_from_attributes(attributes) if attributes else "")
        for caption, attributes in zip(captions, truth, strict=True)
    ]


def _held_out(photo_digests: Sequence[str]) -> ndarray:
    """bool (n,), with one photo at least."""
    held_out = np.array([int(digest[:8], 16) % _VALIDATION_EVERY == 0 for digest in photo_digests])
    held_out[0] |= not held_out.any()
    return held_out


def _labels(
    truth: Sequence[dict[str, str]], values: Mapping[str, Sequence[str]]
) -> dict[str, ndarray]:
    columns = pd.DataFrame(truth, columns=list(values))
    return {
        name: pd.Categorical(columns[name], categories).codes.astype(np.int64)
        for name, categories in values.items()
    }


def _decoded(
    photos: Sequence[Any],
    table: Path,
    side: int,
    work: Path,
    log: Callable[[str], None],
) -> _Decoded:
    """The photos' pixels, from `work` if they were decoded before."""
    stat = table.stat()
    content = f"{side} {table.resolve()} {len(photos)} {stat.st_size} {stat.st_mtime_ns}"
    name = f"photos-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    pixels = work / f"{name}.npy"
    results = work / f"{name}.json"
    if not results.exists():
        work.mkdir(parents=True, exist_ok=True)
        shape = (len(photos), 3, side, side)
        array = np.lib.format.open_memmap(pixels, "w+", np.uint8, shape)
        reasons_and_digests = _decode_into(array, photos, table.parent, log)
        array.flush()
        # Written last: pixels without it are incomplete.
        results.write_text(json.dumps(reasons_and_digests), encoding="utf-8")
    reasons, digests = zip(*json.loads(results.read_text(encoding="utf-8")), strict=True)
    return _Decoded(np.load(pixels, mmap_mode="c"), list(reasons), list(digests))


def _decode_into(
    array: ndarray,
    photos: Sequence[Any],
    folder: Path,
    log: Callable[[str], None],
) -> list[tuple[str, str]]:
    """Write the pixels into `array`; the photos' reasons and digests."""
    results: list[tuple[str, str]] = []
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(photos), _CHUNK):
            chunk = photos[first : first + _CHUNK]
            decoded = pool.map(lambda photo: _decode(photo, folder, array.shape[-1]), chunk)
            for pixels, reason, digest in decoded:
                array[len(results)] = pixels
                results.append((reason, digest))
            rate = len(results) / (time.monotonic() - started)
            log(
                f"decoded {len(results):,} of {len(photos):,} photos, {rate:,.0f}/s, "
                f"{(len(photos) - len(results)) / rate:,.0f} s left"
            )
    return results


def _decode(
    photo: Any,
    folder: Path,
    side: int,
) -> tuple[ndarray, str, str]:
    """Pixels, reason and digest of bytes, or of those at a path in `folder`.

    A missing value is an empty photo.
    """
    try:
        if not isinstance(photo, bytes):
            photo = (folder / str(photo)).read_bytes() if pd.notna(photo) else b""
        image = decode(photo, _DECODED_SIDE).resize((side, side), Image.Resampling.BICUBIC)
    except (PhotoError, OSError) as error:
        reason = error.error_class if isinstance(error, PhotoError) else "unreadable"
        return np.zeros((3, side, side), np.uint8), reason, ""
    return np.asarray(image).transpose(2, 0, 1), "", hashlib.sha256(photo).hexdigest()
