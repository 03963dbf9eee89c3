"""Lists that stand and lists made again equal lists that are all made anew, night after night."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from vlm4rec_spark.models.lists import listed
from vlm4rec_spark.models.offer import Offer
from vlm4rec_spark.models.searcher import Searcher
from vlm4rec_spark.models.standing import changed, marks, stand
from vlm4rec_spark.models.tastes import Histories, Means, Tastes

DIMENSION, USERS, K = 6, 40, 5


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@dataclass
class Item:
    vector: np.ndarray
    text: str
    allowed: int
    parent: int
    brand: int


@dataclass
class Shop:
    """A catalogue that changes, users of fixed taste, and the lists in force."""

    rng: np.random.Generator
    settings: dict
    shape: str
    items: dict[str, Item] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = unit(self.rng.standard_normal((5, DIMENSION)))
        self.queries = unit(self.rng.standard_normal((USERS, DIMENSION)))
        for _ in range(60):
            self.come()
        names = sorted(self.items)
        self.histories = [self.rng.permutation(names)[: self.rng.integers(1, 5)].tolist() for _ in range(USERS)]
        self.rules = self.rng.choice([0, 2], USERS)

    def drawn(self) -> Item:
        vector = unit(self.kinds[self.rng.integers(5)] + 0.4 * self.rng.standard_normal(DIMENSION))
        allowed = 1 if self.rng.random() < 0.5 else 3
        return Item(vector, f"w{self.rng.integers(4)}", allowed, int(self.rng.integers(30)), int(self.rng.integers(4)))

    def come(self) -> None:
        self.items[f"i{self.rng.integers(10**6):06d}"] = self.drawn()

    def change(self) -> None:
        """One of all that may happen to an item."""
        item = self.items[name := str(self.rng.choice(sorted(self.items)))]
        kind = self.rng.integers(6)
        if kind == 0:
            self.come()
        elif kind == 1:
            del self.items[name]
        elif kind == 2:
            self.items[name] = self.drawn()
        elif kind == 3:
            item.allowed = 0 if item.allowed else 3
        elif kind == 4:
            item.parent = int(self.rng.integers(30))
        else:
            item.brand = int(self.rng.integers(4))

    def opened(self, folder: Path) -> tuple[Searcher, Offer, np.ndarray]:
        names = sorted(self.items)
        rows = [self.items[name] for name in names]
        vectors = np.stack([row.vector for row in rows])
        Searcher.build(folder, folder.name, names, vectors, [row.text for row in rows], 2**62)
        parents, brands, allowed = (np.array([getattr(row, name) for row in rows])
                                    for name in ("parent", "brand", "allowed"))  # fmt: skip
        settings = self.settings
        offer = Offer(
            allowed, parents if settings["variants"] else None, [(brands, 3)] if settings["caps"] else [],
            settings["alike"], settings["least"],
        )  # fmt: skip
        searcher = Searcher.open(folder)
        return searcher, offer, marks(searcher, offer, allowed * 10 + brands)

    def asked(self, searcher: Searcher) -> Tastes:
        history = [searcher.positions(names) for names in self.histories]
        known = [mine[mine >= 0] for mine in history]
        if self.shape == "mean":
            return Means(self.queries, known)
        return Histories(known, [(0.9 ** np.arange(len(mine))).astype(np.float32) for mine in known])

    def lists(self, searcher: Searcher, offer: Offer, users: np.ndarray) -> dict[int, tuple]:
        asked = self.asked(searcher).part(users)
        seen = [np.array([at for at in searcher.positions(self.histories[user]) if at >= 0], int) for user in users]
        top, scores, hidden = listed(searcher, asked, seen, offer, self.rules[users], K, None)
        because, _ = asked.reasons(searcher, top)
        names = [None if at < 0 else searcher.ids[at] for at in range(-1, len(searcher))]
        made = {}
        for row, user in enumerate(users.tolist()):
            mine = zip(top[row], scores[row], because[row], strict=True)
            places = [(names[at + 1], score, names[why + 1]) for at, score, why in mine if at >= 0]
            made[user] = places, [(place, names[at + 1]) for who, place, at in hidden.tolist() if who == row]
        return made


PLAIN = {"variants": False, "caps": False, "alike": None, "least": None}


@pytest.mark.parametrize("shape", ["mean", "max_similarity"])
@pytest.mark.parametrize(
    "settings",
    [PLAIN, PLAIN | {"variants": True}, PLAIN | {"caps": True, "variants": True}, PLAIN | {"alike": 0.9},
     {"variants": True, "caps": True, "alike": 0.95, "least": 0.3}],
    ids=["plain", "variants", "caps", "alike", "all"],
)  # fmt: skip
def test_twenty_changes_leave_the_lists_of_a_full_run(tmp_path: Path, settings: dict, shape: str) -> None:
    shop = Shop(np.random.default_rng(len(str(settings)) + len(shape)), settings, shape)
    everybody = np.arange(USERS)
    searcher, offer, before = shop.opened(tmp_path / "0")
    force, stood = shop.lists(searcher, offer, everybody), 0
    for night in range(1, 21):
        shop.change()
        names, (searcher, offer, now) = searcher.ids.tolist(), shop.opened(tmp_path / str(night))
        news, _ = changed(searcher, now, names, before)
        held, last = [], []
        for user in range(USERS):
            places, hidden = force[user]
            history = searcher.positions(shop.histories[user])
            mine = searcher.positions([*(item for item, *_ in places), *(item for _, item in hidden)])
            held.append(np.append(mine, history[history >= 0]))
            last.append(places[-1][1] if len(places) == K else -np.inf)
        # Whose history loses an item has another profile, or gains one that was lost.
        same = [{*mine} & {*names} == {*mine} & shop.items.keys() for mine in shop.histories]
        standing = stand(searcher, shop.asked(searcher), offer, shop.rules, news, held, np.array(last)) & same
        force |= shop.lists(searcher, offer, np.flatnonzero(~standing))
        assert force == shop.lists(searcher, offer, everybody), night
        stood, before = stood + int(standing.sum()), now
    assert stood > USERS * 20 / 3


def test_a_mark_changes_with_what_lists_depend_on_and_with_nothing_else(tmp_path: Path) -> None:
    names, vectors, said = list("abcd"), np.eye(4, dtype=np.float32), np.arange(4)
    variants = np.array([0, 1, 1, 2])

    def made(folder: str, **other: object) -> np.ndarray:
        at = {"ids": names, "vectors": vectors, "texts": ["red", "red shoe", "hat", "cap"]} | other
        Searcher.build(tmp_path / folder, folder, at["ids"], at["vectors"], at["texts"], 99)
        searcher = Searcher.open(tmp_path / folder)
        groups = np.asarray(other.get("groups", variants))
        return marks(searcher, Offer(np.ones(len(groups), int), groups), np.asarray(other.get("said", said)))

    first = made("1")
    assert (made("same", groups=[7, 3, 3, 9]) == first).all()
    assert (made("text", texts=["red", "red shoe", "hat", "coat"]) != first).tolist() == [False, False, False, True]
    assert (made("said", said=[0, 5, 2, 3]) != first).tolist() == [False, True, False, False]
    # c is b's variant no more; b was and is the first of its group.
    assert (made("group", groups=[0, 1, 3, 2]) != first).tolist() == [False, False, True, False]
    other = made("fewer", ids=list("abd"), vectors=vectors[[0, 1, 3]], texts=["red", "red shoe", "cap"],
                 groups=[0, 1, 2], said=[0, 1, 3])  # fmt: skip
    assert other.tolist() == first[[0, 1, 3]].tolist()
    news, gone = changed(Searcher.open(tmp_path / "fewer"), other, names, first)
    assert (news.tolist(), gone) == ([False] * 3, 1)
    news, gone = changed(Searcher.open(tmp_path / "1"), first, ["a", "b", "d"], other)
    assert (news.tolist(), gone) == ([False, False, True, False], 0)
