"""Captions on one GPU: this project, raw vLLM, the paper's way, and the roofline.

    python benchmarks/caption_gpu.py [--photos 512]      in the environment of constraints-vllm.txt

LLaVA-NeXT-7B's shapes with random weights, distinct photos of 672 pixels, 100 new tokens. Raw vLLM
has all photos at once and decoded. This project, with vLLM and with transformers, gets JPEGs in the
supervised process that Spark's worker uses. It gets them once more through the whole caption stage
where Spark and Java are installed. A batch always takes the same time, so what runs in batches gets
a part of the photos: transformers a quarter, the paper's way a sixteenth. Without a GPU everything
runs on a tiny model, which shows that the script works and nothing else.

The script looks for vLLM and Spark when their turn comes, after the others: on a rented machine
they may still be installing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llava
import torch
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.models.captioning.backends.transformers import load_processor
from vlm4rec_spark.models.captioning.captioner import ModelSettings
from vlm4rec_spark.models.captioning.supervisor import Photo, Supervisor
from vlm4rec_spark.models.photos.decode import decode

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = llava.BIG if GPU else llava.TINY
TOKENS = 100 if GPU else 8
BATCH = 64 if GPU else 4
"""Of transformers: the fastest of 1, 8, 32 and 64 on an H100. The roofline has the same batch."""
PAPER_BATCH = 8
WARM = 64 if GPU else 4
"""Photos before the clock starts: kernels are compiled and chosen for the sizes of the photos."""
SECONDS = 600.0


def photos(count: int) -> list[bytes]:
    return [llava.photo(number, SHAPES) for number in range(count)]


def prompt(folder: Path) -> str:
    content = [{"type": "image"}, {"type": "text", "text": llava.PROMPT}]
    processor, _ = load_processor(str(folder), "main")
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def timed(
    work: Callable[[int], list[int]],
    count: int,
    warm: int = WARM,
) -> dict[str, float]:
    """Photos per second of a warm `work`, which captions so many and returns their new tokens."""
    work(min(warm, count))
    started = time.perf_counter()
    tokens = work(count)
    seconds = time.perf_counter() - started
    assert tokens == [TOKENS] * count, "some captions ended early"
    return {"rate": count / seconds, "photos": count}


def model(folder: Path) -> dict[str, float]:
    """Write the model, and compute the roofline from the device's measured limits."""
    llava.write(folder, SHAPES, DEVICE)
    best = llava.ceilings(DEVICE)
    sample = decode(llava.photo(0, SHAPES), SHAPES.photo)
    processor, _ = load_processor(str(folder), "main")
    inputs = processor(images=[sample], text=[prompt(folder)], return_tensors="pt")
    tokens = inputs["input_ids"].shape[1]
    return {
        "rate": llava.roofline(SHAPES, best, tokens, TOKENS, BATCH),
        "tokens": tokens,
        "tflops": best.operations / 1e12,
        "tb": best.bytes / 1e12,
    }


def raw_vllm(folder: Path, count: int) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    # Without caches, which don't help with distinct photos.
    engine = LLM(
        str(folder),
        load_format="safetensors",
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        max_model_len=-1,
        dtype="auto" if GPU else "float32",
        enforce_eager=not GPU,
    )
    images = [decode(data, SHAPES.photo) for data in photos(count)]
    text = prompt(folder)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS)

    def work(photos: int) -> list[int]:
        requests = [
            {"prompt": text, "multi_modal_data": {"image": image}} for image in images[:photos]
        ]
        outputs = engine.generate(requests, sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return timed(work, count)


def worker(
    folder: Path,
    backend: str,
    count: int,
) -> dict[str, float]:
    settings = {
        "backend": backend,
        "model": str(folder),
        "max_new_tokens": TOKENS,
        "max_side": SHAPES.photo,
    }
    supervisor = Supervisor(ModelSettings.model_validate(settings), BATCH, SECONDS)
    images = photos(count)

    def work(photos: int) -> list[int]:
        requests = (
            Photo(str(number), image, llava.PROMPT) for number, image in enumerate(images[:photos])
        )
        results = list(supervisor.caption(requests))
        assert not (errors := {result.error for result in results if result.error}), errors
        return [result.output_tokens or 0 for result in results]

    try:
        return timed(work, count)
    finally:
        supervisor.close()


def paper(folder: Path, count: int) -> dict[str, float]:
    """`generate` on one batch of eight after the other, prepared when its turn comes."""
    from transformers import AutoModelForImageTextToText

    processor, _ = load_processor(str(folder), "main")
    processor.tokenizer.padding_side = "left"
    kind = torch.bfloat16 if GPU else torch.float32
    captioner: Any = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=kind).to(DEVICE).eval()
    )
    images = [decode(data, SHAPES.photo) for data in photos(count)]
    text = prompt(folder)

    def work(photos: int) -> list[int]:
        tokens: list[int] = []
        for start in range(0, photos, PAPER_BATCH):
            batch = images[start : min(photos, start + PAPER_BATCH)]
            inputs = processor(
                images=[[image] for image in batch], text=[text] * len(batch), return_tensors="pt"
            )
            inputs = inputs.to(DEVICE, dtype=kind)
            with torch.inference_mode():
                output = captioner.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            tokens += [output.shape[1] - inputs["input_ids"].shape[1]] * len(batch)
            processor.batch_decode(output, skip_special_tokens=True)
        return tokens

    return timed(work, count, PAPER_BATCH)


def stage(
    folder: Path,
    backend: str,
    count: int,
) -> dict[str, float]:
    """The whole stage, by Spark: photos from a Delta table, planning and commits counted."""
    from caption_overhead import pipeline, store

    from vlm4rec_spark.cli import quiet
    from vlm4rec_spark.config import load

    quiet()
    tables = folder.parent / f"tables-{backend}"
    settings = [
        f"tables={tables}",
        "spark.master=local[1]",
        f"caption.model.backend={backend}",
        f"caption.model.model={folder}",
        f"caption.model.max_new_tokens={TOKENS}",
        f"caption.model.max_side={SHAPES.photo}",
        f"caption.batch_size={BATCH}",
        f"caption.batch_seconds={SECONDS}",
        "caption.max_failed_share=1",  # nonsense may well be rejected
    ]
    run = pipeline(load([Path("test.yaml")], settings))
    store(run, count + WARM, lambda number: llava.photo(number, SHAPES))
    warm = load([Path("test.yaml")], [*settings, f"caption.budget.photos={WARM}"])
    pipeline(warm, run).run(["caption"])
    (result,) = run.run(["caption"])
    assert result.ok + result.failed == count
    idle = float(result.details["idle_share"])
    return {"rate": count / result.seconds, "photos": count, "idle": idle}


Figures = dict[str, float] | None
"""None for what couldn't be measured."""


def measured(name: str, *words: object) -> Figures:
    """What a process of its own measures, so that the GPU is free afterwards.

    None after an error.
    """
    folder = Path(__file__).parent
    # Spark's workers import this folder for the photos.
    path = [str(folder.parent), str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        # A fork of a process that has used CUDA can't use it.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # FlashInfer would compile a kernel for sampling.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    if not GPU:
        # GB; half of the machine's otherwise.
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    command = [sys.executable, __file__, "--one", name, *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        what = " ".join([name, *map(str, words[1:])])
        print(f"{what}: {process.stderr[-2_000:]}", file=sys.stderr)
        return None
    return json.loads(process.stdout.splitlines()[-1])


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def measurements(folder: Path, count: int) -> Iterator[tuple[str, str, Figures]]:
    """Key, words and figures of every measurement, one after the other."""
    quarter = max(BATCH, count // 4)
    sixteenth = max(PAPER_BATCH, count // 16)
    yield "roofline", f"roofline at batch {BATCH}", measured("model", folder)
    figures = measured("worker", folder, "transformers", quarter)
    yield "stage_transformers", f"this, transformers, batch {BATCH}", figures
    figures = measured("paper", folder, sixteenth)
    yield "paper", f"the paper's way: generate, batch {PAPER_BATCH}", figures
    yield "vllm", "raw vLLM", measured("raw_vllm", folder, count) if installed("vllm") else None
    figures = measured("worker", folder, "vllm", count) if installed("vllm") else None
    yield "stage_vllm", "this, vLLM", figures
    figures = measured("stage", folder, "vllm", count) if installed("vllm", "pyspark") else None
    yield "spark_vllm", "this, vLLM, by Spark", figures


def measure_one(
    name: str,
    folder: str,
    *words: str,
) -> dict[str, float]:
    calls: dict[str, Any] = {
        "model": model,
        "raw_vllm": raw_vllm,
        "worker": worker,
        "paper": paper,
        "stage": stage,
    }
    return calls[name](Path(folder), *(int(word) if word.isdigit() else word for word in words))


def compare(count: int) -> dict[str, float | None]:
    """Measure everything and show it; the rates by key."""
    kind = (
        f"{torch.cuda.get_device_name(0)}, LLaVA-NeXT-7B's shapes"
        if GPU
        else "No GPU: a tiny model on the CPU, whose figures mean nothing"
    )
    table = Table(title=f"{kind}, {SHAPES.photo} px, {TOKENS} new tokens", title_justify="left")
    for name in ("", "photos", "photos/s", "of the roofline"):
        table.add_column(name, justify="left" if not name else "right")
    console = Console(width=140)
    rates: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, words, figures in measurements(Path(folder) / "llava", count):
            rates[key] = figures["rate"] if figures else None
            shown = {name: f"{value:,.5g}" for name, value in (figures or {}).items()}
            console.print(f"{words}: {shown}")
            share = ratio(rates[key], rates["roofline"])
            rate = shown.get("rate", "not measured")
            table.add_row(words, shown.get("photos"), rate, str(share or ""))
    console.print(table)
    return rates


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return round(numerator / denominator, 3) if numerator and denominator else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=512 if GPU else 32)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(*options.one)))
        return
    rates = compare(options.photos)
    result: dict[str, object] = {
        f"vs_{name}": ratio(rates["stage_vllm"], rates[name])
        for name in ("vllm", "paper", "roofline")
    }
    result["gpu"] = torch.cuda.get_device_name(0) if GPU else None
    print(json.dumps(result | {name: rate and round(rate, 2) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
