"""`vlm4rec show user U` and `vlm4rec show item I`: all that the tables and the index say of one. Reads only.

An id is data: it is compared as a literal, never put into a query's text.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from datetime import UTC, datetime

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

_HISTORY = 20
_NEIGHBOURS = 10
_NEAR = 50
"""Ids that are compared closely when one isn't known; Spark picks them, so that no more are collected."""


def user(pipeline: Pipeline, user_id: str, console: Console) -> None:
    """Raises RunError for a user whom neither the log nor any list knows."""
    tables = pipeline.tables
    known = _first(
        tables.read(schemas.IDENTITIES)
        .where(F.col("anonymous_id") == F.lit(user_id))
        .select("user_id")
    )
    if known is not None:
        console.print(_line(user_id, f"turned out to be {known['user_id']}"))
        user_id = known["user_id"]
    mine = F.col("user_id") == F.lit(user_id)
    profile = _first(
        tables.read(schemas.PROFILES)
        .where(mine)
        .select(
            "representation",
            "history",
            "events",
            F.size("seen").alias("seen"),
            _micros("last_event_at"),
        )
    )
    lists = _first(
        tables.read(schemas.RECOMMENDATIONS)
        .where(mine)
        .select("items", "k", "index_id", _micros("generated_at"))
    )
    log = pipeline.context.log() if profile is None else None
    events = 0 if log is None else log.where(mine).count()
    if profile is None and lists is None and not events:
        assert log is not None
        raise _unknown("user", user_id, log.select("user_id").distinct())
    console.print(_line(f"User {user_id}", _known_of(profile, events)))
    history, items = (profile["history"] if profile else []), (lists["items"] if lists else [])
    texts = _texts(tables, {row["item_id"] for row in [*history[:_HISTORY], *items]})
    if history:
        console.print(_history(history, texts))
    if lists is None:
        console.print(
            "No recommendations yet: a list needs a history with a vector. See: vlm4rec recommend --help"
        )
    else:
        console.print(_recommendations(lists, texts))


def item(pipeline: Pipeline, item_id: str, console: Console) -> None:
    """Raises RunError for an item that isn't in the catalogue."""
    tables, mine = pipeline.tables, F.col("item_id") == F.lit(item_id)
    items = pipeline.context.read(schemas.ITEMS)
    found = _first(
        items.where(mine).withColumns(
            {"first": _micros("first_seen_at"), "at": _micros("updated_at")}
        )
    )
    if found is None:
        raise _unknown("item", item_id, items.select("item_id"))
    console.print(_line(f"Item {item_id}", found["title"] or "(no title)"))
    console.print(_facts(found))
    _print_photos(tables, mine, console)
    _print_neighbours(pipeline, item_id, console)
    lists = tables.read(schemas.RECOMMENDATIONS)
    with_it = lists.where(F.array_contains(F.col("items.item_id"), F.lit(item_id))).count()
    console.print(_line("On the lists of", f"{with_it:,} of {lists.count():,} users"))


def _unknown(kind: str, wanted: str, ids: DataFrame) -> RunError:
    """Says which known ids are nearest: of the fifty that begin alike and differ least, by Spark's count of edits."""
    column, typed = F.lower(f"{kind}_id"), wanted.lower()
    alike = ids.where(column.startswith(typed[:1])).orderBy(
        F.levenshtein(column, F.lit(typed)), f"{kind}_id"
    )
    near = {row[0].lower(): row[0] for row in alike.limit(_NEAR).collect()}
    best = [repr(near[match]) for match in difflib.get_close_matches(typed, near, n=3)]
    hint = f" Did you mean {', '.join(best)}?" if best else ""
    place = "the log" if kind == "user" else "the catalogue"
    return RunError(f"There is no {kind} {wanted!r} in {place}.{hint}")


def _known_of(profile: Row | None, events: int) -> str:
    if profile is None:
        return (
            f"events in the log: {events:,}, but no history: none of them counts, the user is taken for a bot, or "
            "profiles hasn't run since"
        )
    return (
        f"events that count: {profile['events']:,}, the last on {_day(profile['last_event_at'])}; items seen: "
        f"{profile['seen']:,}; compared by {profile['representation']}"
    )


def _history(history: list[Row], texts: dict[str, tuple[str, str]]) -> Table:
    more = len(history) - _HISTORY
    title = "History, latest first" + (f" (and {more:,} more items)" if more > 0 else "")
    grid = _grid(title, ("item", "title", "weight", "caption"))
    for row in history[:_HISTORY]:
        name, caption = texts.get(row["item_id"], ("", ""))
        grid.add_row(_plain(row["item_id"]), _plain(name), f"{row['weight']:.2f}", _plain(caption))
    return grid


def _recommendations(lists: Row, texts: dict[str, tuple[str, str]]) -> Table:
    title = f"Recommendations of {_day(lists['generated_at'])}, made with index {lists['index_id']}"
    grid = _grid(title, ("rank", "item", "title", "score", "because of", "shared words"))
    for rank, row in enumerate(lists["items"], start=1):
        name, _ = texts.get(row["item_id"], ("", ""))
        words = ", ".join(row["because_terms"] or [])
        grid.add_row(
            str(rank),
            _plain(row["item_id"]),
            _plain(name),
            f"{row['score']:.3f}",
            _plain(row["because_item_id"] or "-"),
            _plain(words),
        )
    return grid


def _facts(found: Row) -> Table:
    price = "" if found["price"] is None else f"{found['price']:,.2f}"
    known = {
        "brand": found["brand"],
        "category": found["category"],
        "parent": found["parent_id"],
        "region": found["region"],
        "price": price,
        **(found["attributes"] or {}),
        "available": "yes" if found["available"] else "no: never recommended",
        "first seen": found["first"] and _day(found["first"]),
        "last changed": _day(found["at"]),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in known.items():
        if value:
            grid.add_row(_plain(name, style="dim"), _plain(value))
    return grid


def _print_photos(tables: Tables, mine: Column, console: Console) -> None:
    """Each photo with the caption that is in force, else with what the latest try came to."""
    photos = {
        row["position"]: row
        for row in tables.read(schemas.PHOTOS).where(mine).drop("image").collect()
    }
    keys = {
        row["position"]: row["caption_key"]
        for row in tables.read(schemas.ITEM_CAPTIONS).where(mine).collect()
    }
    captions = tables.read(schemas.CAPTIONS)
    of_photos = F.col("image_sha256").isin([row["image_sha256"] for row in photos.values()])
    tries = (
        captions.where(of_photos | F.col("caption_key").isin(list(keys.values())))
        .orderBy("captioned_at")
        .collect()
    )
    for position in sorted(photos.keys() | keys.keys()):
        photo = photos.get(position)
        if photo is None:
            label, place = f"Text {position}", "imported, without a photo"
        else:
            label, size = f"Photo {position}", decimal(photo["bytes"])
            place = (
                f"{photo['uri'] or 'from the catalogue'} ({size}, sha256 {photo['image_sha256']})"
            )
        console.print(_line(label, place), soft_wrap=True)
        linked = [each for each in tries if each["caption_key"] == keys.get(position)]
        alike = [each for each in tries if photo and each["image_sha256"] == photo["image_sha256"]]
        for line in _caption((linked or alike)[-1:]):
            console.print(Text("  ").append(line))
    if not photos and not keys:
        console.print("No photo and no caption: its title is compared instead.")


def _caption(made: list[Row]) -> list[Text]:
    if not made:
        return [Text("not captioned", "dim")]
    (row,) = made
    by = "" if row["model"] is None else f" by {row['model']}, prompt {row['prompt_id']}"
    said = row["caption"] if row["caption"] is not None else f"{row['error_class']}, {row['error']}"
    lines = [_line(f"caption {row['status']}{by}", said)]
    if row["attributes"]:
        lines.append(
            _line("attributes in it", ", ".join(f"{k}: {v}" for k, v in row["attributes"].items()))
        )
    return lines


def _print_neighbours(pipeline: Pipeline, item_id: str, console: Console) -> None:
    try:
        # Without checksums: they would read all vectors, and this looks at one.
        searcher = Searcher.open(index_folder(pipeline.context), verify=False)
    except (RunError, OSError) as missing:
        console.print(_line("No neighbours", str(missing)))
        return
    position = searcher.positions([item_id])
    if position[0] < 0:
        console.print(
            _line("No neighbours", f"the index {searcher.index_id} doesn't hold this item.")
        )
        return
    query = np.asarray(searcher.vectors[position])
    # Half of the leaves: one query is cheap, and a person wants the true neighbours.
    effort = Effort(max(1, searcher.manifest["leaves"] // 2), 10 * _NEIGHBOURS)
    found = searcher.search(query, effort) if searcher.approximate else searcher.exact(query)
    itself = flat_exclusions([position], len(searcher))
    top, scores = top_k(*found, itself, np.ones(len(searcher), bool), _NEIGHBOURS)
    near = [
        (str(searcher.ids[at]), score)
        for at, score in zip(top[0], scores[0], strict=True)
        if at >= 0
    ]
    texts = _texts(pipeline.tables, {name for name, _ in near})
    grid = _grid(f"Nearest in index {searcher.index_id}", ("item", "title", "cosine", "caption"))
    for name, score in near:
        title, caption = texts.get(name, ("", ""))
        grid.add_row(_plain(name), _plain(title), f"{score:.3f}", _plain(caption))
    console.print(grid)


def _texts(tables: Tables, item_ids: Collection[str]) -> dict[str, tuple[str, str]]:
    """Title and caption of the main photo of these items; empty where there is none."""
    chosen = F.col("item_id").isin(list(item_ids))
    linked = (
        tables.read(schemas.ITEM_CAPTIONS)
        .where(chosen)
        .groupBy("item_id")
        .agg(F.min_by("caption_key", "position").alias("caption_key"))
    )
    captions = linked.join(
        tables.read(schemas.CAPTIONS).select("caption_key", "caption"), "caption_key", "inner"
    )
    rows = (
        tables.read(schemas.ITEMS)
        .where(chosen)
        .select("item_id", "title")
        .join(captions, "item_id", "left")
    )
    return {row["item_id"]: (row["title"] or "", row["caption"] or "") for row in rows.collect()}


def _first(rows: DataFrame) -> Row | None:
    return next(iter(rows.limit(1).collect()), None)


def _micros(column: str) -> Column:
    # Collecting a timestamp would turn it into this machine's time zone.
    return F.unix_micros(column).alias(column)


def _day(micros: int) -> str:
    return f"{datetime.fromtimestamp(micros / 1e6, UTC):%Y-%m-%d}"


def _grid(title: str, columns: Collection[str]) -> Table:
    """A table whose texts share the width that ids and figures leave, and are cut to it; an id never is."""
    grid = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, expand=True
    )
    shares = {"title": 2, "caption": 4, "shared words": 3}
    for name in columns:
        if name in shares:
            grid.add_column(name, no_wrap=True, overflow="ellipsis", ratio=shares[name])
        else:
            grid.add_column(
                name,
                justify="right" if name in ("weight", "score", "cosine") else "left",
                overflow="fold",
            )
    return grid


def _line(label: str, text: str) -> Text:
    return Text.assemble((_printable(label), "bold"), ": ", _printable(text))


def _plain(text: str, style: str = "") -> Text:
    return Text(_printable(text), style)


def _printable(text: str) -> str:
    """A catalogue's text may hold line ends, and what a terminal takes for commands."""
    return "".join(each if each.isprintable() else " " for each in text)
