"""`vlm4rec show user U` and `vlm4rec show item I`: what tables and index hold of one. Read-only.

An id is data: it is compared as a literal, never put into a query's text.
"""

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import flat_exclusions, top_k
from vlm4rec_spark.pipeline import Pipeline
from vlm4rec_spark.pipeline.index import index_folder
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.tables import Tables

_MAX_HISTORY_ROWS = 20
_NEIGHBORS = 10
_NO_LIST = (
    "No recommendations yet: a list needs a history with a vector. See: vlm4rec recommend --help"
)
_SIMILAR_IDS = 50
"""Ids that are compared with an unknown one; Spark picks them, so that no more are collected."""


class _Texts(NamedTuple):
    """An item's title and the caption of its main photo; empty where there is none."""

    title: str = ""
    caption: str = ""


def user(
    pipeline: Pipeline,
    user_id: str,
    console: Console,
) -> None:
    """Raises RunError for a user who is neither in the log nor has a list."""
    tables = pipeline.tables
    user_id = _signed_in(tables, user_id, console)
    profile = _profile(tables, user_id)
    lists = tables.read(schemas.RECOMMENDATIONS).where(_equals("user_id", user_id))
    generated_at = _micros("generated_at")
    recommendations = lists.select("items", "index_id", generated_at).first()
    if profile:
        day = _day(profile["last_event_at"])
        summary = (
            f"events that count: {profile['events']:,}, the last on {day}; "
            f"items seen: {profile['seen']:,}; compared by {profile['representation']}"
        )
    else:
        log = pipeline.context.log()
        events = log.where(_equals("user_id", user_id)).count()
        if recommendations is None and not events:
            raise _unknown("user", user_id, log.select("user_id").distinct())
        summary = (
            f"events in the log: {events:,}, but no history: no event counts, the user is taken "
            "for a bot, or profiles hasn't run since"
        )
    console.print(_line(f"User {user_id}", summary))
    history = profile["history"] if profile else []
    items = recommendations["items"] if recommendations else []
    latest = {row["item_id"]: f"{row['weight']:.2f}" for row in history[:_MAX_HISTORY_ROWS]}
    texts = _texts(tables, {*latest, *(row["item_id"] for row in items)})
    if history:
        more = len(history) - len(latest)
        title = "History, latest first" + (f" (and {more:,} more items)" if more else "")
        console.print(_items_table(title, "weight", latest, texts))
    if recommendations:
        console.print(_recommendations_table(recommendations, texts))
    else:
        console.print(_NO_LIST)


def item(
    pipeline: Pipeline,
    item_id: str,
    console: Console,
) -> None:
    """Raises RunError for an item that isn't in the catalogue."""
    items = pipeline.context.read(schemas.ITEMS)
    times = {"first": _micros("first_seen_at"), "at": _micros("updated_at")}
    row = items.where(_equals("item_id", item_id)).withColumns(times).first()
    if row is None:
        raise _unknown("item", item_id, items.select("item_id"))
    console.print(_line(f"Item {item_id}", row["title"] or "(no title)"))
    console.print(_catalogue_table(row))
    _print_photos(pipeline.tables, item_id, console)
    _print_neighbors(pipeline, item_id, console)
    lists = pipeline.tables.read(schemas.RECOMMENDATIONS)
    listing = lists.where(F.array_contains(F.col("items.item_id"), F.lit(item_id))).count()
    console.print(_line("On the lists of", f"{listing:,} of {lists.count():,} users"))


def _signed_in(
    tables: Tables,
    user_id: str,
    console: Console,
) -> str:
    """The user that an anonymous id belongs to; any other id stays."""
    identities = tables.read(schemas.IDENTITIES).where(_equals("anonymous_id", user_id))
    identity = identities.select("user_id").first()
    if identity is None:
        return user_id
    console.print(_line(user_id, f"turned out to be {identity['user_id']}"))
    return str(identity["user_id"])


def _profile(tables: Tables, user_id: str) -> Row | None:
    profiles = tables.read(schemas.PROFILES).where(_equals("user_id", user_id))
    seen = F.size("seen").alias("seen")
    columns = ("representation", "history", "events", seen, _micros("last_event_at"))
    return profiles.select(*columns).first()


def _unknown(
    kind: str,
    wanted: str,
    ids: DataFrame,
) -> RunError:
    """The error for an unknown id. It names the nearest ones, by Spark's edit distance.

    Only ids with the same first letter are compared.
    """
    column = F.lower(f"{kind}_id")
    typed = wanted.lower()
    similar = ids.where(column.startswith(typed[:1])).orderBy(
        F.levenshtein(column, F.lit(typed)), f"{kind}_id"
    )
    spelled = {row[0].lower(): row[0] for row in similar.limit(_SIMILAR_IDS).collect()}
    nearest = [repr(spelled[match]) for match in difflib.get_close_matches(typed, spelled, n=3)]
    hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
    source = "the log" if kind == "user" else "the catalogue"
    return RunError(f"There is no {kind} {wanted!r} in {source}.{hint}")


def _items_table(
    title: str,
    figure: str,
    figures: dict[str, str],
    texts: Mapping[str, _Texts],
) -> Table:
    """A row for each item in `figures`, which holds its weight or cosine."""
    table = _table(title, ("item", "title", figure, "caption"))
    for item_id, number in figures.items():
        text = texts[item_id]
        _add_row(table, item_id, text.title, number, text.caption)
    return table


def _recommendations_table(recommendations: Row, texts: Mapping[str, _Texts]) -> Table:
    day = _day(recommendations["generated_at"])
    title = f"Recommendations of {day}, made with index {recommendations['index_id']}"
    table = _table(title, ("rank", "item", "title", "score", "because of", "shared words"))
    for rank, row in enumerate(recommendations["items"], start=1):
        item_id = row["item_id"]
        _add_row(
            table,
            str(rank),
            item_id,
            texts[item_id].title,
            f"{row['score']:.3f}",
            row["because_item_id"] or "-",
            ", ".join(row["because_terms"] or []),
        )
    return table


def _catalogue_table(row: Row) -> Table:
    values = {
        "brand": row["brand"],
        "category": row["category"],
        "parent": row["parent_id"],
        "region": row["region"],
        "price": "" if row["price"] is None else f"{row['price']:,.2f}",
        **(row["attributes"] or {}),
        "available": "yes" if row["available"] else "no: never recommended",
        "first seen": row["first"] and _day(row["first"]),
        "last changed": _day(row["at"]),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value:
            table.add_row(Text(_printable(name), "dim"), Text(_printable(value)))
    return table


def _print_photos(
    tables: Tables,
    item_id: str,
    console: Console,
) -> None:
    """Each photo with its caption in force, or else the result of the latest try."""
    of_item = _equals("item_id", item_id)
    photos = _by_position(tables.read(schemas.PHOTOS).where(of_item).drop("image"))
    links = _by_position(tables.read(schemas.ITEM_CAPTIONS).where(of_item))
    captions = _captions(tables, photos.values(), links.values())
    for position in sorted(photos.keys() | links.keys()):
        photo = photos.get(position)
        link = links.get(position)
        console.print(_photo_line(position, photo), soft_wrap=True)
        in_force = [row for row in captions if link and row["caption_key"] == link["caption_key"]]
        tries = [row for row in captions if photo and row["image_sha256"] == photo["image_sha256"]]
        latest = (in_force or tries)[-1:]
        for line in _caption_lines(latest[0]) if latest else [Text("not captioned", "dim")]:
            console.print(Text("  ").append(line))
    if not photos and not links:
        console.print("No photo and no caption: its title is compared instead.")


def _by_position(rows: DataFrame) -> dict[int, Row]:
    return {row["position"]: row for row in rows.collect()}


def _captions(
    tables: Tables,
    photos: Collection[Row],
    links: Collection[Row],
) -> list[Row]:
    """All captions and failures of these photos and links, the latest last."""
    of_photos = F.col("image_sha256").isin([photo["image_sha256"] for photo in photos])
    of_links = F.col("caption_key").isin([link["caption_key"] for link in links])
    captions = tables.read(schemas.CAPTIONS).where(of_photos | of_links)
    return captions.orderBy("captioned_at").collect()


def _photo_line(position: int, photo: Row | None) -> Text:
    if photo is None:
        return _line(f"Text {position}", "imported, without a photo")
    source = photo["uri"] or "from the catalogue"
    size = decimal(photo["bytes"])
    return _line(f"Photo {position}", f"{source} ({size}, sha256 {photo['image_sha256']})")


def _caption_lines(row: Row) -> list[Text]:
    model = "" if row["model"] is None else f" by {row['model']}, prompt {row['prompt_id']}"
    caption = row["caption"]
    text = f"{row['error_class']}, {row['error']}" if caption is None else caption
    lines = [_line(f"caption {row['status']}{model}", text)]
    if row["attributes"]:
        pairs = [f"{name}: {value}" for name, value in row["attributes"].items()]
        lines.append(_line("attributes in it", ", ".join(pairs)))
    return lines


def _print_neighbors(
    pipeline: Pipeline,
    item_id: str,
    console: Console,
) -> None:
    try:
        # Without checksums: they would read all vectors, and one is enough here.
        searcher = Searcher.open(index_folder(pipeline.context), verify=False)
    except (RunError, OSError) as error:
        console.print(_line("No neighbors", str(error)))
        return
    position = searcher.positions([item_id])
    if position[0] < 0:
        reason = f"the index {searcher.index_id} doesn't contain this item."
        console.print(_line("No neighbors", reason))
        return
    cosines = _neighbors(searcher, position)
    texts = _texts(pipeline.tables, cosines)
    title = f"Nearest in index {searcher.index_id}"
    console.print(_items_table(title, "cosine", cosines, texts))


def _neighbors(searcher: Searcher, position: np.ndarray) -> dict[str, str]:
    """The nearest items and their cosines, nearest first. `position`: array of one item's row."""
    query = np.asarray(searcher.vectors[position])
    if searcher.approximate:
        # Half of the leaves: one query is cheap, and a person wants the true neighbors.
        effort = Effort(max(1, searcher.leaf_count // 2), 10 * _NEIGHBORS)
        candidates = searcher.search(query, effort)
    else:
        candidates = searcher.score_all(query)
    itself = flat_exclusions([position], len(searcher))
    allowed = np.ones(len(searcher), bool)
    rows, scores = top_k(*candidates, itself, allowed, _NEIGHBORS)
    pairs = zip(rows[0], scores[0], strict=True)
    return {str(searcher.ids[row]): f"{score:.3f}" for row, score in pairs if row >= 0}


def _texts(tables: Tables, item_ids: Iterable[str]) -> Mapping[str, _Texts]:
    """Title and caption of the main photo of these items."""
    of_items = F.col("item_id").isin(list(item_ids))
    links = tables.read(schemas.ITEM_CAPTIONS).where(of_items).groupBy("item_id")
    main = links.agg(F.min_by("caption_key", "position").alias("caption_key"))
    captions = tables.read(schemas.CAPTIONS).select("caption_key", "caption")
    titles = tables.read(schemas.ITEMS).where(of_items).select("item_id", "title")
    main_captions = main.join(captions, on="caption_key", how="inner")
    rows = titles.join(main_captions, on="item_id", how="left").na.fill("")
    texts = defaultdict[str, _Texts](_Texts)
    for row in rows.collect():
        texts[row["item_id"]] = _Texts(row["title"], row["caption"])
    return texts


def _equals(column: str, value: str) -> Column:
    return F.col(column) == F.lit(value)


def _micros(column: str) -> Column:
    # Collecting a timestamp would turn it into this machine's time zone.
    return F.unix_micros(column).alias(column)


def _day(micros: int) -> str:
    return f"{datetime.fromtimestamp(micros / 1e6, UTC):%Y-%m-%d}"


def _table(title: str, columns: Collection[str]) -> Table:
    """Texts share the width that ids and figures leave, and are cut to it; an id is never cut."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, expand=True
    )
    shares = {"title": 2, "caption": 4, "shared words": 3}
    for name in columns:
        if name in shares:
            table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=shares[name])
        elif name in ("weight", "score", "cosine"):
            table.add_column(name, justify="right", overflow="fold")
        else:
            table.add_column(name, overflow="fold")
    return table


def _line(label: str, text: str) -> Text:
    return Text.assemble((_printable(label), "bold"), ": ", _printable(text))


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(_printable(cell)) for cell in cells))


def _printable(text: str) -> str:
    """A catalogue's text may hold line ends, and what a terminal takes for commands."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
