"""Index: the vectors of one representation to an index artifact, and which one is in force."""

from __future__ import annotations

from pathlib import Path

from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.pipeline.embed import item_texts
from vlm4rec_spark.stages import index as indexing
from vlm4rec_spark.storage import schemas


def index(context: RunContext, result: StageResult) -> None:
    settings, encoder = context.config.index, context.encoder_id()
    rows = indexing.index_rows(
        context.read(schemas.EMBEDDINGS),
        item_texts(context),
        context.config.representation,
        encoder,
    )
    items = rows.count()
    if not items:
        raise RunError(
            f"index: no item has a {context.config.representation} embedding by {encoder}. Run embed."
        )
    dimension = first_row(rows.select(F.size("embedding")))[0]
    need = 2 * items * dimension * 4 / 1e9
    context.reporter.info(
        f"building the index of {items:,} x {dimension} on the driver, needs about {need:.2f} GB there"
    )
    folder = build_index(
        rows.toArrow(),
        context.config.representation,
        encoder,
        Path(settings.folder),
        settings.ann_min_items,
        _last(context),
        settings.rebuild_threshold,
    )
    searcher, context.index_folder = Searcher.open(folder), folder
    result.ok = items
    result.details = {
        "index_id": searcher.index_id,
        "items": str(items),
        "dimension": str(dimension),
        "approximate": str(searcher.approximate).lower(),
        "base": searcher.base,
        "beside_codes": str(len(searcher.fresh)),
        "folder": str(folder.resolve()),
        "representation": context.config.representation,
        "bytes": str(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())),
    }


def inputs_fingerprint(context: RunContext) -> object:
    settings = context.config.index
    return [
        settings.model_dump(mode="json"),
        context.config.representation,
        context.encoder_id(),
        index_id(context),
    ]


def _last(context: RunContext) -> Searcher | None:
    """The version in force, on which another may rest."""
    try:
        return Searcher.open(index_folder(context))
    except RunError:
        return None


def index_id(context: RunContext) -> str:
    """The index in force; of one that is missing or damaged what is wrong with it, so that nothing rests on it."""
    try:
        return Searcher.open(index_folder(context)).index_id
    except RunError as broken:
        return str(broken)


def index_folder(context: RunContext) -> Path:
    """The folder that this run has built, else the one that the last good index run of this representation named."""
    if context.index_folder:
        return context.index_folder
    built = context.tables.read(schemas.RUNS).where(
        (F.col("stage") == "index") & (F.col("status") == "ok")
    )
    ours = built.where(F.col("details")["representation"] == context.config.representation)
    last = ours.orderBy(F.desc("started_at")).select(F.col("details")["folder"]).head()
    if last is None:
        raise RunError(
            f"There is no index of {context.config.representation} embeddings yet. Run: vlm4rec index"
        )
    return Path(last[0])
