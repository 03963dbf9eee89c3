"""A captioner's model card and its curve. Knows what a card must say; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm4rec_spark.training.labelled import Labelled
    from vlm4rec_spark.training.measure import Share
    from vlm4rec_spark.training.train import Point, Training


def write(
    folder: Path,
    command: str,
    table: str,
    photos: Labelled,
    training: Training,
    shares: Mapping[str, Share],
) -> None:
    """README.md and curve.png."""
    rows = [
        f"| {name} | {share.values:,} | {share.photos:,} | {share.right:.3f} | {share.blank:.3f} "
        f"| {share.majority:.3f} |"
        for name, share in shares.items()
    ]
    rejected = [
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in photos.rejected.items()
    ]
    text = _TEXT.format(
        rows="\n".join(rows),
        command=command,
        table=table,
        photos=len(photos.sentences),
        left_out=", ".join(rejected) or "none",
        plan=training.plan,
        minutes=training.seconds / 60,
        device=training.device,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    _draw(folder / "curve.png", training.curve)


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

Says in one sentence what a photo shows. A LLaVA of a vision tower, a projector and a small Llama.
It consists of transformers' own classes and loads through `AutoProcessor` and
`AutoModelForImageTextToText`; no code comes with it.

## What it can't do

- It says only what its training photos were labelled with, in the labels' words. It sees no brand,
  no size, no writing and no second product.
- It doesn't obey prompts: the prompt doesn't reach it.
- It sees 128 x 128 pixels, whatever the photo's size and the ratio of its sides.
- On a blank photo, or one of something that it doesn't know, it still names some product.

## Training

- Data: `{table}`. {photos:,} photos; left out: {left_out}.
- Command: `{command}`
- {plan.seen:,} photos seen in batches of {plan.batch:,}, seed {plan.seed};
  {minutes:.1f} minutes on {device}.
- The curve is in `curve.png`.

## Held-out figures

`right` is the share of held-out photos whose caption names the attribute's value. `blank` is the
same if every photo had the caption of a blank one, and `majority` is the share of the commonest
value.

| attribute | values | photos | right | blank | majority |
|---|---:|---:|---:|---:|---:|
{rows}
"""
