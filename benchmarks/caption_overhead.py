"""What Spark, Delta, chunks and supervision cost: the caption stage against a plain loop.

    .venv/bin/python benchmarks/caption_overhead.py [--seconds 360] [--photos 50000]

Model and photos are the same. The stage takes photos from a Delta table, in chunks, with a commit
each. The loop has them in memory and stores nothing but the texts. Both have one torch thread per
model and a warm model. The figures are photos per second of the whole stage, with planning and the
last commit, over those of the loop, which runs before and after. The second part puts `--photos` of
200 kB through a fake that does nothing, and reads memory from /proc: of a Python worker with its
model's process, and of the driver's Python and JVM.
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
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from memory import peaks
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import Config, load
from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import Request
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.photo_errors import PhotoError
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.storage import schemas

MODELS = {
    "packaged": ["caption.model.backend=transformers"],
    # Some 700 photos a second: ten minutes of that exceed a chunk's default size.
    "fake": ["caption.model.model=ms=20", "caption.chunk_photos=400000"],
    "quick fake": ["caption.model.model=none"],
}
WARM = 64


def config(
    folder: Path,
    model: str,
    master: str,
    *more: str,
) -> Config:
    paths = [
        f"tables={folder}/tables",
        f"index.folder={folder}/index",
        f"report.path={folder}/report.html",
    ]
    return load([Path("test.yaml")], [*paths, f"spark.master={master}", *MODELS[model], *more])


def originals(folder: Path) -> list[bytes]:
    """The demo's photos that can be decoded."""
    if not (folder / "raw").exists():
        catalogue.write(folder / "raw", items=200, users=50)
    photos = []
    for file in sorted((folder / "raw" / "photos").iterdir()):
        # Some files of the demo are no photos.
        with suppress(PhotoError):
            decode(file.read_bytes(), 672)
            photos.append(file.read_bytes())
    return photos


def numbered(photo: bytes, number: int) -> bytes:
    """The same photo as other content: no decoder reads what follows its end."""
    return photo + number.to_bytes(8, "big")


def loop(
    folder: Path,
    model: str,
    photos: int,
) -> dict[str, float]:
    """Photos per second of the plain loop."""
    settings = config(folder, model, "local[1]").caption
    prompt = load_prompt(settings.prompt).text
    captioner = load_captioner(settings.model, settings.batch_size)
    assert isinstance(captioner, BatchCaptioner)
    demo = originals(folder)
    images = [numbered(demo[n % len(demo)], n) for n in range(photos)]

    def caption(batch: list[bytes]) -> list[str | None]:
        requests = [Request("", decode(image, settings.model.max_side), prompt) for image in batch]
        return [answer.text for answer in captioner.describe(requests)]

    caption(images[:WARM])
    texts: list[str | None] = []
    started = time.perf_counter()
    for first in range(0, photos, settings.batch_size):
        texts += caption(images[first : first + settings.batch_size])
    assert all(texts)
    return {"rate": photos / (time.perf_counter() - started), "photos": photos}


def stage(
    folder: Path,
    model: str,
    master: str,
    photos: int,
) -> dict[str, float]:
    """Photos per second of the stage, its idle share, and the peaks of memory."""
    quiet()
    run = pipeline(config(folder / model, model, master, "spark.driver_memory=1g"))
    demo = originals(folder)
    store(run, photos, lambda n: numbered(demo[n % len(demo)], n))
    # Spark, its workers and the model are warm after this; the rest is left to the run that counts.
    warm = pipeline(config(folder / model, model, master, f"caption.budget.photos={WARM * 4}"), run)
    warm.run(["caption"])
    return _watched(run, photos - WARM * 4)


def _watched(run: Pipeline, photos: int) -> dict[str, float]:
    """The stage's figures on so many photos."""
    with peaks() as peak:
        (result,) = run.run(["caption"])
    assert result.ok == photos
    return {
        "rate": photos / result.seconds,
        "photos": photos,
        "idle": float(result.details["idle_share"]),
        "seconds": result.seconds,
        **peak,
    }


def many_photos(folder: Path, photos: int) -> dict[str, float]:
    """Write many photos of 200 kB, in another process than the one whose memory is measured."""
    run = _many(folder)
    small = originals(folder)[0]

    def photo(number: int) -> bytes:
        return small + np.random.default_rng(number).bytes(200_000 - len(small))

    store(run, photos, photo)
    return {"photos": photos}


def memory(folder: Path, photos: int) -> dict[str, float]:
    """The peaks of memory when those photos go through a fake that does nothing."""
    return _watched(_many(folder), photos)


def _many(folder: Path) -> Pipeline:
    quiet()
    return pipeline(config(folder / "many", "quick fake", "local[2]", "spark.driver_memory=800m"))


def pipeline(settings: Config, like: Pipeline | None = None) -> Pipeline:
    spark = like.spark if like else session(settings.spark)
    spark.sparkContext.setLogLevel("FATAL")
    silent = Reporter(lambda run_id, stage: None, lambda line: None, lambda *_: nullcontext())
    return Pipeline(spark, settings, silent)


def store(
    run: Pipeline,
    photos: int,
    photo: Callable[[int], bytes],
) -> None:
    """The table `photos`, written by Spark's workers."""

    def rows(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for first in range(0, len(batch), 50):
                numbers = batch["id"][first : first + 50]
                images = [photo(int(number)) for number in numbers]
                yield pd.DataFrame(
                    {
                        "item_id": [f"item-{number:07d}" for number in numbers],
                        "position": 0,
                        "uri": None,
                        "image": images,
                        "image_sha256": [hashlib.sha256(image).hexdigest() for image in images],
                        "bytes": [len(image) for image in images],
                        "modified_at": pd.NaT,
                        "version": None,
                    }
                )

    numbers = run.spark.range(0, photos, 1, max(2, photos // 1_000))
    run.tables.append(schemas.PHOTOS, numbers.mapInPandas(rows, schemas.PHOTOS.schema))


def measured(*words: object) -> list[str]:
    return [sys.executable, __file__, "--one", *map(str, words)]


def run(*commands: list[str]) -> list[dict[str, Any]]:
    """What the commands measured; they run at the same time, with one torch thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a measurement failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure_one(
    name: str,
    folder: str,
    *words: str,
) -> dict[str, float]:
    calls: dict[str, Any] = {
        "loop": loop,
        "stage": stage,
        "many_photos": many_photos,
        "memory": memory,
    }
    return calls[name](Path(folder), *(int(word) if word.isdigit() else word for word in words))


class Comparison(NamedTuple):
    model: str
    workers: int
    loop_photos: int
    loop_rate: float
    stage: dict[str, float]

    @property
    def share(self) -> float:
        return self.stage["rate"] / self.loop_rate


def compare(
    folder: Path,
    model: str,
    workers: int,
    seconds: float,
) -> Comparison:
    """The stage for about so many seconds, and as many plain loops as it has workers."""
    (first,) = run(measured("loop", folder, model, 640))
    loop_photos = max(640, int(first["rate"] * 62) // 16 * 16)
    stage_photos = int(first["rate"] * seconds) // 16 * 16 * workers
    loops = [measured("loop", folder, model, loop_photos)] * workers
    before = run(*loops)
    tables = folder / f"{workers}"
    (figures,) = run(measured("stage", tables, model, f"local[{workers}]", stage_photos))
    # Loops before and after the run that has a bound; the run with two workers has none.
    after = run(*loops) if workers == 1 else before
    rate = sum(loop["rate"] for loop in [*before, *after]) / 2
    return Comparison(model, workers, loop_photos, rate, figures)


def new_table() -> Table:
    table = Table(title="The caption stage against a plain loop", title_justify="left")
    table.add_column("model")
    table.add_column("")
    for name in ("photos", "photos/s", "of the loop's", "model idle", "worker GB", "driver GB"):
        table.add_column(name, justify="right")
    return table


def add_stage(
    table: Table,
    model: str,
    words: str,
    figures: dict[str, float],
    share: str,
) -> None:
    table.add_row(
        model,
        words,
        f"{figures['photos']:,}",
        f"{figures['rate']:,.1f}",
        share,
        f"{figures['idle']:.2%}",
        f"{figures['worker_gb']:.2f}",
        f"{figures['driver_gb']:.2f}",
    )


def add_comparison(table: Table, compared: Comparison) -> None:
    workers = compared.workers
    loops = f"{workers} plain loop{'s' * (workers > 1)}"
    table.add_row(compared.model, loops, f"{compared.loop_photos:,}", f"{compared.loop_rate:,.1f}")
    words = f"stage, local[{workers}]"
    add_stage(table, compared.model, words, compared.stage, f"{compared.share:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=360, help="about how long the stage runs")
    parser.add_argument("--photos", type=int, default=50_000, help="photos of 200 kB")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(*options.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure_all(Path(folder), options.seconds, options.photos)))


def measure_all(
    folder: Path,
    seconds: float,
    photos: int,
) -> dict[str, float]:
    """Measure everything and show it; the figures that have bounds."""
    originals(folder)
    # The run with the narrowest bound is the longest: planning and the last commit count.
    packaged = compare(folder, "packaged", 1, seconds)
    two_workers = compare(folder, "packaged", 2, seconds * 2 / 3)
    fake = compare(folder, "fake", 1, seconds * 2 / 3)
    run(measured("many_photos", folder, photos))
    (many,) = run(measured("memory", folder, photos))
    table = new_table()
    for compared in (packaged, two_workers, fake):
        add_comparison(table, compared)
    add_stage(table, "quick fake", "stage, local[2], 200 kB", many, "")
    Console(width=140).print(table)
    return {
        "stage_vs_loop": round(packaged.share, 3),
        "stage_vs_loop_fake": round(fake.share, 3),
        "idle_share": max(packaged.stage["idle"], two_workers.stage["idle"]),
        # The fake has no model: these are what a worker and its child hold without one.
        "peak_worker_gb": round(many["worker_gb"], 2),
        "peak_driver_gb": round(many["driver_gb"], 2),
    }


if __name__ == "__main__":
    main()
