"""The same photos and the same model through this project's UDF, through Daft, and through the usual two Spark UDFs.

    .venv/bin/python benchmarks/caption_vs_daft.py [--photos 20000] [--runs 5]

The photos are distinct drawings of 224 px, as JPEGs in Parquet. The model is a LLaVA of random weights, with one layer
each for photo and text, held to three tokens: a light one, since what surrounds it is measured. Each way calls it from
two threads or processes of one torch thread each, with 16 photos at a time, and writes key and text to Parquet. Texts
are compared: they are nonsense, but another for other photos.

- ours: `caption_photos`, as the caption stage calls it, with its defaults.
- Daft's native runner, as its pages on images and on classes have it: `decode_image`, then a batch method of a
  `@daft.cls()`. Image columns stay in Daft's process, so its threads share one model. Bytes that the method decodes,
  in a process for each of two models, took longer here; one thread with two of torch's took as long.
- two UDFs: a `pandas_udf` that decodes to 224 × 224 × 3 floats, then `predict_batch_udf`. Batches are small, or this
  way needs more memory than machines have: in Python a photo is then 5 MB of floats.

Each measurement is a process of its own. Its time begins when some other photos have gone the same way, so that neither
Spark's start nor imports nor the loading of models counts, and ends with the written result. Memory is that of the
process and all below it, by proportional set size. The order rotates from run to run; figures are medians, ratios those
within a run. Daft is installed into a temporary folder (310 MB): it wants older packages than .venv holds.
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
from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import ModelSettings, Request, load_captioner
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
MOST_GB = 10.0
"""A way that holds more is ended: it would take the machine down with it."""
SAME = 0.99
"""Share of texts that must be those of our way: Daft's own decoder differs from Pillow's in single shades."""


def settings(folder: Path) -> CaptionSettings:
    return CaptionSettings(model=ModelSettings(model=str(folder / "model"), max_new_tokens=TOKENS))


def write_model(folder: Path) -> None:
    """A light LLaVA: one layer of 192 on either side. Of weights as they are drawn it says one word."""
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
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 192, 576, 1
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 6, 6, 32
    torch.manual_seed(0)
    light = type(model)(model.config)
    light.generation_config = model.generation_config
    for weights in light.parameters():
        weights.data *= 2 if weights.ndim > 1 else 1
    # Some word is always likelier than the end or a full stop: a text of less than three words would be rejected.
    others = [
        token for word, token in processor.tokenizer.get_vocab().items() if not word.isalpha()
    ]
    light.get_output_embeddings().weight.data[others] = 0
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


def draw_all(folder: Path, first: int, photos: int) -> None:
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

    # A task for each file: else Spark puts several together, and the last task runs alone.
    conf = {"spark.sql.files.openCostInBytes": "128m", **more}
    spark = session(SparkSettings(master=f"local[{CORES}]", driver_memory="2g", conf=conf))
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def ours(folder: Path) -> Way:
    from pyspark.sql import functions as F

    from vlm4rec_spark.caption.worker import Job, caption_photos
    from vlm4rec_spark.models.captioning.prompts import Prompt
    from vlm4rec_spark.models.photos.download import HttpSettings

    spark = spark_session({})
    nothing = F.lit(None).cast("string")

    def run(photos: Path, out: Path) -> None:
        queue = spark.read.parquet(str(photos)).select(
            F.col("key").alias("caption_key"),
            F.col("key").alias("image_sha256"),
            "image",
            "rank",
            F.lit(0).alias("attempts"),
            nothing.alias("prompt"),
            nothing.alias("uri"),
        )
        tasks = len(list(photos.iterdir()))
        made = caption_photos(
            queue, Job(settings(folder), Prompt("", PROMPT), HttpSettings(), None), tasks
        )
        made.select(
            F.col("caption_key").alias("key"), F.col("caption").alias("text")
        ).write.parquet(str(out))

    return run


def two_udfs(folder: Path) -> Way:
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType

    # The first UDF gets what the Parquet reader reads at once, whatever Arrow's limits say (seen in Spark 4.2). And the
    # project's session saves on the JVM's compiler, which shows where Spark copies so many floats.
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
        found = spark.read.parquet(str(photos)).withColumn("pixels", pixels("image"))
        found.withColumn("text", predict("pixels")).select("key", "text").write.parquet(str(out))

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
    model.describe(
        daft.Series.from_pylist([])
    )  # loads it: else two of Daft's threads do so at once, and stumble

    def run(photos: Path, out: Path) -> None:
        found = daft.read_parquet(f"{photos}/*.parquet")
        images = found["image"].decode_image(mode=daft.ImageMode.RGB)
        found.select("key", model.describe(images).alias("text")).write_parquet(str(out))

    return run


WAYS: dict[str, Callable[[Path], Way]] = {"ours": ours, "Daft": daft, "two UDFs": two_udfs}


def install_daft(folder: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(folder),
    ]
    if subprocess.run([*pip, DAFT]).returncode:
        raise SystemExit(
            f"{DAFT} can't be installed by pip; this benchmark needs a network for it."
        )


def measure(way: str, folder: Path, out: Path) -> dict[str, float]:
    """Seconds of this way in a process of its own, and the peak of its memory in GB."""
    path = [*([str(folder / "daft")] if way == "Daft" else []), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, __file__, "--one", way, str(folder), str(out)]
    process, peak = (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment),
        0.0,
    )
    while process.poll() is None:
        peak = max(peak, process_tree_gb(process.pid))
        if peak > MOST_GB:
            end(process.pid)
            raise SystemExit(f"{way} held {peak:.1f} GB, more than {MOST_GB:.0f}, and was ended")
        time.sleep(0.5)
    assert process.stdout
    if not (said := process.stdout.read()):
        raise SystemExit(f"a measurement failed: {way}")
    return {"seconds": float(said.splitlines()[-1]), "peak": peak}


def end(pid: int) -> None:
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            one.kill()


def answered(out: Path) -> dict[str, str]:
    return dict(zip(*pq.read_table(out, columns=["key", "text"]).to_pydict().values(), strict=True))


def all_runs(folder: Path, photos: int, runs: int) -> dict[str, list[dict[str, float]]]:
    """What each run found of each way: seconds, peak, and the share of texts that are those of our way."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    first = dict[str, str]()
    for run in range(runs):
        names = list(WAYS)
        for way in names[run % 3 :] + names[: run % 3]:
            out = folder / f"{way}-{run}"
            found[way].append(measure(way, folder, out))
            texts = answered(out)
            first = first or texts
            found[way][-1]["same"] = (
                sum(texts.get(key) == text for key, text in first.items()) / photos
            )
            left = sum(
                (runs - len(done)) * median(one["seconds"] for one in done)
                for done in found.values()
                if done
            )
            say(
                f"run {run + 1} of {runs}, {way}: {photos / found[way][-1]['seconds']:,.1f} photos/s, "
                f"{found[way][-1]['peak']:.2f} GB; {left / 60:.0f} min left"
            )
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--photos", type=int, default=20_000)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        way, folder, out = given.one[0], Path(given.one[1]), Path(given.one[2])
        run = WAYS[way](folder)
        run(folder / "warm", Path(f"{out}-warm"))
        began = time.perf_counter()
        run(folder / "photos", out)
        # At once: Daft's threads crash this interpreter at its end now and then, when all is written.
        print(time.perf_counter() - began, flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        say(f"installing {DAFT}, drawing {given.photos:,} photos")
        install_daft(folder / "daft")
        write_model(folder / "model")
        draw_all(folder / "photos", 0, given.photos)
        draw_all(folder / "warm", given.photos, WARM)
        found = all_runs(folder, given.photos, given.runs)
    table = Table(
        title=f"{given.photos:,} photos, {CORES} cores, medians of {given.runs}",
        title_justify="left",
    )
    for name in ("", "photos/s", "fewest", "most", "ours is faster by", "peak GB", "same texts"):
        table.add_column(name, justify="right" if name else "left")
    faster = {
        way: median(
            theirs["seconds"] / mine["seconds"]
            for theirs, mine in zip(done, found["ours"], strict=True)
        )
        for way, done in found.items()
    }
    peak = {way: round(median(one["peak"] for one in done), 2) for way, done in found.items()}
    for way, done in found.items():
        rates = sorted(given.photos / one["seconds"] for one in done)
        table.add_row(
            way,
            f"{median(rates):,.1f}",
            f"{rates[0]:,.1f}",
            f"{rates[-1]:,.1f}",
            f"{faster[way]:.2f}",
            f"{peak[way]:.2f}",
            f"{min(one['same'] for one in done):.2%}",
        )
    Console(width=120).print(table)
    if min(one["same"] for done in found.values() for one in done) < SAME:
        raise SystemExit("the ways don't say the same, so their speed can't be compared")
    print(
        json.dumps(
            {
                "vs_daft": round(faster["Daft"], 3),
                "vs_naive": round(faster["two UDFs"], 3),
                "peak_gb": peak["ours"],
                "peak_gb_daft": peak["Daft"],
                "peak_gb_naive": peak["two UDFs"],
            }
        )
    )


if __name__ == "__main__":
    main()
