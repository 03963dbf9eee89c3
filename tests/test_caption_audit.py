"""The caption audit of a captioner that looks at photos, and of one that doesn't."""

from datetime import datetime
from typing import Any

import pytest
from hostile_photos import encoded
from PIL import Image
from shop import MakePipeline, item_row, photo_row, upsert

from vlm4rec_spark.caption import plan
from vlm4rec_spark.models.captioning.backends.fake import FakeCaptioner
from vlm4rec_spark.models.captioning.captioner import Request, caption_all
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.pipeline import Pipeline, caption_audit
from vlm4rec_spark.pipeline.context import StageResult
from vlm4rec_spark.storage import schemas

ITEMS = 40
WRONG = 7
"""The item whose colour the catalogue has wrong."""
DEADLY = 3
"""The item whose perturbed photo kills the model."""
BLIND = "says=A nice thing for every home."
MODEL = f"fake-{BLIND}@1"


def photo(n: int) -> Image.Image:
    """Of its own colour, with a shadow and white margins. Without these, DEADLY is mostly red."""
    colour = (40 + n % 4 * 45, 90 + n // 4 % 4 * 45, 100 + n // 16 * 45)
    image = Image.new("RGB", (100, 100), "white")
    image.paste(colour, (3, 3, 97, 97))
    image.paste(tuple(shade // 2 for shade in colour), (3, 90, 97, 97))
    return image


def green(n: int) -> str:
    """As the fake model says it."""
    return f"green {photo(n).resize((1, 1)).getpixel((0, 0))[1] // 32}"  # type: ignore[index]


def store(run: Pipeline) -> None:
    """The catalogue has every item's share of green, and a wrong one for one item."""
    items = []
    photos = []
    for n in range(ITEMS):
        item = f"i{n:02d}"
        attributes = {"green": green(WRONG + 1 if n == WRONG else n), "code": f"K{n}"}
        items.append(item_row(item, title=f"Item {n}", price=1.0, attributes=attributes))
        photos.append(photo_row(item, encoded(photo(n), "PNG")))
    upsert(run, schemas.ITEMS, items)
    upsert(run, schemas.PHOTOS, photos)


def describe(run: Pipeline, model: str, at: datetime) -> None:
    """Captions as the caption stage would make them, in a fraction of its time."""
    prompt = load_prompt("describe.1")
    settings = run.config.caption
    spec = plan.CaptionSpec(prompt, settings.model.model_id(), settings)
    photos = run.tables.read(schemas.PHOTOS)
    wanted = plan.wanted_captions(photos, photos.limit(0), None, spec).collect()
    requests = [
        Request(
            row["caption_key"],
            decode(encoded(photo(int(row["item_id"][1:])), "PNG"), 672),
            prompt.text,
        )
        for row in wanted
    ]
    texts = caption_all(FakeCaptioner(model, 16), requests)
    rest = (None, 1, 1, "ok", None, None, 1, at, "r")
    rows = []
    for row in wanted:
        text = texts[row["caption_key"]].text
        photo_and_model = (row["image_sha256"], prompt.prompt_id, spec.model_id)
        rows.append((row["caption_key"], *photo_and_model, text, *rest))
    upsert(run, schemas.CAPTIONS, rows)
    links = [(row["item_id"], row["position"], row["caption_key"]) for row in wanted]
    run.tables.sync(
        schemas.ITEM_CAPTIONS, run.spark.createDataFrame(links, schemas.ITEM_CAPTIONS.schema)
    )


class Audited:
    """An audit's figures by metric, and the details for the report."""

    def __init__(self, run: Pipeline):
        self.result = StageResult("evaluate")
        self.rows, audit = caption_audit.audit(run.context, self.result)
        self.values = {row["metric"]: row["value"] for row in self.rows}
        self.details: dict[str, Any] = audit or {}


@pytest.fixture(scope="module")
def audits(pipeline: MakePipeline, tmp_path_factory) -> dict[str, Audited]:
    """Without captions, and of captioners: blind, seeing, and seeing with a killed worker."""
    folder = tmp_path_factory.mktemp("audit")
    by_name = {}
    died = folder / "died"
    died.touch()

    def make(model: str, photos: int) -> Pipeline:
        return pipeline(folder, f"caption.model.model={model}", f"evaluate.audit_again={photos}")

    run = make(BLIND, 36)
    store(run)
    by_name["nothing"] = Audited(run)
    describe(run, BLIND, datetime(2025, 1, 1))
    by_name["blind"] = Audited(run)
    run = make(f"exit:red+die_once={died}", ITEMS)
    describe(run, "", datetime(2025, 1, 2))
    by_name["seeing"] = Audited(run)
    died.unlink()
    by_name["killed"] = Audited(run)
    return by_name


def test_without_captions_there_is_no_audit(audits: dict[str, Audited]):
    assert (audits["nothing"].rows, audits["nothing"].details) == ([], {})


def test_a_captioner_that_does_not_look_has_the_figures_of_chance(
    audits: dict[str, Audited],
):
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
    (captioner,) = blind.details["captioners"]
    assert captioner["blank_caption"] == "A nice thing for every home."
    assert (captioner["sampled"], captioner["captions"], captioner["recaptioned"]) == (
        ITEMS,
        ITEMS,
        36,
    )
    assert [example["rank"] for example in blind.details["examples"]] == [20.5] * 12


def test_a_captioner_that_looks_agrees_with_the_catalogue_and_finds_its_captions_again(
    audits: dict[str, Audited],
):
    seeing = audits["seeing"]
    assert {(row["split"], row["slice"]) for row in seeing.rows} == {("captions", "all")}
    # No caption names a code, and the catalogue is wrong about one item's green.
    assert [name for name in seeing.values if name.startswith("agreement/")] == ["agreement/green"]
    assert seeing.values["agreement/green"] == (ITEMS - 1) / ITEMS
    assert seeing.values["agreement_shuffled/green"] < 0.5
    assert seeing.values["blank_equal"] <= 1 / ITEMS
    assert seeing.values["self_rank_10"] > 0.7
    assert seeing.values["self_median_rank"] < 6
    # The earlier captions are those of the other model.
    assert seeing.values["drift_changed"] == 1
    assert seeing.values["drift_cosine"] < 0.9
    assert seeing.details["captioners"][0]["earlier"] == [f"{MODEL}, describe.1"]
    assert seeing.result.device_seconds is not None


def test_a_photo_that_kills_the_model_is_counted_and_not_found(audits: dict[str, Audited]):
    seeing = audits["seeing"]
    assert seeing.details["captioners"][0]["failures"] == {"model_died": 1}
    worst = seeing.details["examples"][0]
    assert (worst["item_id"], worst["second_caption"], worst["rank"]) == (
        f"i{DEADLY:02d}",
        None,
        ITEMS,
    )
    assert seeing.result.complete


def test_a_captioner_that_fails_costs_only_its_figures(audits: dict[str, Audited]):
    killed = audits["killed"]
    seeing = audits["seeing"]
    assert "Python worker exited unexpectedly" in killed.details["trouble"]
    assert not killed.result.complete
    # The rest stays: equal tables give equal figures.
    by_recaptions = [n for n in seeing.values if n.startswith(("self", "blank", "pair"))]
    assert by_recaptions
    assert killed.rows == [row for row in seeing.rows if row["metric"] not in by_recaptions]
    # Without new captions the examples are those that the catalogue contradicts.
    (wrong,) = killed.details["examples"]
    assert wrong["item_id"] == f"i{WRONG:02d}"
    assert (wrong["attribute"], wrong["value"]) == ("green", green(WRONG + 1))
