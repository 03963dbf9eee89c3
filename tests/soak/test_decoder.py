"""Ten minutes of damaged photos: each is an image or a named error, within its memory and in time."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
from hostile_photos import GOOD, HOSTILE

from vlm4rec_spark.models.photos.decode import PHOTO_ERRORS, PhotoError, decode

SECONDS, LONGEST, MEMORY = 600, 20, 3_000_000
"""In all; for one photo, of which a hundred megapixels take the longest; kB that this process may grow by."""


@pytest.mark.soak
def test_no_damage_crashes_the_decoder() -> None:
    seeds = [*GOOD.values(), *(data for data, _ in HOSTILE.values() if data)]
    before, ends, number = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.monotonic() + SECONDS,
        0,
    )
    outcomes: dict[str, int] = {}
    while time.monotonic() < ends:
        rng = np.random.default_rng(number)
        damaged = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.integers(1, 8)):
            start, length = int(rng.integers(len(damaged) + 1)), int(rng.integers(1, 64))
            match rng.integers(5):
                case 0:
                    flipped = 1 << int(rng.integers(8))
                    damaged[start : start + 1] = bytes(
                        byte ^ flipped for byte in damaged[start : start + 1]
                    )
                case 1:  # the sizes stand near the beginning
                    start = int(rng.integers(min(len(damaged), 64) + 1))
                    damaged[start : start + 4] = rng.bytes(4)
                case 2:
                    del damaged[start : start + length]
                case 3:
                    damaged[start:start] = rng.bytes(length)
                case 4:
                    damaged[start:start] = damaged[: length * 8]
        began = time.monotonic()
        try:
            outcome = decode(bytes(damaged), 224).mode
        except PhotoError as refused:
            outcome = refused.error_class
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert time.monotonic() - began < LONGEST, f"number {number}"
        number += 1
    print(f"{number:,} damaged photos:", outcomes)
    assert set(outcomes) <= {"RGB", *PHOTO_ERRORS}
    assert {"RGB", "truncated"} <= set(outcomes)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
