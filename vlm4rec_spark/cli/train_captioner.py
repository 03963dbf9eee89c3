"""`vlm4rec train-captioner`: labelled photos to a folder that `caption.model.model` takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.cli.reporter import LOG, configure
from vlm4rec_spark.cli.table_style import new_table
from vlm4rec_spark.errors import UsageError

if TYPE_CHECKING:
    from vlm4rec_spark.training.measure import Share


def run_training(
    table: Path,
    out: Path,
    photo: str,
    attributes: Sequence[str],
    plan_values: tuple[int, int, int],
    debug: bool,
) -> None:
    """Read the photos, train, measure on held-out photos, write the card.

    `plan_values` are the fields of TrainingPlan. `attributes` are written as name=column.
    """
    columns = _attribute_columns(attributes)
    _check(out)
    if not debug:
        quiet()
    configure(as_json=False)
    from vlm4rec_spark.training import card, labelled, measure, network, train

    plan = train.TrainingPlan(*plan_values)
    work = out.with_name(f"{out.name}-training")
    photos = labelled.read(table, photo, columns, network.SIDE, work, LOG.info)
    values = [f"{len(values):,} values of {name}" for name, values in photos.values.items()]
    LOG.info(
        "%s photos with %s; left out: %s",
        f"{len(photos.sentences):,}",
        ", ".join(values),
        photos.rejected or "none",
    )
    training = train.train(photos, out, work, plan, LOG.info)
    accuracy = measure.held_out(out, photos, LOG.info)
    pairs = [f"--attribute={name}={column}" for name, column in columns.items()]
    words = ["vlm4rec", "train-captioner", str(table), f"--out={out}", f"--photo={photo}", *pairs]
    size = [f"--seen={plan.seen}", f"--batch={plan.batch}", f"--seed={plan.seed}"]
    card.write(out, shlex.join(words + size), table.name, photos, training, accuracy)
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
