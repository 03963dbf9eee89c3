"""Captions on one GPU: this project with vLLM and with transformers, raw vLLM, the paper's way, and the roofline.

    python benchmarks/caption_gpu.py [--photos 512]      in the environment of constraints-vllm.txt

LLaVA-NeXT-7B's shapes with random weights, photos of 672 pixels, each another, 100 new tokens. Raw vLLM has all photos
at once and decoded; this project gets JPEGs, in the supervised process that Spark's worker uses, and once more through
the whole caption stage where Spark and Java are there. A batch takes the same time every time, so what runs in batches
gets a part of the photos: transformers a quarter, the paper's way a sixteenth. Without a GPU everything runs on a tiny
model, which shows that the script works and nothing else.

vLLM and Spark are looked for when their turn comes, after the others: on a rented machine they may still be arriving.
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
DEVICE, SHAPES, TOKENS = ("cuda", llava.BIG, 100) if GPU else ("cpu", llava.TINY, 8)
BATCH = 64 if GPU else 4
"""Of transformers: the quickest of 1, 8, 32 and 64 on an H100. The roofline is that of the same batch."""
PAPER_BATCH = 8
WARM = 64 if GPU else 4
"""Photos before the clock starts: kernels are compiled and chosen for the sizes that come."""
SECONDS = 600.0


def photos(count: int) -> list[bytes]:
    return [llava.photo(number, SHAPES) for number in range(count)]


def prompt(folder: Path) -> str:
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": llava.PROMPT}]}
    ]
    return load_processor(str(folder), "main")[0].apply_chat_template(
        chat, add_generation_prompt=True
    )


def timed(work: Callable[[int], list[int]], count: int, warm: int = WARM) -> dict[str, float]:
    """Photos per second of `work`, which describes so many and returns each one's new tokens; warm."""
    work(min(warm, count))
    began = time.perf_counter()
    tokens = work(count)
    seconds = time.perf_counter() - began
    assert tokens == [TOKENS] * count, "some captions ended early"
    return {"rate": count / seconds, "photos": count}


def model(folder: Path) -> dict[str, float]:
    """The model's folder, what the device can do, and what that makes of this job."""
    llava.write(folder, SHAPES, DEVICE)
    best = llava.ceilings(DEVICE)
    sample = decode(llava.photo(0, SHAPES), SHAPES.photo)
    processor, _ = load_processor(str(folder), "main")
    tokens = processor(images=[sample], text=[prompt(folder)], return_tensors="pt")[
        "input_ids"
    ].shape[1]
    return {
        "rate": llava.roofline(SHAPES, best, tokens, TOKENS, BATCH),
        "tokens": tokens,
        "tflops": best.operations / 1e12,
        "tb": best.bytes / 1e12,
    }


def raw_vllm(folder: Path, count: int) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    # Without the caches, in which photos that differ would find nothing.
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
    text, sampling = prompt(folder), SamplingParams(temperature=0, max_tokens=TOKENS)

    def work(some: int) -> list[int]:
        asked = [{"prompt": text, "multi_modal_data": {"image": image}} for image in images[:some]]
        return [
            len(said.outputs[0].token_ids)
            for said in engine.generate(asked, sampling, use_tqdm=False)
        ]

    return timed(work, count)


def worker(folder: Path, backend: str, count: int) -> dict[str, float]:
    settings = {
        "backend": backend,
        "model": str(folder),
        "max_new_tokens": TOKENS,
        "max_side": SHAPES.photo,
    }
    supervisor, data = (
        Supervisor(ModelSettings.model_validate(settings), BATCH, SECONDS),
        photos(count),
    )

    def work(some: int) -> list[int]:
        asked = (Photo(str(number), each, llava.PROMPT) for number, each in enumerate(data[:some]))
        results = list(supervisor.caption(asked))
        assert not (errors := {result.error for result in results if result.error}), errors
        return [result.output_tokens or 0 for result in results]

    try:
        return timed(work, count)
    finally:
        supervisor.close()


def paper(folder: Path, count: int) -> dict[str, float]:
    """`generate` on a batch of eight after the other, each prepared when its turn comes."""
    from transformers import AutoModelForImageTextToText

    processor, _ = load_processor(str(folder), "main")
    processor.tokenizer.padding_side = "left"
    kind = torch.bfloat16 if GPU else torch.float32
    captioner: Any = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=kind).to(DEVICE).eval()
    )
    images, text = [decode(data, SHAPES.photo) for data in photos(count)], prompt(folder)

    def work(some: int) -> list[int]:
        tokens: list[int] = []
        for start in range(0, some, PAPER_BATCH):
            batch = images[start : min(some, start + PAPER_BATCH)]
            inputs = processor(
                images=[[image] for image in batch], text=[text] * len(batch), return_tensors="pt"
            )
            inputs = inputs.to(DEVICE, dtype=kind)
            with torch.inference_mode():
                said = captioner.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            tokens += [said.shape[1] - inputs["input_ids"].shape[1]] * len(batch)
            processor.batch_decode(said, skip_special_tokens=True)
        return tokens

    return timed(work, count, PAPER_BATCH)


def stage(folder: Path, backend: str, count: int) -> dict[str, float]:
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
    pipeline(load([Path("test.yaml")], [*settings, f"caption.budget.photos={WARM}"]), run).run(
        ["caption"]
    )
    (outcome,) = run.run(["caption"])
    assert outcome.ok + outcome.failed == count
    return {
        "rate": count / outcome.seconds,
        "photos": count,
        "idle": float(outcome.details["idle_share"]),
    }


def measured(name: str, *words: object) -> dict[str, float] | None:
    """What a process of its own has measured, which has given the GPU back; None where it ended with an error."""
    here = Path(__file__).parent
    # Spark's workers come here for the photos.
    path = os.pathsep.join(
        [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    # Raw vLLM's engine, too, starts afresh and not as a copy of a process that has asked for CUDA; and it does without
    # FlashInfer, which would compile a kernel for sampling.
    environment |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    environment |= (
        {} if GPU else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    )  # GB; half of the machine's otherwise
    command = [sys.executable, __file__, "--one", name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{name} {' '.join(map(str, words[1:]))}: {done.stderr[-2_000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def there(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def measurements(folder: Path, count: int) -> Iterator[tuple[str, str, dict[str, float] | None]]:
    """Key, words and figures of each, as they come."""
    some, few = max(BATCH, count // 4), max(PAPER_BATCH, count // 16)
    yield "roofline", f"roofline at batch {BATCH}", measured("model", folder)
    yield (
        "stage_transformers",
        f"this, transformers, batch {BATCH}",
        measured("worker", folder, "transformers", some),
    )
    yield "paper", f"the paper's way: generate, batch {PAPER_BATCH}", measured("paper", folder, few)
    yield "vllm", "raw vLLM", measured("raw_vllm", folder, count) if there("vllm") else None
    yield (
        "stage_vllm",
        "this, vLLM",
        measured("worker", folder, "vllm", count) if there("vllm") else None,
    )
    spark = measured("stage", folder, "vllm", count) if there("vllm", "pyspark") else None
    yield "spark_vllm", "this, vLLM, by Spark", spark


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--photos", type=int, default=512 if GPU else 32)
    options.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        what, folder, *rest = given.one
        call: Any = {
            "model": model,
            "raw_vllm": raw_vllm,
            "worker": worker,
            "paper": paper,
            "stage": stage,
        }[what]
        print(
            json.dumps(
                call(Path(folder), *(int(word) if word.isdigit() else word for word in rest))
            )
        )
        return
    gpu = torch.cuda.get_device_name(0) if GPU else None
    kind = (
        f"{gpu}, LLaVA-NeXT-7B's shapes"
        if GPU
        else "No GPU: a tiny model on the CPU, whose figures mean nothing"
    )
    table = Table(title=f"{kind}, {SHAPES.photo} px, {TOKENS} new tokens", title_justify="left")
    for name in ("", "photos", "photos/s", "of the roofline"):
        table.add_column(name, justify="left" if not name else "right")
    console, rates = Console(width=140), dict[str, float | None]()
    with tempfile.TemporaryDirectory() as place:
        for key, words, found in measurements(Path(place) / "llava", given.photos):
            rates[key] = found["rate"] if found else None
            told = {name: f"{value:,.5g}" for name, value in (found or {}).items()}
            console.print(f"{words}: {told}")
            share = over(rates[key], rates["roofline"])
            table.add_row(
                words, told.get("photos"), told.get("rate", "not measured"), str(share or "")
            )
    console.print(table)
    ours = rates["stage_vllm"]
    result = {f"vs_{name}": over(ours, rates[name]) for name in ("vllm", "paper", "roofline")}
    print(
        json.dumps(
            result | {"gpu": gpu} | {name: rate and round(rate, 2) for name, rate in rates.items()}
        )
    )


def over(one: float | None, other: float | None) -> float | None:
    return round(one / other, 3) if one and other else None


if __name__ == "__main__":
    main()
