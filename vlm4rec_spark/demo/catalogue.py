"""Writes the demo shop: photos, a catalogue and a log by month, with the errors of real data.

Knows tastes and the look of items; knows no recommender, and isn't tuned to one. The same seed
gives the same bytes. Only `truth.parquet` says how items look; titles, brands and categories don't.
The evaluation's oracle arm reads it.
"""

import gzip
import os
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray
from PIL import Image

from vlm4rec_spark.demo.drawing import ATTRIBUTES, draw

CUT = "2025-05-01"
"""The last month is held out by the demo's time split."""
_START = datetime(2025, 1, 1, tzinfo=UTC)
_END = datetime(2025, 6, 1, tzinfo=UTC)
_MATCH = {"kind": 2.0, "colour": 2.5, "pattern": 2.0, "material": 2.0, "style": 1.0}
"""What a match with the user's taste adds to an item's log-odds of being looked at."""
_NOISE = 0.1
"""Share of views of an item picked without regard to taste."""
_TWINS = (8, 9)
"""Items with the look and the photo of the first."""
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
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_VISITOR = "visitor-"
_VISITOR_SHARE = 20
_FIRST_SIGN_IN = datetime(2025, 1, 25, tzinfo=UTC)
"""Each 20th user signed in on this day for the first time and was a visitor before."""


class _Event(NamedTuple):
    user_id: str
    item_id: str
    event_type: str
    event_time: datetime


def write(
    folder: Path,
    seed: int = 7,
    items: int = 560,
    users: int = 2_000,
) -> None:
    """Write the shop into `folder`, which is emptied first.

    It has photos/, catalogue.csv, events-YYYY-MM.csv.gz, users.csv, identities.csv and, written
    last, truth.parquet.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "photos").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    looks = {name: rng.choice(values, items) for name, values in ATTRIBUTES.items()}
    truth = pd.DataFrame(looks)
    numbers = rng.permutation(90_000)[:items] + 10_000
    truth.insert(0, "item_id", [f"SKU-{number:05d}" for number in numbers])
    first_seen = _first_seen(items, rng)
    _write_catalogue(folder / "catalogue.csv", truth["item_id"].tolist(), first_seen, rng)
    _write_photos(folder / "photos", truth, seed)
    shoppers = _Shoppers(truth, first_seen, rng)
    events = [event for number in range(users) for event in shoppers.events(number)]
    events += _odd_events(shoppers.viewed_items(), rng)
    _write_log(folder, events)
    _write_users(folder, users, seed)
    truth.to_parquet(folder / "truth.parquet", index=False)


def settings(folder: Path) -> list[str]:
    """Configuration, as `--set` takes it, that reads the shop in `folder`."""
    return [
        f"ingest.items.path=['{folder}/catalogue.csv']",
        f"ingest.interactions.path=['{folder}/events-*.csv.gz']",
        f"ingest.users.path=['{folder}/users.csv']",
        f"ingest.identities.path=['{folder}/identities.csv']",
        f"ingest.photos.folder={folder}/photos",
        f"evaluate.cut={CUT}",
    ]


def _first_seen(items: int, rng: np.random.Generator) -> list[datetime]:
    """Most items were always there; 5 % came in the last month."""
    is_late = rng.random(items) < 0.05
    return [
        _START + timedelta(days=120 + int(rng.integers(15))) if late else _START for late in is_late
    ]


def _write_catalogue(
    file: Path,
    ids: Sequence[str],
    first_seen: Sequence[datetime],
    rng: np.random.Generator,
) -> None:
    rows = [
        (
            item,
            _title(rng),
            rng.choice(["Norrvik", "Belmonte", "Aster & Co", "Hollis", "Kintsu"]),
            rng.choice(["new in", "outlet", "best of season", "warehouse"]),
            f"P{rng.integers(5 * len(ids)):04d}",
            rng.choice(["", "", "", "EU", "US"]),
            f"{rng.integers(900, 19_900) / 100:.2f}",
            "false" if rng.random() < 0.02 else "true",
            seen.strftime(_TIME),
        )
        for item, seen in zip(ids, first_seen, strict=True)
    ]
    bad = [
        ("", "Article without an id", "", "", "", "", "1.00", "true", ""),
        ("SKU-BAD01", "Article with a wrong price", "", "", "", "", "on request", "true", ""),
        ("SKU-BAD02", "Article from a bad date", "", "", "", "", "5.00", "true", "last week"),
    ]
    _write_csv(file, _CATALOGUE, [*rows, *bad, rows[3]])


def _title(rng: np.random.Generator) -> str:
    letter = rng.choice(list("KLMNPRST"))
    return f"Article {letter}{rng.integers(100, 1000)}-{rng.integers(10, 100)}"


def _write_users(
    folder: Path,
    users: int,
    seed: int,
) -> None:
    """Every user's segment and market, and the user ids of the first weeks' visitors."""
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
    _write_csv(folder / "users.csv", ("user_id", "segment", "region", "consent"), rows)
    identities = [
        (f"{_VISITOR}{number:05d}", f"user-{number:05d}")
        for number in range(0, users, _VISITOR_SHARE)
    ]
    _write_csv(folder / "identities.csv", ("anonymous_id", "user_id"), identities)


def _write_csv(
    file: Path,
    columns: Sequence[str],
    rows: Sequence[tuple[str, ...]],
) -> None:
    pd.DataFrame(rows, columns=columns).to_csv(file, index=False, lineterminator="\n")


def _write_photos(
    folder: Path,
    truth: pd.DataFrame,
    seed: int,
) -> None:
    """A photo per item, a second one for some, and the odd files of real photo folders."""
    for number, look in enumerate(truth.to_dict("records")):
        item = look["item_id"]
        rng = np.random.default_rng([seed, number])
        photo = draw(look, rng)
        jpeg = folder / f"{item}.jpg"
        if number in _TWINS:
            shutil.copyfile(folder / f"{truth['item_id'].iloc[0]}.jpg", jpeg)
            truth.loc[number, list(ATTRIBUTES)] = truth.loc[0, list(ATTRIBUTES)]
        else:
            _write_photo(number, photo, jpeg)
        if number % 12 == 5:
            draw(look, rng).save(folder / f"{item}.1.jpg", quality=90)


def _write_photo(
    number: int,
    photo: Image.Image,
    jpeg: Path,
) -> None:
    match number:
        case 10 | 11:  # damaged
            photo.save(jpeg, quality=90)
            os.truncate(jpeg, jpeg.stat().st_size // 2)
        case 12:
            jpeg.touch()
        case 13 | 14:
            jpeg.write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
        case 15 | 16 | 18:
            pass  # an item without a photo
        case 19 | 20:
            photo.convert("CMYK").save(jpeg, quality=90)
        case 21 | 22:
            photo.convert("RGBA").save(jpeg.with_suffix(".png"))
        case 23 | 24:
            exif = Image.Exif()
            exif[0x0112] = 6  # shown turned by 90° clockwise
            photo.transpose(Image.Transpose.ROTATE_90).save(jpeg, quality=90, exif=exif)
        case 25 | 26:
            frames = [Image.new("RGB", photo.size, "white")]
            gif = jpeg.with_suffix(".gif")
            photo.save(gif, save_all=True, append_images=frames, duration=500)
        case 27:
            photo.save(jpeg.with_suffix(".webp"), quality=90)
        case _:
            photo.save(jpeg, quality=90)


class _Shoppers:
    """Users who look for what is like an item of their taste. Some items nobody views."""

    def __init__(
        self,
        truth: pd.DataFrame,
        first_seen: Sequence[datetime],
        rng: np.random.Generator,
    ):
        codes = [pd.Categorical(truth[name], ATTRIBUTES[name]).codes for name in ATTRIBUTES]
        self._rng = rng
        self._codes = np.column_stack(codes)
        self._weights = np.array([_MATCH[name] for name in ATTRIBUTES])
        self._ids = truth["item_id"].to_numpy()
        self._popularity = rng.normal(0, 0.5, len(self._ids))
        untouched = rng.random(len(self._ids))
        count = max(2, int((untouched < 0.04).sum()))
        self._popularity[np.argsort(untouched)[:count]] = -np.inf
        self._first_seen = np.array([seen.timestamp() for seen in first_seen])

    def viewed_items(self) -> ndarray:
        return self._ids[np.isfinite(self._popularity)]

    def events(self, number: int) -> Iterable[_Event]:
        rng = self._rng
        taste_count = 2 if rng.random() < 0.25 else 1
        tastes = [self._codes[rng.integers(len(self._ids))] for _ in range(taste_count)]
        by_taste = [self._chances(taste) for taste in tastes]
        by_popularity = _softmax(self._popularity)
        views = int(rng.integers(8, 46))
        for second in np.sort(rng.uniform(_START.timestamp(), _END.timestamp(), views)):
            if rng.random() < _NOISE:
                chances = by_popularity
            else:
                chances = by_taste[rng.integers(len(by_taste))]
            available = np.where(self._first_seen <= second, chances, 0)
            item = self._ids[rng.choice(len(self._ids), p=available / available.sum())]
            yield from self._visit(number, item, datetime.fromtimestamp(int(second), UTC))

    def _chances(self, taste: ndarray) -> ndarray:
        """Of every item, that a user of this taste views it."""
        return _softmax((self._codes == taste) @ self._weights + self._popularity)

    def _visit(
        self,
        number: int,
        item: str,
        at: datetime,
    ) -> Iterable[_Event]:
        """A view, some carts after it, and some purchases after these."""
        is_visitor = number % _VISITOR_SHARE == 0 and at < _FIRST_SIGN_IN
        user = f"{_VISITOR if is_visitor else 'user-'}{number:05d}"
        for event_type, share in {"view": 1.0, "cart": 0.3, "purchase": 0.5}.items():
            if self._rng.random() >= share:
                return
            yield _Event(user, item, event_type, at)
            at += timedelta(minutes=4)


def _odd_events(viewed_ids: ndarray, rng: np.random.Generator) -> Iterable[_Event]:
    """A bot, users without a usable history, unknown items, missing ids, repeats, the future."""
    day = datetime(2025, 3, 10, tzinfo=UTC)
    for number, item in enumerate(viewed_ids[rng.integers(len(viewed_ids), size=3_000)]):
        yield _Event("user-bot", item, "view", day + timedelta(seconds=20 * number))
    yield _Event("user-lost", "SKU-UNKNOWN", "view", day)
    yield _Event("user-odd", viewed_ids[0], "scroll", day)
    for _ in range(40):
        yield _Event(f"user-{rng.integers(50):05d}", f"GONE-{rng.integers(9)}", "view", day)
    for _ in range(12):
        yield _Event("", viewed_ids[rng.integers(len(viewed_ids))], "view", day)
        yield _Event(f"user-{rng.integers(50):05d}", "", "view", day)
    yield from [_Event("user-00001", viewed_ids[1], "view", day)] * 25
    future = datetime(2099, 1, 1, tzinfo=UTC)
    yield from [_Event("user-00002", viewed_ids[2], "purchase", future)] * 6


def _softmax(logits: ndarray) -> ndarray:
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def _write_log(folder: Path, events: Iterable[_Event]) -> None:
    log = pd.DataFrame(events).sort_values(["event_time", "user_id", "item_id", "event_type"])
    # The future comes with the last month's file.
    months = log["event_time"].clip(upper=pd.Timestamp(CUT, tz=UTC)).dt.strftime("%Y-%m")
    for month, rows in log.groupby(months):
        with (
            (folder / f"events-{month}.csv.gz").open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        ):
            text = rows.to_csv(index=False, date_format=_TIME, lineterminator="\n")
            packed.write(text.encode())
