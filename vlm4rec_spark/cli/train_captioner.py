"""`vlm4rec train-captioner`: labelled photos to a folder that `caption.model.model` takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.cli.reporter import LOG, configure
from vlm4rec_spark.cli.table_style import new_table
from vlm4rec_spark.errors import UsageError

if TYPE_CHECKING:
    from vlm4rec_spark.training.measure import Share

Options = dict[str, Any]
"""The fields of TrainingPlan."""


def run_training(
    table: Path,
    out: Path,
    work: Path | None,
    columns: dict[str, str],
    attributes: Sequence[str],
    licence: str,
    options: Options,
    debug: bool,
) -> None:
    """Read the photos, train, measure on held-out photos, write the card."""
    attribute_columns = _attribute_columns(attributes)
    command = _command(table, out, columns, attributes, options)
    _check(out)
    if not debug:
        quiet()
    configure(as_json=False)
    from vlm4rec_spark.training import card, labelled, measure, network, train

    plan = train.TrainingPlan(**options)
    folder = work or out.with_name(f"{out.name}-training")
    photos = labelled.read(table, columns, attribute_columns, network.SIDE, folder, LOG.info)
    values = [f"{len(values):,} values of {name}" for name, values in photos.values.items()]
    LOG.info(
        "%s photos with %s; left out: %s",
        f"{len(photos.sentences):,}",
        ", ".join(values),
        photos.rejected or "none",
    )
    curve, seconds = train.train(photos, out, folder, plan, LOG.info)
    accuracy = measure.held_out(out, photos, LOG.info)
    origin = card.Provenance(
        command,
        f"`{table.name}`",
        licence,
        len(photos.sentences),
        photos.rejected,
        plan,
        seconds,
        train.device_name(),
    )
    card.write(out, origin, accuracy, curve)
    _show(out, accuracy)


def _check(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise UsageError(f"--out {out}: this folder has files but no model. Name a new folder.")


def _attribute_columns(assignments: Sequence[str]) -> dict[str, str]:
    """Attribute's name to the table's column."""
    if not assignments:
        raise UsageError("Name at least one --attribute, such as --attribute kind=category.")
    columns: dict[str, str] = {}
    for assignment in assignments:
        name, equals, column = assignment.partition("=")
        valid = re.fullmatch(r"[a-z][a-z_]*", name) and not (equals and not column)
        if not valid or name in columns:
            raise UsageError(
                f"--attribute {assignment}: write it as name=column, such as kind=category. "
                "Names are in small letters, and each is given once."
            )
        columns[name] = column or name
    return columns


def _command(
    table: Path,
    out: Path,
    columns: Mapping[str, str],
    attributes: Sequence[str],
    options: Options,
) -> str:
    """The command line for the card, without what is the default or has no influence."""
    words = ["vlm4rec", "train-captioner", str(table), "--out", str(out)]
    for attribute in attributes:
        words += ["--attribute", attribute]
    for name, column in columns.items():
        if name != column:
            words += [f"--{name}", column]
    for name in ("seen", "batch", "rate", "seed"):
        words += [f"--{name}", str(options[name])]
    return shlex.join(words)


def _show(out: Path, accuracy: Mapping[str, Share]) -> None:
    columns = ("photos", "right", "blank photo", "majority")
    table = new_table("Captions of held-out photos", ("attribute",), columns)
    for name, share in accuracy.items():
        figures = [f"{figure:.3f}" for figure in (share.right, share.blank, share.majority)]
        table.add_row(name, f"{share.photos:,}", *figures)
    console = Console(stderr=True)
    console.print(table)
    use = f"Use it: --set caption.model.model={out}"
    line = f"model: {out.resolve()} (its card: README.md). {use}"
    console.print(line, soft_wrap=True, highlight=False)
