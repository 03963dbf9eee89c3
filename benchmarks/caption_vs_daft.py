"""The same photos and model through this project's UDF, Daft, and the usual two Spark UDFs.

    .venv/bin/python benchmarks/caption_vs_daft.py [--photos 20000] [--runs 5]

The photos are distinct drawings of 224 px, as JPEGs in Parquet. The model is a LLaVA of random
weights, with one layer each for photo and text, held to three tokens. It is light, since the
benchmark measures what is around it. Each way calls it from two threads or processes of one torch
thread each, with 16 photos at a time, and writes key and text to Parquet. Texts are compared: they
are nonsense, but differ by photo.

- this: `caption_photos`, as the caption stage calls it, with its defaults.
- Daft's native runner, as its documentation of images and classes shows: `decode_image`, then a
  batch method of a `@daft.cls()`. Image columns stay in Daft's process, so its threads share one
  model. Bytes that the method decodes, in a process for each of two models, took longer here. One
  thread with two of torch's took as long.
- two UDFs: a `pandas_udf` that decodes to 224 × 224 × 3 floats, then `predict_batch_udf`. Batches
  are small, or this way needs more memory than machines have: a photo is 5 MB of Python floats.

Each measurement is a process of its own. Its time begins after other photos have gone the same way,
so that Spark's start, imports and the loading of models don't count. It ends with the written
result. Memory is that of the process and all below it, by proportional set size. The order rotates
from run to run. Figures are medians, ratios those within a run. Daft is installed into a temporary
folder (310 MB): it wants older packages than .venv holds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from llava import TEMPLATE
from memory import process_tree_gb
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig

from vlm4rec_spark.caption.settings import CaptionSettings
from vlm4rec_spark.demo.drawing import render
from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import ModelSettings, Request
from vlm4rec_spark.training.network import build

DAFT = "daft==0.7.26"
CORES = 2
TOKENS = 3
PROMPT = "Describe the product."
SIDE = 224
WARM = 1_000
"""Photos before the clock starts."""
ROWS = "32"
"""In a batch of the two UDFs. With 1,000 a single worker held 8 GB; with 100, 1.6."""
MAX_GB = 10.0
"""A way that holds more is ended: it would take the machine down with it."""
MIN_EQUAL = 0.99
"""Share of texts that must be this project's.

Daft's decoder differs from Pillow's in single shades.
"""
THIS = "this"


def settings(folder: Path) -> CaptionSettings:
    return CaptionSettings(model=ModelSettings(model=str(folder / "model"), max_new_tokens=TOKENS))


def write_model(folder: Path) -> None:
    """A light LLaVA: one layer of 192 on either side. With initial weights it says one word."""
    tower = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=1,
        num_attention_heads=6,
        image_size=128,
        patch_size=16,
    )
    model, processor = build(
        ["A thing of wool or cotton, made for long walks and cold days."], tower, TEMPLATE
    )
    text = model.config.text_config
    text.hidden_size = 192
    text.intermediate_size = 576
    text.num_hidden_layers = 1
    text.num_attention_heads = 6
    text.num_key_value_heads = 6
    text.head_dim = 32
    torch.manual_seed(0)
    light = type(model)(model.config)
    light.generation_config = model.generation_config
    for weights in light.parameters():
        weights.data *= 2 if weights.ndim > 1 else 1
    # Words are always likelier than the end or a full stop: texts under three words are rejected.
    vocabulary = processor.tokenizer.get_vocab()
    not_words = [token for word, token in vocabulary.items() if not word.isalpha()]
    light.get_output_embeddings().weight.data[not_words] = 0
    light.save_pretrained(folder)
    processor.save_pretrained(folder)


Way = Callable[[Path, Path], None]
"""From a folder of photos to one of texts."""


def draw(file: Path, seeds: range) -> None:
    images = []
    for seed in seeds:
        out = io.BytesIO()
        render(seed)[1].save(out, "JPEG", quality=90)
        images.append(out.getvalue())
    pq.write_table(
        pa.table({"key": [str(seed) for seed in seeds], "rank": list(seeds), "image": images}), file
    )


def draw_all(
    folder: Path,
    first: int,
    photos: int,
) -> None:
    """One file for each of Spark's tasks."""
    folder.mkdir()
    tasks = max(CORES, -(-photos // CaptionSettings().photos_per_task))
    edges = [first + photos * task // tasks for task in range(tasks + 1)]
    with ProcessPoolExecutor(CORES) as pool:
        parts = [
            pool.submit(draw, folder / f"{first}.parquet", range(first, last))
            for first, last in pairwise(edges)
        ]
        for part in parts:
            part.result()


def load(folder: Path) -> BatchCaptioner:
    captioner = load_captioner(settings(folder).model, settings(folder).batch_size)
    assert isinstance(captioner, BatchCaptioner)
    return captioner


def texts(captioner: BatchCaptioner, images: Iterable[Image.Image]) -> list[str | None]:
    requests = [Request("", image, PROMPT) for image in images]
    return [answer.text for answer in captioner.describe(requests)] if requests else []


def spark_session(more: Mapping[str, str]) -> Any:
    from vlm4rec_spark.spark.session import SparkSettings, session

    # A task per file: otherwise Spark puts several together, and the last task runs alone.
    conf = {"spark.sql.files.openCostInBytes": "128m", **more}
    spark = session(SparkSettings(master=f"local[{CORES}]", driver_memory="2g", conf=conf))
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def this(folder: Path) -> Way:
    from pyspark.sql import functions as F

    from vlm4rec_spark.caption.worker import Job, caption_photos
    from vlm4rec_spark.models.captioning.prompts import Prompt
    from vlm4rec_spark.models.photos.download import HttpSettings

    spark = spark_session({})
    null = F.lit(None).cast("string")
    job = Job(settings(folder), Prompt("", PROMPT), HttpSettings(), None)

    def run(photos: Path, out: Path) -> None:
        queue = spark.read.parquet(str(photos)).select(
            F.col("key").alias("caption_key"),
            F.col("key").alias("image_sha256"),
            "image",
            "rank",
            F.lit(0).alias("attempts"),
            null.alias("prompt"),
            null.alias("uri"),
        )
        tasks = len(list(photos.iterdir()))
        captions = caption_photos(queue, job, tasks).select(
            F.col("caption_key").alias("key"), F.col("caption").alias("text")
        )
        captions.write.parquet(str(out))

    return run


def two_udfs(folder: Path) -> Way:
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType

    # The first UDF gets what the Parquet reader reads at once, whatever Arrow's limits are (Spark
    # 4.2). The project's session limits the JVM's compiler, which matters where Spark copies many
    # floats.
    spark = spark_session(
        {
            "spark.sql.parquet.columnarReaderBatchSize": ROWS,
            "spark.sql.execution.arrow.maxRecordsPerBatch": ROWS,
            "spark.driver.extraJavaOptions": "",
        }
    )

    @F.pandas_udf("array<float>")  # type: ignore[call-overload]
    def pixels(images: pd.Series) -> pd.Series:
        decoded = (
            Image.open(io.BytesIO(image)).convert("RGB").resize((SIDE, SIDE)) for image in images
        )
        return pd.Series([np.asarray(image, np.float32).ravel().tolist() for image in decoded])

    def make() -> Any:
        captioner = load(folder)
        return lambda batch: np.array(
            texts(captioner, map(Image.fromarray, batch.astype(np.uint8)))
        )

    predict = predict_batch_udf(
        make,
        return_type=StringType(),
        batch_size=settings(folder).batch_size,
        input_tensor_shapes=[[SIDE, SIDE, 3]],
    )

    def run(photos: Path, out: Path) -> None:
        decoded = spark.read.parquet(str(photos)).withColumn("pixels", pixels("image"))
        captions = decoded.withColumn("text", predict("pixels")).select("key", "text")
        captions.write.parquet(str(out))

    return run


def daft(folder: Path) -> Way:
    import daft

    @daft.cls()
    class Model:
        def __init__(self) -> None:
            self.captioner = load(folder)

        @daft.method.batch(
            return_dtype=daft.DataType.string(), batch_size=settings(folder).batch_size
        )
        def describe(self, images: daft.Series) -> list[str | None]:
            return texts(self.captioner, map(Image.fromarray, images.to_pylist()))

    model = Model()
    # Loads the model; two of Daft's threads would do so at once and fail.
    model.describe(daft.Series.from_pylist([]))

    def run(photos: Path, out: Path) -> None:
        rows = daft.read_parquet(f"{photos}/*.parquet")
        images = rows["image"].decode_image(mode=daft.ImageMode.RGB)
        rows.select("key", model.describe(images).alias("text")).write_parquet(str(out))

    return run


WAYS: dict[str, Callable[[Path], Way]] = {THIS: this, "Daft": daft, "two UDFs": two_udfs}


def install_daft(folder: Path) -> None:
    options = f"-m pip install --quiet --disable-pip-version-check --target {folder} {DAFT}"
    if subprocess.run([sys.executable, *options.split()]).returncode:
        raise SystemExit(
            f"{DAFT} can't be installed by pip; this benchmark needs a network for it."
        )


@dataclass
class Run:
    """A way's run in a process of its own."""

    seconds: float
    peak_gb: float
    equal: float = 0.0
    """Share of texts that are this project's."""


def measure(
    way: str,
    folder: Path,
    out: Path,
) -> Run:
    path = [*([str(folder / "daft")] if way == "Daft" else []), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, __file__, "--one", way, str(folder), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, process_tree_gb(process.pid))
        if peak > MAX_GB:
            end(process.pid)
            raise SystemExit(f"{way} held {peak:.1f} GB, more than {MAX_GB:.0f}, and was ended")
        time.sleep(0.5)
    assert process.stdout
    if not (output := process.stdout.read()):
        raise SystemExit(f"a measurement failed: {way}")
    return Run(float(output.splitlines()[-1]), peak)


def end(pid: int) -> None:
    process = psutil.Process(pid)
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            member.kill()


def read_texts(out: Path) -> dict[str, str]:
    columns = pq.read_table(out, columns=["key", "text"]).to_pydict()
    return dict(zip(columns["key"], columns["text"], strict=True))


def all_runs(
    folder: Path,
    photos: int,
    runs: int,
) -> dict[str, list[Run]]:
    by_way: dict[str, list[Run]] = {way: [] for way in WAYS}
    first_texts: dict[str, str] = {}
    for number in range(runs):
        names = list(WAYS)
        for way in names[number % 3 :] + names[: number % 3]:
            out = folder / f"{way}-{number}"
            run = measure(way, folder, out)
            texts = read_texts(out)
            first_texts = first_texts or texts
            equal = sum(texts.get(key) == text for key, text in first_texts.items())
            run.equal = equal / photos
            by_way[way].append(run)
            log(
                f"run {number + 1} of {runs}, {way}: {photos / run.seconds:,.1f} photos/s, "
                f"{run.peak_gb:.2f} GB; {remaining(by_way, runs) / 60:.0f} min left"
            )
    return by_way


def remaining(by_way: dict[str, list[Run]], runs: int) -> float:
    """Seconds of the runs to come, of ways that have run."""
    return sum(
        (runs - len(way_runs)) * median(run.seconds for run in way_runs)
        for way_runs in by_way.values()
        if way_runs
    )


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run_one(
    way: str,
    folder: Path,
    out: Path,
) -> None:
    """Print the seconds of this way, once it is warm."""
    run = WAYS[way](folder)
    run(folder / "warm", Path(f"{out}-warm"))
    started = time.perf_counter()
    run(folder / "photos", out)
    # At once: now and then Daft's threads crash the interpreter at its end.
    print(time.perf_counter() - started, flush=True)


def show(
    by_way: dict[str, list[Run]],
    faster: dict[str, float],
    photos: int,
) -> None:
    runs = len(by_way[THIS])
    title = f"{photos:,} photos, {CORES} cores, medians of {runs}"
    table = Table(title=title, title_justify="left")
    for name in ("", "photos/s", "fewest", "most", "this is faster by", "peak GB", "same texts"):
        table.add_column(name, justify="right" if name else "left")
    for way, way_runs in by_way.items():
        rates = sorted(photos / run.seconds for run in way_runs)
        table.add_row(
            way,
            f"{median(rates):,.1f}",
            f"{rates[0]:,.1f}",
            f"{rates[-1]:,.1f}",
            f"{faster[way]:.2f}",
            f"{median(run.peak_gb for run in way_runs):.2f}",
            f"{min(run.equal for run in way_runs):.2%}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, folder, out = options.one
        run_one(way, Path(folder), Path(out))
        return
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        log(f"installing {DAFT}, drawing {options.photos:,} photos")
        install_daft(folder / "daft")
        write_model(folder / "model")
        draw_all(folder / "photos", 0, options.photos)
        draw_all(folder / "warm", options.photos, WARM)
        by_way = all_runs(folder, options.photos, options.runs)
    print(json.dumps(summarize(by_way, options.photos)))


def summarize(by_way: dict[str, list[Run]], photos: int) -> dict[str, float]:
    """Show the runs; the figures that have bounds."""
    faster = {
        way: median(
            run.seconds / this_run.seconds for run, this_run in zip(runs, by_way[THIS], strict=True)
        )
        for way, runs in by_way.items()
    }
    show(by_way, faster, photos)
    if min(run.equal for runs in by_way.values() for run in runs) < MIN_EQUAL:
        raise SystemExit("the ways' texts differ, so their speed can't be compared")
    peak = {way: round(median(run.peak_gb for run in runs), 2) for way, runs in by_way.items()}
    return {
        "vs_daft": round(faster["Daft"], 3),
        "vs_naive": round(faster["two UDFs"], 3),
        "peak_gb": peak[THIS],
        "peak_gb_daft": peak["Daft"],
        "peak_gb_naive": peak["two UDFs"],
    }


if __name__ == "__main__":
    main()
