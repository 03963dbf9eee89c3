"""The caption audit from the tables and by asking again: a captioner that looks at photos, and one that doesn't."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from vlm4rec_spark.caption import plan
from vlm4rec_spark.models.captioning.backends.fake import FakeCaptioner
from vlm4rec_spark.models.captioning.captioner import Request, caption_all
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.pipeline import caption_audit
from vlm4rec_spark.pipeline.context import StageResult
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.pipeline import Pipeline

ITEMS, WRONG, DEADLY = 40, 7, 3
BLIND = "says=A nice thing for every home."
MODEL = f"fake-{BLIND}@1"


def photo(n: int) -> Image.Image:
    """Each of its own colour, with a shadow and white margins. DEADLY turns mostly red where those are cut."""
    look = (40 + n % 4 * 45, 90 + n // 4 % 4 * 45, 100 + n // 16 * 45)
    image = Image.new("RGB", (100, 100), "white")
    image.paste(look, (3, 3, 97, 97))
    image.paste(tuple(shade // 2 for shade in look), (3, 90, 97, 97))
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def green(n: int) -> str:
    """As the fake model says it."""
    return f"green {photo(n).resize((1, 1)).getpixel((0, 0))[1] // 32}"  # type: ignore[index]


def store(run: Pipeline) -> None:
    """The catalogue says of every item how green it is, of one wrongly."""
    now, items, photos = datetime(2025, 1, 1), [], []
    for n in range(ITEMS):
        look = {"green": green(WRONG + 1 if n == WRONG else n), "code": f"K{n}"}
        items.append(
            (
                f"i{n:02d}",
                f"Item {n}",
                None,
                None,
                None,
                None,
                1.0,
                None,
                None,
                look,
                True,
                None,
                now,
            )
        )
        image = png(photo(n))
        photos.append(
            (f"i{n:02d}", 0, None, image, hashlib.sha256(image).hexdigest(), len(image), None, None)
        )
    run.tables.upsert(schemas.ITEMS, run.spark.createDataFrame(items, schemas.ITEMS.schema))
    run.tables.upsert(schemas.PHOTOS, run.spark.createDataFrame(photos, schemas.PHOTOS.schema))


def describe(run: Pipeline, model: str, at: datetime) -> None:
    """What the caption stage would have made of the photos, in a fraction of its time."""
    prompt, settings = load_prompt("describe.1"), run.config.caption
    wish = plan.CaptionSpec(prompt, settings.model.model_id(), settings)
    photos = run.tables.read(schemas.PHOTOS)
    wanted = plan.wanted_captions(photos, photos.limit(0), None, wish).collect()
    requests = [
        Request(row["caption_key"], decode(png(photo(int(row["item_id"][1:]))), 672), prompt.text)
        for row in wanted
    ]
    texts = caption_all(FakeCaptioner(model, 16), requests)
    rows = [
        (
            row["caption_key"],
            row["image_sha256"],
            prompt.prompt_id,
            wish.model_id,
            texts[row["caption_key"]].text,
            None,
            1,
            1,
            "ok",
            None,
            None,
            1,
            at,
            "r",
        )
        for row in wanted
    ]
    run.tables.insert(schemas.CAPTIONS, run.spark.createDataFrame(rows, schemas.CAPTIONS.schema))
    links = [(row["item_id"], row["position"], row["caption_key"]) for row in wanted]
    run.tables.sync(
        schemas.ITEM_CAPTIONS, run.spark.createDataFrame(links, schemas.ITEM_CAPTIONS.schema)
    )


class Audited:
    """What an audit found, by metric, and what it told."""

    def __init__(self, run: Pipeline):
        self.outcome = StageResult("evaluate")
        self.rows = caption_audit.audit(run.context, self.outcome)
        self.values = {row["metric"]: row["value"] for row in self.rows}
        self.told: dict[str, Any] = json.loads(self.outcome.details.get("caption_audit", "{}"))


@pytest.fixture(scope="module")
def audits(
    pipeline: Callable[..., Pipeline], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Audited]:
    """Of no captions, of a captioner that doesn't look, of one that does, and of it where its worker is killed."""
    folder, found = tmp_path_factory.mktemp("audit"), {}
    died = folder / "died"
    died.touch()

    def make(model: str, again: int) -> Pipeline:
        return pipeline(folder, f"caption.model.model={model}", f"evaluate.audit_again={again}")

    run = make(BLIND, 36)
    store(run)
    found["nothing"] = Audited(run)
    describe(run, BLIND, datetime(2025, 1, 1))
    found["blind"] = Audited(run)
    run = make(f"exit:red+die_once={died}", ITEMS)
    describe(run, "", datetime(2025, 1, 2))
    found["seeing"] = Audited(run)
    died.unlink()
    found["killed"] = Audited(run)
    return found


def test_without_captions_nothing_is_said(audits: dict[str, Audited]) -> None:
    assert (audits["nothing"].rows, audits["nothing"].told) == ([], {})


def test_a_captioner_that_does_not_look_is_shown_up(audits: dict[str, Audited]) -> None:
    blind = audits["blind"]
    assert {row["arm"] for row in blind.rows} == {MODEL}
    assert blind.values == {
        "distinct_share": 1 / ITEMS,
        "distinct_share_all": 1 / ITEMS,
        "blank_equal": 1,
        "blank_cosine": pytest.approx(1),
        "pair_cosine": pytest.approx(1),
        "self_rank_1": 0,
        "self_rank_1_chance": 1 / ITEMS,
        "self_rank_10": 0,
        "self_rank_10_chance": 10 / ITEMS,
        "self_median_rank": 20.5,
        "self_median_rank_chance": 20.5,
    }
    (captioner,) = blind.told["captioners"]
    assert captioner["of_nothing"] == "A nice thing for every home."
    assert (captioner["sampled"], captioner["in_force"], captioner["asked"]) == (ITEMS, ITEMS, 36)
    assert [each["rank"] for each in blind.told["examples"]] == [20.5] * 12


def test_a_captioner_that_looks_agrees_with_the_catalogue_and_finds_its_captions_again(
    audits: dict[str, Audited],
) -> None:
    seeing = audits["seeing"]
    assert {(row["split"], row["slice"]) for row in seeing.rows} == {("captions", "all")}
    # No caption names a code, and the catalogue is wrong about one item's green.
    assert [name for name in seeing.values if name.startswith("agreement/")] == ["agreement/green"]
    assert seeing.values["agreement/green"] == (ITEMS - 1) / ITEMS
    assert seeing.values["agreement_shuffled/green"] < 0.5
    assert seeing.values["blank_equal"] <= 1 / ITEMS
    assert seeing.values["self_rank_10"] > 0.7
    assert seeing.values["self_median_rank"] < 6
    # The captions of before are those of the other model.
    assert seeing.values["drift_changed"] == 1
    assert seeing.values["drift_cosine"] < 0.9
    assert seeing.told["captioners"][0]["earlier"] == [f"{MODEL}, describe.1"]
    assert seeing.outcome.device_seconds is not None


def test_a_photo_that_kills_the_model_is_counted_and_not_found(audits: dict[str, Audited]) -> None:
    seeing = audits["seeing"]
    assert seeing.told["captioners"][0]["failures"] == {"model_died": 1}
    worst = seeing.told["examples"][0]
    assert (worst["item_id"], worst["again"], worst["rank"]) == (f"i{DEADLY:02d}", None, ITEMS)
    assert seeing.outcome.complete


def test_a_captioner_that_cant_be_asked_costs_only_its_figures(audits: dict[str, Audited]) -> None:
    killed, seeing = audits["killed"], audits["seeing"]
    assert "Python worker exited unexpectedly" in killed.told["trouble"]
    assert not killed.outcome.complete
    # And the rest is what it was: equal tables give equal figures.
    asked = [name for name in seeing.values if name.startswith(("self", "blank", "pair"))]
    assert asked
    assert killed.rows == [row for row in seeing.rows if row["metric"] not in asked]
    # Where nothing was asked the examples are those that the catalogue contradicts.
    (wrong,) = killed.told["examples"]
    assert (wrong["item_id"], wrong["attribute"], wrong["value"]) == (
        f"i{WRONG:02d}",
        "green",
        green(WRONG + 1),
    )
