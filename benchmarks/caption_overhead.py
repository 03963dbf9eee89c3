"""What Spark, Delta, chunks and supervision cost: the caption stage beside a plain loop over the same model and photos.

    .venv/bin/python benchmarks/caption_overhead.py [--seconds 360] [--photos 50000]

The stage takes photos from a Delta table, in chunks, with a commit each; the loop has them in memory and keeps nothing
but the texts. Both have one torch thread per model and a warm model. The figures are photos per second of the whole
stage (planning, the last commit and all) over those of the loop, which runs before and after. The second part puts
`--photos` of 200 kB through a fake that does nothing, and looks at memory in /proc: a Python worker and its model's
process together, and the driver's Python and JVM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from memory import peaks
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import Config, load
from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import Request, load_captioner
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.photos.decode import PhotoError, decode
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.storage import schemas

MODELS = {
    "packaged": ["caption.model.backend=transformers"],
    # Some 700 photos a second: ten minutes of that are more than the default of photos in a chunk.
    "fake": ["caption.model.model=ms=20", "caption.chunk_photos=400000"],
    "quick fake": ["caption.model.model=none"],
}
WARM = 64


def config(folder: Path, model: str, master: str, *more: str) -> Config:
    places = [
        f"tables={folder}/tables",
        f"index.folder={folder}/index",
        f"report.path={folder}/report.html",
    ]
    return load([Path("test.yaml")], [*places, f"spark.master={master}", *MODELS[model], *more])


def originals(folder: Path) -> list[bytes]:
    """The demo's photos that can be decoded."""
    if not (folder / "raw").exists():
        catalogue.write(folder / "raw", items=200, users=50)
    found = []
    for file in sorted((folder / "raw" / "photos").iterdir()):
        try:
            decode(file.read_bytes(), 672)
        except PhotoError:  # the demo has some that are none
            continue
        found.append(file.read_bytes())
    return found


def numbered(photo: bytes, number: int) -> bytes:
    """The same photo as other content: no decoder reads what stands behind its end."""
    return photo + number.to_bytes(8, "big")


def loop(folder: Path, model: str, photos: int) -> dict[str, float]:
    """Photos per second of the plain loop."""
    settings = config(folder, model, "local[1]").caption
    prompt, captioner = (
        load_prompt(settings.prompt).text,
        load_captioner(settings.model, settings.batch_size),
    )
    assert isinstance(captioner, BatchCaptioner)
    some = originals(folder)
    held = [numbered(some[n % len(some)], n) for n in range(photos)]

    def batch(data: list[bytes]) -> list[str | None]:
        images = [decode(each, settings.model.max_side) for each in data]
        return [
            answer.text
            for answer in captioner.describe([Request("", image, prompt) for image in images])
        ]

    batch(held[:WARM])
    began, texts = time.perf_counter(), list[str | None]()
    for place in range(0, photos, settings.batch_size):
        texts += batch(held[place : place + settings.batch_size])
    assert all(texts)
    return {"rate": photos / (time.perf_counter() - began), "photos": photos}


def stage(folder: Path, model: str, master: str, photos: int) -> dict[str, float]:
    """Photos per second of the stage, its idle share, and the peaks of memory."""
    quiet()
    run = pipeline(config(folder / model, model, master, "spark.driver_memory=1g"))
    some = originals(folder)
    store(run, photos, lambda n: numbered(some[n % len(some)], n))
    # Spark, its workers and the model are warm after this; the rest is left to the run that counts.
    warm = pipeline(config(folder / model, model, master, f"caption.budget.photos={WARM * 4}"), run)
    warm.run(["caption"])
    with peaks() as peak:
        (outcome,) = run.run(["caption"])
    assert outcome.ok == photos - WARM * 4
    return {
        "rate": outcome.ok / outcome.seconds,
        "photos": outcome.ok,
        "idle": float(outcome.details["idle_share"]),
        "seconds": outcome.seconds,
        **peak,
    }


def many_photos(folder: Path, photos: int) -> dict[str, float]:
    """The table of many photos of 200 kB; written by another process than the one whose memory is looked at."""
    run, small = _many(folder), originals(folder)[0]

    def photo(number: int) -> bytes:
        return small + np.random.default_rng(number).bytes(200_000 - len(small))

    store(run, photos, photo)
    return {"photos": photos}


def memory(folder: Path, photos: int) -> dict[str, float]:
    """The peaks of memory when those photos go through a fake that does nothing."""
    run = _many(folder)
    with peaks() as peak:
        (outcome,) = run.run(["caption"])
    assert outcome.ok == photos
    return {
        "rate": outcome.ok / outcome.seconds,
        "photos": outcome.ok,
        "idle": float(outcome.details["idle_share"]),
        "seconds": outcome.seconds,
        **peak,
    }


def _many(folder: Path) -> Pipeline:
    quiet()
    return pipeline(config(folder / "many", "quick fake", "local[2]", "spark.driver_memory=800m"))


def pipeline(settings: Config, like: Pipeline | None = None) -> Pipeline:
    spark = like.spark if like else session(settings.spark)
    spark.sparkContext.setLogLevel("FATAL")
    return Pipeline(
        spark,
        settings,
        Reporter(lambda run_id, stage: None, lambda line: None, lambda *_: nullcontext()),
    )


def store(run: Pipeline, photos: int, photo: Callable[[int], bytes]) -> None:
    """The table `photos`, written by Spark's workers."""

    def rows(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for place in range(0, len(batch), 50):
                images = [photo(int(n)) for n in batch["id"][place : place + 50]]
                yield pd.DataFrame(
                    {
                        "item_id": [f"item-{n:07d}" for n in batch["id"][place : place + 50]],
                        "position": 0,
                        "uri": None,
                        "image": images,
                        "image_sha256": [hashlib.sha256(image).hexdigest() for image in images],
                        "bytes": [len(image) for image in images],
                        "modified_at": pd.NaT,
                        "version": None,
                    }
                )

    made = run.spark.range(0, photos, 1, max(2, photos // 1_000)).mapInPandas(
        rows, schemas.PHOTOS.schema
    )
    run.tables.append(schemas.PHOTOS, made)


def measured(*words: object) -> list[str]:
    return [sys.executable, __file__, "--one", *map(str, words)]


def run(*commands: list[str]) -> list[dict[str, Any]]:
    """What each command measured; they run at the same time, with one torch thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(one, stdout=subprocess.PIPE, text=True, env=environment)
        for one in commands
    ]
    said = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit("a measurement failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--seconds", type=float, default=360, help="how long the stage shall take, about"
    )
    options.add_argument("--photos", type=int, default=50_000, help="photos of 200 kB")
    options.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        what, folder, *rest = given.one
        call: Any = {"loop": loop, "stage": stage, "many_photos": many_photos, "memory": memory}[
            what
        ]
        print(
            json.dumps(
                call(Path(folder), *(int(word) if word.isdigit() else word for word in rest))
            )
        )
        return
    console, result = Console(width=140), dict[str, float]()
    table = Table(title="The caption stage beside a plain loop", title_justify="left")
    for name in (
        "model",
        "",
        "photos",
        "photos/s",
        "of the loop's",
        "model idle",
        "worker GB",
        "driver GB",
    ):
        table.add_column(name, justify="left" if name in ("model", "") else "right")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        originals(folder)
        for model, key in (("packaged", "stage_vs_loop"), ("fake", "stage_vs_loop_fake")):
            (first,) = run(measured("loop", folder, model, 640))
            many = max(640, int(first["rate"] * 62) // 16 * 16)
            for workers in (1, 2) if model == "packaged" else (1,):
                # The run that is held to the narrowest bound is the longest: planning and the last commit count.
                seconds = (
                    given.seconds if (model, workers) == ("packaged", 1) else given.seconds * 2 / 3
                )
                todo = int(first["rate"] * seconds) // 16 * 16
                loops = [measured("loop", folder, model, many)] * workers
                before = run(*loops)
                (ours,) = run(
                    measured(
                        "stage", folder / f"{workers}", model, f"local[{workers}]", todo * workers
                    )
                )
                # Around the one that counts; the other is there to look at.
                after = run(*loops) if workers == 1 else before
                plain = (sum(one["rate"] for one in before) + sum(one["rate"] for one in after)) / 2
                share = ours["rate"] / plain
                table.add_row(
                    model,
                    f"{workers} plain loop{'s' * (workers > 1)}",
                    f"{many:,}",
                    f"{plain:,.1f}",
                )
                table.add_row(
                    model,
                    f"stage, local[{workers}]",
                    f"{ours['photos']:,}",
                    f"{ours['rate']:,.1f}",
                    f"{share:.3f}",
                    f"{ours['idle']:.2%}",
                    f"{ours['worker_gb']:.2f}",
                    f"{ours['driver_gb']:.2f}",
                )
                if workers == 1:
                    result[key] = round(share, 3)
                if model == "packaged":
                    result["idle_share"] = max(result.get("idle_share", 0), ours["idle"])
        run(measured("many_photos", folder, given.photos))
        (many,) = run(measured("memory", folder, given.photos))
        table.add_row(
            "quick fake",
            "stage, local[2], 200 kB",
            f"{many['photos']:,}",
            f"{many['rate']:,.1f}",
            "",
            f"{many['idle']:.2%}",
            f"{many['worker_gb']:.2f}",
            f"{many['driver_gb']:.2f}",
        )
    console.print(table)
    # The fake's process has no model: what it and its worker hold is what is held beyond one.
    result |= {
        name: round(many[name.removeprefix("peak_")], 2)
        for name in ("peak_worker_gb", "peak_driver_gb")
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
