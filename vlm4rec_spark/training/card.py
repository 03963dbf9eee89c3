"""The model card that lies beside a captioner, and its curve. Knows what a card must say; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm4rec_spark.training.measure import Share
    from vlm4rec_spark.training.train import Point, TrainingPlan


@dataclass(frozen=True)
class Made:
    """How a captioner came to be."""

    command: str
    data: str
    licence: str
    photos: int
    rejected: Mapping[str, int]
    plan: TrainingPlan
    seconds: float
    device: str


def write(folder: Path, made: Made, found: Mapping[str, Share], curve: Sequence[Point]) -> None:
    """README.md and curve.png."""
    rows = "\n".join(
        f"| {name} | {each.values:,} | {each.photos:,} | {each.right:.3f} | {each.blank:.3f} | {each.majority:.3f} |"
        for name, each in found.items()
    )
    left_out = (
        ", ".join(
            f"{count:,} {reason.replace('_', ' ')}" for reason, count in made.rejected.items()
        )
        or "none"
    )
    gone_on = " It went on from a captioner that was trained before." if made.plan.start else ""
    taught = "EfficientNet-Lite0 (ImageNet weights, Apache-2.0) told the tower what to look for while it learnt."
    (folder / "README.md").write_text(
        _TEXT.format(
            rows=rows,
            command=made.command,
            data=made.data,
            licence=made.licence,
            photos=made.photos,
            left_out=left_out,
            seen=made.plan.seen,
            batch=made.plan.batch,
            seed=made.plan.seed,
            minutes=made.seconds / 60,
            device=made.device,
            teacher=taught if made.plan.teacher else "",
            gone_on=gone_on,
        ).replace("\n\n\n", "\n\n"),
        encoding="utf-8",
    )
    if curve:
        _draw(folder / "curve.png", curve)


def _draw(file: Path, curve: Sequence[Point]) -> None:
    from matplotlib.figure import Figure

    seen = [point.seen for point in curve]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, right = figure.subplots(1, 2)
    loss.plot(seen, [point.loss for point in curve], color="#444")
    loss.set(title="Loss", xlabel="photos seen")
    for name in curve[-1].right:
        right.plot(seen, [point.right.get(name) for point in curve], label=name)
    right.set(title="Right on held-out photos (heads)", xlabel="photos seen", ylim=(0, 1.02))
    right.legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(file, dpi=110, metadata={"Software": None})


_TEXT = """\
# A small captioner of product photos

Says in one sentence what a photo shows. A LLaVA of a vision tower, a projector and a small Llama, made of transformers'
own classes and loaded through `AutoProcessor` and `AutoModelForImageTextToText`; no code comes with it.

## What it can't do

- It says only what its training photos were labelled with, in their words. What else a photo shows it can't see: no
  brand, no size, no writing, no second product.
- It doesn't obey prompts: what it is asked doesn't reach it.
- It sees 128 x 128 pixels, whatever the photo's size and the ratio of its sides.
- On a blank photo, or one of something that it doesn't know, it still names some product.

## Training

- Data: {data}. {photos:,} photos; left out: {left_out}.
- Command: `{command}`
- {seen:,} photos seen in batches of {batch:,}, seed {seed}; {minutes:.1f} minutes on {device}.{gone_on} {teacher}
- The curve is in `curve.png`.

## Held-out figures

Share of photos kept out of the training whose generated caption names the attribute's value; the same if every caption
were that of a blank photo; and the share of the commonest value.

| attribute | values | photos | right | blank | majority |
|---|---:|---:|---:|---:|---:|
{rows}

## Licence

{licence}
"""
