"""Night after night: who needs another list gets one, and the table is what a full run would make of it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm4rec_spark import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.pipeline import Pipeline

STAGES = ["ingest", "embed", "index", "profiles", "recommend"]
TEN = datetime(2025, 1, 1, 10)


class Shop:
    """Files of a shop in which things happen at random."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng = folder, np.random.default_rng(7)
        self.items: dict[str, dict[str, object]] = {}
        self.events: list[tuple[str, str, str, str]] = []
        self.denied: list[tuple[str, str]] = [("", "i003"), ("u1", "i004")]
        self.allowed = [("u2", f"i{n:03d}") for n in range(40)]
        for _ in range(50):
            self.come()
        for user in range(30):
            for _ in range(self.rng.integers(1, 6)):
                self.click(f"u{user}")
        self.write()

    def come(self) -> None:
        words = self.rng.choice(["red", "blue", "linen", "silk", "cup", "shoe", "hat", "lamp"], 3, replace=False)
        self.items[f"i{len(self.items):03d}"] = {
            "title": " ".join(words), "brand": f"b{self.rng.integers(5)}", "parent_id": f"p{self.rng.integers(30)}",
            "price": int(self.rng.integers(20)), "available": True,
        }  # fmt: skip

    def click(self, user: str) -> None:
        kind, item = str(self.rng.choice(["view", "purchase"])), str(self.rng.choice(sorted(self.items)))
        at = TEN + timedelta(minutes=len(self.events))
        self.events.append((user, item, kind, at.isoformat() + "Z"))

    def change(self) -> None:
        """One of what happens in a day."""
        item = self.items[str(self.rng.choice(sorted(self.items)))]
        kind = self.rng.integers(6)
        if kind == 0:
            self.come()
        elif kind == 1:
            item["available"] = not item["available"]
        elif kind == 2:
            item["price"] = int(self.rng.integers(20))
        elif kind == 3:
            item["parent_id"] = f"p{self.rng.integers(30)}"
        elif kind == 4:
            self.click(f"u{self.rng.integers(33)}")
        else:
            self.denied.append((f"u{self.rng.integers(30)}", str(self.rng.choice(sorted(self.items)))))

    def write(self) -> None:
        names = ("title", "brand", "parent_id", "price", "available")
        self._csv("items", ("item_id", *names), [(item, *row.values()) for item, row in self.items.items()])
        self._csv("log", ("user_id", "item_id", "event_type", "event_time"), self.events)
        self._csv("deny", ("user_id", "item_id"), self.denied)
        self._csv("allow", ("user_id", "item_id"), self.allowed)
        markets = [(f"u{n}", "EU" if n % 2 else "US", f"s{n % 3}") for n in range(36)]
        self._csv("users", ("user_id", "region", "segment"), markets)

    def _csv(self, name: str, head: tuple[str, ...], rows: list[tuple]) -> None:
        with (self.folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])


def lists(run: Pipeline) -> dict[str, tuple]:
    rows = run.tables.read(schemas.RECOMMENDATIONS).collect()
    return {row["user_id"]: (row["items"], row["k"], row["made_of"]) for row in rows}


def test_twenty_changes_in_two_nights(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Items come, go, change price and parent; events; what is denied: with rules, caps, variants, allow and deny."""
    shop = Shop(tmp_path)
    settings = [
        *(f"ingest.{name}.path=[{tmp_path}/{file}.csv]"
          for name, file in (("items", "items"), ("interactions", "log"), ("users", "users"))),
        f"recommend.deny.path=[{tmp_path}/deny.csv]", f"recommend.allow.path=[{tmp_path}/allow.csv]",
        "recommend.k=5", "representation=title", "recommend.caps={brand: 2}", "recommend.seen_again=[view]",
        "recommend.rules=[{items: price < 18}, {items: price >= 3, users: \"region = 'EU'\"}]",
        "index.rebuild_share=1",
    ]  # fmt: skip
    run = pipeline(tmp_path, *settings)
    first = run.run(STAGES)[-1]
    assert first.details["full"] == "there are no lists yet"
    assert int(first.details["lists_made"]) == first.ok == 36
    made = 0
    for night in range(2):
        before = lists(run)
        for _ in range(10):
            shop.change()
        shop.write()
        last = run.run(STAGES)[-1]
        assert (last.status, last.details["full"]) == ("ok", ""), night
        shutil.copytree(tmp_path / "tables", tmp_path / f"{night}" / "tables")
        full = pipeline(tmp_path / f"{night}", *settings, "recommend.full_days=0")
        assert full.run(["recommend"])[-1].details["full"] == "as every 0 days"
        now, whole = lists(run), lists(full)
        # Popular lists have no made_of: what is popular stays as the last full run has counted it.
        assert {user: row for user, row in now.items() if row[2]} == {
            user: row for user, row in whole.items() if row[2]
        }, night
        assert set(now) == set(whole)
        made += sum(now[user] != before.get(user) for user in now)
        runs = {row["run_id"] for row in run.tables.read(schemas.RECOMMENDATIONS).select("run_id").collect()}
        assert len(runs) > 1  # some lists stand
    assert made > 10
    assert {item["item_id"] for item in now["u2"][0]} <= {item for _, item in shop.allowed}
    assert any(row[2] is None for row in now.values())
    other = pipeline(tmp_path, *settings, "recommend.k=4")
    assert other.run(["recommend"])[-1].details["full"] == "settings have changed or the index was built anew"
    rows = other.tables.read(schemas.RECOMMENDATIONS).limit(20)
    other.tables.replace(schemas.RECOMMENDATIONS, other.tables.staged(schemas.RECOMMENDATIONS, rows))
    again = other.run(["recommend"])[-1]
    assert again.details["full"] == "the lists are not as the last run left them"
    assert again.ok == 36
