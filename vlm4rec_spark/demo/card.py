"""The model card of the packaged captioner. Knows what a card must say; trains and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm4rec_spark.demo.drawing import ATTRIBUTES


@dataclass(frozen=True)
class Training:
    """How a model came to be."""

    command: str
    seed: int
    steps: int
    batch: int
    renderings: int
    first_seed: int
    minutes: float
    """Core-minutes of drawing and training."""


@dataclass(frozen=True)
class HeldOut:
    """What was measured on generated captions: shares by attribute."""

    count: int
    first_seed: int
    fresh: Mapping[str, float]
    blank: Mapping[str, float]


def write(folder: Path, training: Training, held_out: HeldOut) -> None:
    """Write README.md beside the model."""
    rows = "\n".join(
        f"| {name} | {len(values)} | {held_out.fresh[name]:.3f} | {held_out.blank[name]:.3f} | {1 / len(values):.3f} |"
        for name, values in ATTRIBUTES.items()
    )
    (folder / "README.md").write_text(
        _TEXT.format(
            rows=rows,
            command=training.command,
            seed=training.seed,
            steps=training.steps,
            seen=training.steps * training.batch,
            renderings=training.renderings,
            first=training.first_seed,
            last=training.first_seed + training.renderings - 1,
            minutes=training.minutes,
            count=held_out.count,
            test_first=held_out.first_seed,
            test_last=held_out.first_seed + held_out.count - 1,
        ),
        encoding="utf-8",
    )


_TEXT = """\
# The demo's captioner

Describes a drawn product photo of this project's demo in one sentence. A LLaVA of a CLIP vision tower, a projector and
a small Llama, made of transformers' own classes and loaded through `AutoProcessor` and `AutoModelForImageTextToText`.

## What it can't do

- It knows only the drawings of `vlm4rec_spark/demo/drawing.py`. On a real photo its sentence means nothing.
- It does not obey prompts: it says the same kind of sentence whatever it is asked. Words outside its small vocabulary
  are `<unk>` to it.
- On a blank photo it still names a product, an arbitrary one.

## Training

- Data: {renderings:,} renderings by this project, seeds {first:,} to {last:,}, attributes drawn uniformly.
  No outside data and no pretrained weights. The demo's shop draws from other seeds.
- Command: `{command}`, seed {seed}.
- {steps:,} steps, {seen:,} photos seen, {minutes:.0f} core-minutes on a CPU, drawing included: half of that on 2 cores.
- Linear heads on the pooled vision tower helped it to learn; they aren't part of the model.

## Held-out figures

Share of {count:,} fresh renderings (seeds {test_first:,} to {test_last:,}) whose generated caption names the attribute
rightly; the same with one blank grey photo in place of all of them; and chance.

| attribute | values | fresh | blank | chance |
|---|---:|---:|---:|---:|
{rows}

## Licence

Apache-2.0, like the project: drawings, training and weights are all its own.
"""
