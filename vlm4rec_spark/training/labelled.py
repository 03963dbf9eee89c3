"""A table of labelled photos as arrays to learn from. Knows files, pixels and words; knows no network."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioning.caption_template import (
    attribute_values,
    caption_from_attributes,
)
from vlm4rec_spark.models.photos.decode import PhotoError, decode

_HELD_OUT = 20
"""One photo in so many is for validation."""
_DECODED_SIDE = 512
_LEAST = 100
_AT_ONCE = 2_000


@dataclass(frozen=True)
class Labelled:
    """Photos and what is known of them.

    `photos`: uint8 (n, 3, side, side), memory-mapped. `labels`: by attribute, int64 (n,), a place in `values`, -1 where
    it isn't known. `held_out`: bool (n,), decided by a photo's bytes, so that copies of it are on one side. `rejected`:
    how many photos couldn't be used, by error class.
    """

    photos: np.ndarray
    labels: dict[str, np.ndarray]
    values: dict[str, list[str]]
    sentences: list[str]
    weights: np.ndarray
    held_out: np.ndarray
    rejected: dict[str, int]


def read(
    table: Path,
    columns: Mapping[str, str],
    attributes: Mapping[str, str],
    side: int,
    work: Path,
    say: Callable[[str], None],
) -> Labelled:
    """The labelled photos of a Parquet file or folder, or of a CSV file.

    `attributes`: our name to the table's column. `columns`: the same for `photo` (bytes, or a path, from the table's
    folder on), and if they are there for `caption` (a sentence in place of one made of the attributes) and `weight`
    (how often a photo is looked at, against 1). Photos are decoded once, into `work`.

    Raises UsageError for a table or column that isn't there, RunError when too few photos can be used.
    """
    rows = _rows(table, [columns["photo"], *attributes.values()], list(columns.values()))
    told = [_known(row, attributes) for row in rows[list(attributes.values())].to_dict("records")]
    said = (
        rows[columns["caption"]].fillna("").tolist()
        if columns["caption"] in rows
        else [""] * len(rows)
    )
    sentences = [
        " ".join(own.split()) or (caption_from_attributes(row) if row else "")
        for own, row in zip(said, told, strict=True)
    ]
    photos, reasons, digests = _decoded(rows[columns["photo"]].tolist(), table, side, work, say)
    reasons = [
        "unlabelled" if not reason and not words else reason
        for reason, words in zip(reasons, sentences, strict=True)
    ]
    good = np.flatnonzero([not reason for reason in reasons])
    rejected = dict(Counter(reason for reason in reasons if reason))
    if len(good) < _LEAST:
        raise RunError(
            f"{table}: {len(good):,} of {len(rows):,} photos can be learnt from, at least {_LEAST} are "
            f"needed. Left out: {json.dumps(rejected)}."
        )
    told = [told[place] for place in good]
    values = attribute_values(told)
    places = {
        name: {value: place for place, value in enumerate(each)} for name, each in values.items()
    }
    labels = {
        name: np.array([places[name].get(row.get(name, ""), -1) for row in told]) for name in values
    }
    weights = (
        rows[columns["weight"]].to_numpy(float)[good]
        if columns["weight"] in rows
        else np.ones(len(good))
    )
    held_out = np.array([int(digests[place][:8], 16) % _HELD_OUT == 0 for place in good])
    held_out[0] |= not held_out.any()
    # Decoded photos lie in the table's order; taking all of them keeps the file mapped and copies nothing.
    taken = photos if len(good) == len(rows) else photos[good]
    return Labelled(
        taken, labels, values, [sentences[place] for place in good], weights, held_out, rejected
    )


def _rows(table: Path, needed: Sequence[str], known: Sequence[str]) -> pd.DataFrame:
    if not table.exists():
        raise UsageError(
            f"{table}: there is no such table. Give a Parquet file or folder, or a CSV file."
        )
    try:
        rows = pd.read_csv(table, dtype=str) if table.suffix == ".csv" else pd.read_parquet(table)
    except Exception as wrong:
        raise UsageError(
            f"{table}: it can't be read as {'CSV' if table.suffix == '.csv' else 'Parquet'}: "
            f"{str(wrong).splitlines()[0]}"
        ) from wrong
    if missing := [name for name in needed if name not in rows]:
        raise UsageError(
            f"{table}: it has no column {', '.join(missing)}; it has {', '.join(map(str, rows.columns))}."
        )
    return rows[[name for name in rows.columns if name in {*needed, *known}]]


def _known(row: Mapping[Any, Any], attributes: Mapping[str, str]) -> dict[str, str]:
    said = {name: row[column] for name, column in attributes.items()}
    words = {name: " ".join(str(value).split()) for name, value in said.items() if pd.notna(value)}
    return {name: value for name, value in words.items() if value}


def _decoded(
    photos: Sequence[Any], table: Path, side: int, work: Path, say: Callable[[str], None]
) -> tuple[np.ndarray, list[str], list[str]]:
    """Pixels, what is wrong with each photo ("" if nothing), and the SHA-256 of its bytes."""
    content = (
        f"{side} {table.resolve()} {len(photos)} {table.stat().st_size} {table.stat().st_mtime_ns}"
    )
    place = work / f"photos-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    pixels, told = place.with_suffix(".npy"), place.with_suffix(".json")
    if not told.exists():
        work.mkdir(parents=True, exist_ok=True)
        # Under a name of this process's own until it is whole: another one may be at the same photos.
        half = place.with_suffix(f".{os.getpid()}.npy")
        made = np.lib.format.open_memmap(half, "w+", np.uint8, (len(photos), 3, side, side))
        found: list[tuple[str, str]] = []
        started = time.monotonic()
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(photos), _AT_ONCE):
                batch = photos[first : first + _AT_ONCE]
                for photo, reason, digest in pool.map(
                    lambda each: _small(each, table.parent, side), batch
                ):
                    made[len(found)] = photo
                    found.append((reason, digest))
                rate = len(found) / (time.monotonic() - started)
                say(
                    f"decoded {len(found):,} of {len(photos):,} photos, {rate:,.0f}/s, "
                    f"{(len(photos) - len(found)) / rate:,.0f} s left"
                )
        made.flush()
        half.replace(pixels)
        told.write_text(json.dumps(found), encoding="utf-8")
    reasons, digests = zip(*json.loads(told.read_text(encoding="utf-8")), strict=True)
    return np.load(pixels, mmap_mode="c"), list(reasons), list(digests)


def _small(photo: Any, folder: Path, side: int) -> tuple[np.ndarray, str, str]:
    try:
        data = (
            photo
            if isinstance(photo, bytes)
            else (folder / str(photo)).read_bytes()
            if pd.notna(photo)
            else b""
        )
        image = decode(data, _DECODED_SIDE).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1), "", hashlib.sha256(data).hexdigest()
    except (PhotoError, OSError) as wrong:
        reason = wrong.error_class if isinstance(wrong, PhotoError) else "unreadable"
        return np.zeros((3, side, side), np.uint8), reason, ""
