"""`vlm4rec train-captioner`: from a table of labelled photos to a folder that `caption.model.model` takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.cli.reporter import OURS, speak
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.captioner import PACKAGED_MODEL


def run_training(
    table: Path,
    out: Path,
    work: Path | None,
    columns: dict[str, str],
    attributes: Sequence[str],
    licence: str,
    options: dict[str, int | float | bool | str],
    debug: bool,
) -> None:
    """Read the photos, train, measure on held-out photos, write the card."""
    named = _attributes(attributes)
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise UsageError(f"--out {out}: it holds something that isn't a model. Give a new folder.")
    if options["start"] == "packaged":
        options |= {"start": str(PACKAGED_MODEL)}
    if options["start"] and not (Path(str(options["start"])) / "config.json").is_file():
        raise UsageError(
            f"--start {options['start']}: there is no captioner. Name 'packaged', or a model's folder."
        )
    if options["kept"] and not options["start"]:
        raise UsageError(
            "--kept: there is no start of which to keep anything. Name one by --start."
        )
    if not debug:
        quiet()
    speak(False)
    from vlm4rec_spark.training import card, labelled, measure, network, train

    plan, place = train.TrainingPlan(**options), work or out.with_name(f"{out.name}-training")  # type: ignore[arg-type]
    photos = labelled.read(table, columns, named, network.SIDE, place, OURS.info)
    OURS.info(
        "%s photos with %s; left out: %s",
        f"{len(photos.sentences):,}",
        ", ".join(f"{len(values):,} values of {name}" for name, values in photos.values.items()),
        photos.rejected or "none",
    )
    curve, seconds = train.train(photos, out, place, plan, OURS.info)
    found = measure.held_out(out, photos, OURS.info)
    told = shlex.join(
        [
            "vlm4rec",
            "train-captioner",
            str(table),
            "--out",
            str(out),
            *_told(columns, attributes, plan),
        ]
    )
    made = card.Made(
        told,
        f"`{table.name}`",
        licence,
        len(photos.sentences),
        photos.rejected,
        plan,
        seconds,
        train.device_name(),
    )
    card.write(out, made, found, curve)
    shown = Table(title="Captions of held-out photos", title_justify="left")
    for name in ("attribute", "photos", "right", "blank photo", "majority"):
        shown.add_column(name, justify="left" if name == "attribute" else "right")
    for name, share in found.items():
        figures = (share.right, share.blank, share.majority)
        shown.add_row(name, f"{share.photos:,}", *(f"{figure:.3f}" for figure in figures))
    console = Console(stderr=True)
    console.print(shown)
    console.print(
        f"model: {out.resolve()} (its card: README.md). Use it: --set caption.model.model={out}",
        soft_wrap=True,
        highlight=False,
    )


def _attributes(given: Sequence[str]) -> dict[str, str]:
    """Our name to the table's column."""
    if not given:
        raise UsageError("Name at least one --attribute, such as --attribute kind=category.")
    found: dict[str, str] = {}
    for each in given:
        name, _, column = each.partition("=")
        if not re.fullmatch(r"[a-z][a-z_]*", name) or name in found or ("=" in each and not column):
            raise UsageError(
                f"--attribute {each}: write it as ours=theirs, such as kind=category, each of ours once, "
                "in small letters."
            )
        found[name] = column or name
    return found


def _told(columns: dict[str, str], attributes: Sequence[str], plan) -> list[str]:  # type: ignore[no-untyped-def]
    start = "packaged" if plan.start == str(PACKAGED_MODEL) else plan.start
    told = [word for each in attributes for word in ("--attribute", each)]
    told += [
        word for name, column in columns.items() if name != column for word in (f"--{name}", column)
    ]
    told += [
        word
        for name in ("seen", "batch", "rate", "seed")
        for word in (f"--{name}", str(getattr(plan, name)))
    ]
    told += ["--teacher"] if plan.teacher else []
    told += ["--start", start] if start else []
    told += ["--mirrored", str(plan.mirrored)] if plan.mirrored else []
    return told + (["--kept", str(plan.kept)] if plan.kept else [])
