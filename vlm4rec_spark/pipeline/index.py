"""Index: vectors of one representation to an index artifact, and the index that is in use."""

from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.pipeline.embed import item_texts
from vlm4rec_spark.stages import index as stage
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.state import StageOutput


def index(context: RunContext, result: StageResult) -> None:
    """Build the index on the driver. The index in use is the base of the new one."""
    settings = context.config.index
    representation = context.config.representation
    encoder = context.encoder_id()
    embeddings = context.read(schemas.EMBEDDINGS)
    vectors = stage.index_vectors(embeddings, representation, encoder)
    result.ok = _announced(context, vectors)
    if not result.ok:
        raise RunError(f"index: no item has a {representation} embedding by {encoder}. Run embed.")
    rows = stage.index_rows(vectors, item_texts(context), representation)
    folder = build_index(
        rows.toArrow(),
        representation,
        encoder,
        Path(settings.folder),
        settings.ann_min_items,
        _in_use(context),
        settings.rebuild_threshold,
    )
    searcher = Searcher.open(folder)
    files = filter(Path.is_file, folder.rglob("*"))
    context.built_index_id = searcher.index_id
    result.output = StageOutput(representation=representation, index_id=searcher.index_id)
    result.details = {
        "index_id": searcher.index_id,
        "items": str(result.ok),
        "dimension": str(searcher.vectors.shape[1]),
        "approximate": str(searcher.approximate).lower(),
        "base": searcher.base,
        "delta": str(len(searcher.delta)),
        "representation": representation,
        "bytes": str(sum(file.stat().st_size for file in files)),
    }


def inputs_fingerprint(context: RunContext) -> object:
    """Not the folder's place: a shop that was moved has nothing to do."""
    settings = context.config.index.model_dump(mode="json", exclude={"folder"})
    return [settings, context.config.representation, context.encoder_id(), index_id(context)]


def index_id(context: RunContext) -> str:
    """The index in use; for a missing or damaged one its error, so that nothing rests on it."""
    try:
        return Searcher.open(index_folder(context)).index_id
    except RunError as error:
        return str(error)


def index_folder(context: RunContext) -> Path:
    """The folder of the index that this run has built, or else of the index in use.

    Raises RunError where there is none of the configured representation.
    """
    known_id = context.built_index_id
    state = context.states().get("index")
    if known_id is None and state and state.output.representation == context.config.representation:
        known_id = state.output.index_id
    if known_id is None:
        raise RunError(
            f"There is no index of {context.config.representation} embeddings yet. "
            "Run: vlm4rec index"
        )
    return Path(context.config.index.folder) / known_id


def _announced(context: RunContext, vectors: DataFrame) -> int:
    """Report the memory that the driver needs, before the vectors get there; returns the items."""
    items, dimension = first_row(vectors.agg(F.count("*"), F.max(F.size("embedding"))))
    if items:
        gigabytes = 2 * items * dimension * 4 / 1e9
        context.reporter.info(
            f"building the index of {items:,} x {dimension} on the driver, "
            f"needs about {gigabytes:.2f} GB there"
        )
    return items


def _in_use(context: RunContext) -> Searcher | None:
    try:
        return Searcher.open(index_folder(context))
    except RunError:
        return None
