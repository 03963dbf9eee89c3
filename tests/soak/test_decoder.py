"""Ten minutes of damaged photos: each is an image or a named error, within memory and time."""

import resource
import time
from collections import Counter

import numpy as np
import pytest
from hostile_photos import GOOD, HOSTILE

from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.photo_errors import PHOTO_ERRORS, PhotoError

SECONDS = 600
MAX_SECONDS_PER_PHOTO = 20
"""A hundred megapixels take the longest."""
MAX_GROWTH_KB = 3_000_000
"""Of this process."""


def damage(data: bytearray, rng: np.random.Generator) -> None:
    """Flip bits, overwrite, delete, insert or repeat bytes at a random position."""
    start = int(rng.integers(len(data) + 1))
    length = int(rng.integers(1, 64))
    match rng.integers(5):
        case 0:
            bit = 1 << int(rng.integers(8))
            data[start : start + 1] = bytes(byte ^ bit for byte in data[start : start + 1])
        case 1:  # near the beginning, where the sizes are
            start = int(rng.integers(min(len(data), 64) + 1))
            data[start : start + 4] = rng.bytes(4)
        case 2:
            del data[start : start + length]
        case 3:
            data[start:start] = rng.bytes(length)
        case 4:
            data[start:start] = data[: length * 8]


def result_of(data: bytes) -> str:
    try:
        return decode(data, 224).mode
    except PhotoError as error:
        return error.error_class


def peak_memory_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.soak
def test_no_damage_crashes_the_decoder():
    seeds = [*GOOD.values(), *(data for data, _ in HOSTILE.values() if data)]
    memory_before = peak_memory_kb()
    end = time.monotonic() + SECONDS
    results: Counter[str] = Counter()
    while time.monotonic() < end:
        number = results.total()
        rng = np.random.default_rng(number)
        damaged = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.integers(1, 8)):
            damage(damaged, rng)
        start = time.monotonic()
        results[result_of(bytes(damaged))] += 1
        assert time.monotonic() - start < MAX_SECONDS_PER_PHOTO, f"number {number}"
    print(f"{results.total():,} damaged photos:", dict(results))
    assert set(results) <= {"RGB", *PHOTO_ERRORS}
    assert {"RGB", "truncated"} <= set(results)
    assert peak_memory_kb() - memory_before < MAX_GROWTH_KB
