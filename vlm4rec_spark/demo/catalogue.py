"""Writes the demo shop as a company would have it: photos, a catalogue, a log by month, with the dirt of real data.

Knows tastes and the look of items; knows no recommender, and isn't tuned to one. The same seed gives the same bytes.
Only `truth.parquet`, which the evaluation's oracle arm reads, says how items look: titles, brands and categories don't.
"""

from __future__ import annotations

import csv
import gzip
import io
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vlm4rec_spark.demo.drawing import ATTRIBUTES, draw

CUT = "2025-05-01"
"""The last month is held out by the demo's time split."""
_START, _END = datetime(2025, 1, 1, tzinfo=UTC), datetime(2025, 6, 1, tzinfo=UTC)
_MATCH = {"kind": 2.0, "colour": 2.5, "pattern": 2.0, "material": 2.0, "style": 1.0}
"""What a match with the user's taste adds to an item's log-odds of being looked at."""
_NOISE = 0.1
"""Share of views of an item picked without regard to taste."""
_CATALOGUE = (
    "item_id",
    "title",
    "brand",
    "category",
    "parent_id",
    "region",
    "price",
    "available",
    "first_seen_at",
)
_LOG = ("user_id", "item_id", "event_type", "event_time")
_VISITOR, _SIGNED_IN_LATE, _SIGNED_IN = "visitor-", 20, datetime(2025, 1, 25, tzinfo=UTC)
"""Each 20th user signed in on this day for the first time and was a visitor before."""


def write(folder: Path, seed: int = 7, items: int = 560, users: int = 2_000) -> None:
    """Write photos/, catalogue.csv, events-YYYY-MM.csv.gz, users.csv, identities.csv and, last, truth.parquet into
    `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "photos").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    truth = pd.DataFrame(
        {
            name: [values[i] for i in rng.integers(len(values), size=items)]
            for name, values in ATTRIBUTES.items()
        }
    )
    truth.insert(
        0, "item_id", [f"SKU-{number:05d}" for number in rng.permutation(90_000)[:items] + 10_000]
    )
    first_seen = _first_seen(items, rng)
    _write_catalogue(folder / "catalogue.csv", truth["item_id"].tolist(), first_seen, rng)
    _write_photos(folder / "photos", truth, seed)
    _write_log(folder, _events(truth, first_seen, users, rng))
    _write_users(folder, users, seed)
    truth.to_parquet(folder / "truth.parquet", index=False)


def _first_seen(items: int, rng: np.random.Generator) -> list[datetime]:
    """Most items were always there; 5 % came in the last month."""
    late = rng.random(items) < 0.05
    return [
        _START + timedelta(days=120 + int(rng.integers(15))) if is_late else _START
        for is_late in late
    ]


def _write_catalogue(
    file: Path, ids: Sequence[str], first_seen: Sequence[datetime], rng: np.random.Generator
) -> None:
    rows = [
        (
            item,
            f"Article {rng.choice(list('KLMNPRST'))}{rng.integers(100, 1000)}-{rng.integers(10, 100)}",
            rng.choice(["Norrvik", "Belmonte", "Aster & Co", "Hollis", "Kintsu"]),
            rng.choice(["new in", "outlet", "best of season", "warehouse"]),
            f"P{rng.integers(5 * len(ids)):04d}",
            rng.choice(["", "", "", "EU", "US"]),
            f"{rng.integers(900, 19_900) / 100:.2f}",
            "false" if rng.random() < 0.02 else "true",
            seen.strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        for item, seen in zip(ids, first_seen, strict=True)
    ]
    bad = [
        ("", "Article without an id", "", "", "", "", "1.00", "true", ""),
        ("SKU-BAD01", "Article with a wrong price", "", "", "", "", "on request", "true", ""),
        ("SKU-BAD02", "Article from a bad date", "", "", "", "", "5.00", "true", "last week"),
    ]
    file.write_text(_csv(_CATALOGUE, [*rows, *bad, rows[3]]), encoding="utf-8")


def _write_users(folder: Path, users: int, seed: int) -> None:
    """A segment and a market of each user, and who the anonymous visitors of the first weeks turned out to be."""
    rng = np.random.default_rng([seed, users])
    rows = [
        (
            f"user-{number:05d}",
            rng.choice(["new", "regular", "club"], p=[0.3, 0.5, 0.2]),
            rng.choice(["EU", "US"]),
            "false" if number % 500 == 77 else rng.choice(["true", ""], p=[0.9, 0.1]),
        )
        for number in range(users)
    ]
    (folder / "users.csv").write_text(
        _csv(("user_id", "segment", "region", "consent"), rows), encoding="utf-8"
    )
    known = [
        (f"{_VISITOR}{number:05d}", f"user-{number:05d}")
        for number in range(0, users, _SIGNED_IN_LATE)
    ]
    (folder / "identities.csv").write_text(
        _csv(("anonymous_id", "user_id"), known), encoding="utf-8"
    )


def _write_photos(folder: Path, truth: pd.DataFrame, seed: int) -> None:
    """A photo per item, a second one for some, and among them what real photo folders hold."""
    for number, row in enumerate(truth.to_dict("records")):
        item = row["item_id"]
        rng = np.random.default_rng([seed, number])
        photo = draw({name: row[name] for name in ATTRIBUTES}, rng)
        oddity = _ODDITIES.get(number)
        if oddity is None:
            photo.save(folder / f"{item}.jpg", quality=90)
        elif oddity == "twin":
            first = truth["item_id"].iloc[0]
            shutil.copyfile(folder / f"{first}.jpg", folder / f"{item}.jpg")
            truth.loc[number, list(ATTRIBUTES)] = truth.loc[0, list(ATTRIBUTES)]
        else:
            name, data = _odd_photo(oddity, photo)
            if data is not None:
                (folder / f"{item}{name}").write_bytes(data)
        if number % 12 == 5 and oddity is None:
            draw({name: row[name] for name in ATTRIBUTES}, rng).save(
                folder / f"{item}.1.jpg", quality=90
            )


_ODDITIES = {
    8: "twin",
    9: "twin",
    10: "corrupt",
    11: "corrupt",
    12: "empty",
    13: "html",
    14: "html",
    15: "none",
    16: "none",
    18: "none",
    19: "cmyk",
    20: "cmyk",
    21: "rgba",
    22: "rgba",
    23: "rotated",
    24: "rotated",
    25: "animated",
    26: "animated",
    27: "webp",
}


def _odd_photo(oddity: str, photo: Image.Image) -> tuple[str, bytes | None]:
    """The photo's file ending and bytes; None for an item without a photo."""
    buffer = io.BytesIO()
    if oddity == "cmyk":
        photo.convert("CMYK").save(buffer, "JPEG", quality=90)
    elif oddity == "rgba":
        photo.convert("RGBA").save(buffer, "PNG")
        return ".png", buffer.getvalue()
    elif oddity == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by 90° clockwise
        photo.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=90, exif=exif)
    elif oddity == "animated":
        photo.save(
            buffer,
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", photo.size, "white")],
            duration=500,
        )
        return ".gif", buffer.getvalue()
    elif oddity == "webp":
        photo.save(buffer, "WEBP", quality=90)
        return ".webp", buffer.getvalue()
    elif oddity == "html":
        return ".jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    elif oddity == "corrupt":
        photo.save(buffer, "JPEG", quality=90)
        return ".jpg", buffer.getvalue()[: buffer.tell() // 2]
    elif oddity == "none":
        return "", None
    return ".jpg", buffer.getvalue()


def _events(
    truth: pd.DataFrame, first_seen: Sequence[datetime], users: int, rng: np.random.Generator
) -> Iterable[tuple[str, str, str, datetime]]:
    """Views, carts and purchases of every user, then the odd ones."""
    codes = np.column_stack(
        [pd.Categorical(truth[name], ATTRIBUTES[name]).codes for name in ATTRIBUTES]
    )
    weights = np.array([_MATCH[name] for name in ATTRIBUTES])
    ids = truth["item_id"].to_numpy()
    popularity = rng.normal(0, 0.5, len(ids))
    untouched = rng.random(len(ids))
    popularity[np.argsort(untouched)[: max(2, int((untouched < 0.04).sum()))]] = -np.inf
    since = np.array([seen.timestamp() for seen in first_seen])
    for number in range(users):
        late = number % _SIGNED_IN_LATE == 0
        tastes = [codes[rng.integers(len(ids))] for _ in range(2 if rng.random() < 0.25 else 1)]
        chances = [_softmax((codes == taste) @ weights + popularity) for taste in tastes]
        anything = _softmax(popularity)
        seconds = np.sort(
            rng.uniform(_START.timestamp(), _END.timestamp(), int(rng.integers(8, 46)))
        )
        for second in seconds:
            chance = anything if rng.random() < _NOISE else chances[rng.integers(len(chances))]
            chance = np.where(since <= second, chance, 0)
            item = ids[rng.choice(len(ids), p=chance / chance.sum())]
            at = datetime.fromtimestamp(int(second), UTC)
            for step, (event, share) in enumerate(
                (("view", 1.0), ("cart", 0.3), ("purchase", 0.5))
            ):
                if rng.random() >= share:
                    break
                name = _VISITOR if late and at < _SIGNED_IN else "user-"
                yield f"{name}{number:05d}", item, event, at + timedelta(minutes=4 * step)
    yield from _odd_events(ids[np.isfinite(popularity)], rng)


def _odd_events(
    ids: np.ndarray, rng: np.random.Generator
) -> Iterable[tuple[str, str, str, datetime]]:
    """A bot, users without a usable history, unknown items, missing ids, repeats, and the future."""
    day = datetime(2025, 3, 10, tzinfo=UTC)
    for second in range(3_000):
        yield "user-bot", ids[rng.integers(len(ids))], "view", day + timedelta(seconds=20 * second)
    yield "user-lost", "SKU-UNKNOWN", "view", day
    yield "user-odd", ids[0], "scroll", day
    for _ in range(40):
        yield f"user-{rng.integers(50):05d}", f"GONE-{rng.integers(9)}", "view", day
    for _ in range(12):
        yield "", ids[rng.integers(len(ids))], "view", day
        yield f"user-{rng.integers(50):05d}", "", "view", day
    for _ in range(25):
        yield "user-00001", ids[1], "view", day
    for _ in range(6):
        yield "user-00002", ids[2], "purchase", datetime(2099, 1, 1, tzinfo=UTC)


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def _write_log(folder: Path, events: Iterable[tuple[str, str, str, datetime]]) -> None:
    months: dict[str, list[tuple[str, str, str, str]]] = {}
    for user, item, event, at in events:
        # The future comes with the last month's file.
        month = min(at, _END - timedelta(days=1)).strftime("%Y-%m")
        months.setdefault(month, []).append((user, item, event, at.strftime("%Y-%m-%dT%H:%M:%SZ")))
    for month, rows in months.items():
        with (
            (folder / f"events-{month}.csv.gz").open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        ):
            packed.write(_csv(_LOG, sorted(rows, key=lambda row: (row[3], row))).encode())


def _csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
