"""The caption plan on literal rows: why a photo is captioned, in which order, and the cost."""

from collections.abc import Callable

import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from shop import log

from vlm4rec_spark.caption import plan
from vlm4rec_spark.caption.estimate import CaptionPlan, Rates, estimate
from vlm4rec_spark.caption.plan import CaptionSpec
from vlm4rec_spark.caption.settings import Budget, CaptionSettings, Prices
from vlm4rec_spark.models.captioning.prompts import Prompt, load_prompt

DESCRIBE = load_prompt("describe.1")
SHORT = Prompt("short.9", "Say it in one word.")
TITLED = Prompt("titled.9", "{title}: what is it?")
RATES = Rates(1.0, 10, 1, "assumed", "assumed")

PHOTO = "item_id STRING, position INT, image_sha256 STRING"
CAPTION = (
    "caption_key STRING, image_sha256 STRING, prompt_id STRING, model STRING, status STRING, "
    "error_class STRING, attempts INT"
)
LINK = "item_id STRING, position INT, caption_key STRING"


def spec_of(
    prompt: Prompt = DESCRIBE,
    model_id: str = "m@1",
    **settings: object,
) -> CaptionSpec:
    retry = settings.pop("retry", None)
    return CaptionSpec(prompt, model_id, CaptionSettings.model_validate(settings), retry)  # type: ignore[arg-type]


class CaptionedPhotos:
    """Photos by item, and the captions that an earlier spec made of those in `described`.

    A value of `described` is the photo that the item had then.
    """

    def __init__(
        self,
        spark: SparkSession,
        photos: dict[str, str],
        described: dict[str, str],
        made_with: CaptionSpec,
        titles: dict[str, str] | None = None,
    ):
        self.spark = spark
        self.photos = self._photos(photos)
        self.imported = spark.createDataFrame([], LINK)
        old = self._wanted(self._photos(described), made_with, titles).collect()
        self.links = spark.createDataFrame(
            [(row["item_id"], row["position"], row["caption_key"]) for row in old], LINK
        )
        by_key = {row["caption_key"]: row["image_sha256"] for row in old}
        made = (made_with.prompt.prompt_id, made_with.model_id, "ok", None, 1)
        self.captions = spark.createDataFrame(
            [(key, photo, *made) for key, photo in by_key.items()], CAPTION
        )

    def _photos(self, photos: dict[str, str]) -> DataFrame:
        rows = [(item, 0, photo) for item, photo in photos.items()]
        return self.spark.createDataFrame(rows, PHOTO)

    def _wanted(
        self, photos: DataFrame, spec: CaptionSpec, titles: dict[str, str] | None
    ) -> DataFrame:
        items = None
        if titles is not None:
            items = self.spark.createDataFrame(list(titles.items()), "item_id STRING, title STRING")
        return plan.wanted_captions(photos, self.imported, items, spec)

    def planned(
        self,
        spec: CaptionSpec,
        titles: dict[str, str] | None = None,
    ) -> DataFrame:
        """The photos with their reasons."""
        current = plan.current_captions(self.links, self.captions)
        wanted = self._wanted(self.photos, spec, titles)
        return plan.with_reason(wanted, self.captions, current, spec)

    def reasons(
        self,
        spec: CaptionSpec,
        titles: dict[str, str] | None = None,
    ) -> dict[str, str]:
        return {row["item_id"]: row["reason"] for row in self.planned(spec, titles).collect()}

    def add_failures(
        self,
        spec: CaptionSpec,
        failures: dict[str, tuple[str, str, int]],
    ) -> None:
        """Failed captions of these items: status, error class and attempts."""
        wanted = {row["item_id"]: row for row in self._wanted(self.photos, spec, None).collect()}
        made = (spec.prompt.prompt_id, spec.model_id)
        rows = [
            (wanted[item]["caption_key"], wanted[item]["image_sha256"], *made, *failure)
            for item, failure in failures.items()
        ]
        self.captions = self.captions.union(self.spark.createDataFrame(rows, CAPTION))

    def links_after(self, spec: CaptionSpec) -> dict[str, str]:
        """The key of each item's caption in force after a run that captioned nothing."""
        rows = plan.item_captions(self.planned(spec), self.captions, self.imported).collect()
        return {row["item_id"]: row["caption_key"] for row in rows}


@pytest.fixture
def captioned(spark: SparkSession) -> CaptionedPhotos:
    """a and its twin share a photo. b has another photo than when it was captioned, c is new."""
    photos = {"a": "A", "twin": "A", "b": "B2", "c": "C"}
    return CaptionedPhotos(spark, photos, {"a": "A", "twin": "A", "b": "B1"}, spec_of())


def test_the_first_photos_of_an_item_are_described(spark: SparkSession):
    photos = spark.createDataFrame([("a", position, "A") for position in (7, 1, 4)], PHOTO)
    imported = spark.createDataFrame([], LINK)
    wanted = plan.wanted_captions(photos, imported, None, spec_of(photos_per_item=2))
    assert {row["position"] for row in wanted.collect()} == {1, 4}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(), "reused"),
        (spec_of(SHORT), "prompt_changed"),
        (spec_of(model_id="m@2"), "model_changed"),
        (spec_of(SHORT, model_id="m@2"), "model_changed"),
        (spec_of(model={"max_new_tokens": 9}), "settings_changed"),
        (spec_of(model={"max_side": 99}), "settings_changed"),
        (spec_of(SHORT, on_change="keep"), "kept"),
        (spec_of(batch_size=3), "reused"),
    ],
)
def test_a_photo_is_captioned_anew_for_what_changes_the_text(
    captioned: CaptionedPhotos, spec: CaptionSpec, reason: str
):
    expected = {"a": reason, "twin": reason, "b": "photo_changed", "c": "new"}
    assert captioned.reasons(spec) == expected


@pytest.mark.parametrize(
    ("spec", "again"),
    [
        (spec_of(max_attempts=2), {"died"}),
        (spec_of(max_attempts=3), {"died", "often"}),
        (spec_of(retry="refusal"), {"refused"}),
        (spec_of(retry=""), {"died", "often", "refused", "page"}),
    ],
)
def test_failures_of_the_model_are_tried_again_and_a_bad_photo_is_not(
    spark: SparkSession, spec: CaptionSpec, again: set[str]
):
    failures = {
        "died": ("failed", "model_died", 1),
        "often": ("failed", "model_hung", 2),
        "refused": ("rejected", "refusal", 1),
        "page": ("failed", "html_page", 1),
    }
    photos = {"good": "G"} | {item: item for item in failures}
    captioned = CaptionedPhotos(spark, photos, {"good": "G"}, spec_of())
    captioned.add_failures(spec, failures)
    reasons = captioned.reasons(spec)
    assert reasons.pop("good") == "reused"
    assert reasons == {item: "retry" if item in again else "given_up" for item in failures}


def test_a_caption_stays_in_force_while_its_photo_is_the_same(captioned: CaptionedPhotos):
    old = {row["item_id"]: row["caption_key"] for row in captioned.links.collect()}
    # b has another photo now: its old caption goes, though there is no new one.
    expected = {"a": old["a"], "twin": old["twin"]}
    assert captioned.links_after(spec_of(SHORT)) == expected
    assert captioned.links_after(spec_of(SHORT, on_change="keep")) == expected
    assert captioned.links_after(spec_of()) == expected


def test_a_prompt_with_a_title_asks_again_only_where_the_title_has_changed(spark: SparkSession):
    spec = spec_of(TITLED)
    photos = {"a": "A", "twin": "A", "b": "B"}
    titles = {"a": "Lamp", "twin": "Chair", "b": "Lamp"}
    captioned = CaptionedPhotos(spark, photos, photos, spec, titles)
    # The same photo under two titles is two questions.
    assert captioned.captions.count() == 3
    assert set(captioned.reasons(spec, titles).values()) == {"reused"}
    expected = {"a": "reused", "twin": "reused", "b": "prompt_changed"}
    assert captioned.reasons(spec, titles | {"b": "Another"}) == expected


def test_an_imported_caption_leaves_nothing_to_ask(captioned: CaptionedPhotos):
    captioned.captions = captioned.captions.union(
        captioned.spark.createDataFrame([("k", None, None, None, "imported", None, 1)], CAPTION)
    )
    links = captioned.spark.createDataFrame([("c", 0, "k")], LINK)
    captioned.imported = plan.imported_captions(captioned.links.union(links), captioned.captions)
    assert set(captioned.reasons(spec_of())) == {"a", "twin", "b"}
    assert captioned.links_after(spec_of())["c"] == "k"


@pytest.fixture
def rated(spark: SparkSession) -> Callable[[Budget], tuple[list[Row], CaptionPlan]]:
    """The queue of five new photos with two twins among them, and its plan, for a budget."""
    photos = {"dull": "D", "hot": "H", "warm": "W", "twin": "W", "bare": "R"}
    events = {"hot": 5, "warm": 2, "twin": 2, "dull": 3}
    views = [(f"u{n}", item, "view", "2025-01-01") for item in events for n in range(events[item])]
    captioned = CaptionedPhotos(spark, photos, {}, spec_of())

    def plan_for(budget: Budget) -> tuple[list[Row], CaptionPlan]:
        rows = captioned.planned(spec_of())
        queue = plan.queue(rows, log(spark, views)).orderBy("rank").collect()
        prices = Prices(million_input_tokens=1e5)
        reasons = {"new": rows.count()}
        return queue, estimate(reasons, {"new": len(queue)}, RATES, budget, prices)

    return plan_for


def test_contents_with_the_most_events_come_first(rated: Callable):
    queue, _ = rated(Budget())
    # Warm and its twin have four events together.
    assert [row["item_id"] for row in queue] == ["hot", "twin", "dull", "bare"]
    assert [row["rank"] for row in queue] == [0, 1, 2, 3]


def test_a_plan_counts_duplicates_and_what_the_budget_buys(rated: Callable):
    _, whole = rated(Budget())
    assert (whole.wanted, whole.duplicates, whole.to_caption, whole.now) == (5, 1, 4, 4)
    _, two = rated(Budget(photos=2))
    assert (two.to_caption, two.now, two.input_tokens) == (4, 2, 20)
    # At 0.1 a token, a photo of 10 tokens costs 1.
    _, paid = rated(Budget(money=3.5))
    assert (paid.now, paid.cost) == (3, pytest.approx(3))


def test_every_wanted_photo_is_counted_once():
    photos = {"reused": 1, "kept": 2, "given_up": 3, "new": 4, "retry": 5}
    planned = estimate(photos, {"new": 3, "retry": 5}, RATES, Budget(), Prices())
    assert (planned.reused, planned.kept, planned.given_up, planned.duplicates) == (1, 2, 3, 1)
    assert (planned.wanted, planned.to_caption) == (15, 8)
    assert planned.reasons == {"new": 3, "retry": 5}
