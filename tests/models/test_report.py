"""The report's page from literal values: what it shows, and that nothing in the data breaks out
of it."""

import io
import re
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import cache

import pytest
from hostile_photos import encoded
from PIL import Image

from vlm4rec_spark.models.photos.photo_errors import PhotoError
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.caption_audit_section import audits
from vlm4rec_spark.report.data import (
    AuditExample,
    CaptionFailure,
    CaptionSummary,
    MetricRow,
    PhotoCard,
    PhotoSummary,
    RecommendedItem,
    Rejection,
    ReportData,
    SourceSummary,
    StageRun,
    UserCard,
)
from vlm4rec_spark.report.data_quality import DataIssue, data_issues
from vlm4rec_spark.report.metrics_section import headline, splits
from vlm4rec_spark.report.page import render
from vlm4rec_spark.storage.state import CalibrationState, TriedEffort

AT = datetime(2026, 11, 24, 9, 12, tzinfo=UTC)
PIXEL = "data:image/jpeg;base64,/9j/4AAQSkZJRg=="
HOSTILE = "<script>alert('title')</script>"
HOSTILE_PHOTO = PhotoCard(
    "A-1", HOSTILE, PIXEL, caption="a red mug <script>alert('caption')</script> & more"
)
STRUCTURED_PHOTO = PhotoCard(
    "A-2", "Mug 2", PIXEL, caption="mug, red.", attributes={"kind": "mug", "colour": "<b>red"}
)
BROKEN_PHOTO = PhotoCard("B-2", '" onerror="alert(1)', None, "truncated")


def a_run(stage: str, **details: str) -> StageRun:
    return StageRun(
        stage,
        "r1",
        AT,
        75.0,
        rows_in=10,
        rows_ok=7,
        rows_failed=1,
        rows_skipped=2,
        versions={"items": 3},
        details=details,
    )


def recall(
    arm: str, value: float | None, low: float | None, high: float | None, slice: str = "all"
) -> MetricRow:
    return MetricRow(
        "time",
        arm,
        "recall",
        10,
        slice,
        value,
        low,
        high,
        users=25 if value is None else 1411,
        control="" if arm == "popularity" else "popularity",
        p_value=None if arm == "popularity" else 0.0002,
    )


def all_runs() -> tuple[StageRun, ...]:
    return (
        a_run("ingest", unknown_item_events="41", items_without_photo="5", untouched_items="14"),
        a_run(
            "caption",
            model="llava@1",
            prompt_id="describe.1",
            photos_per_second="2.45",
            reused="3",
        ),
        a_run(
            "embed",
            encoder_id="minilm@1",
            **{"identical_vectors.caption": "2"},
            fallback="6",
            **{"text_problems.scripts": "3", "text_problems.too_long": "8"},
        ),
        a_run(
            "index",
            items="1234",
            dimension="384",
            approximate="true",
            bytes="231004",
            index_id="abc",
        ),
        a_run(
            "profiles",
            representation="caption",
            bot_users="1",
            bot_events="5400",
            users_without_history="2",
        ),
        a_run(
            "recommend",
            k="10",
            search="ScaNN",
            recall_promised="0.95",
            recall_measured="0.983",
        ),
        a_run("evaluate"),
    )


def some_captions() -> CaptionSummary:
    return CaptionSummary(
        {"ok": 3, "failed": 1},
        {"truncated": 1},
        samples=(HOSTILE_PHOTO, STRUCTURED_PHOTO),
        failures=(CaptionFailure(BROKEN_PHOTO, "truncated", "ends <early>"),),
        model_run=a_run("caption"),
        attributes={"kind": (("mug", 3), ("<script>alert(3)</script>" * 3, 1))},
    )


def a_user() -> UserCard:
    variants = (BROKEN_PHOTO,) * 5
    item = RecommendedItem(HOSTILE_PHOTO, 0.87, BROKEN_PHOTO, ("red", "<i>"), variants)
    return UserCard("u<1>", 9, 18, (HOSTILE_PHOTO, BROKEN_PHOTO), (item,))


FACTS = {"cut": "2026-10-20", "users": 1411, "candidates": 571, "left_out_share": 0.048}


def full(**changes: object) -> ReportData:
    """A page with everything on it, but for some parts."""
    kinds = {"JPEG": 3, "JPEG, CMYK": 1, "GIF, animated": 1}
    data = ReportData(
        counts={
            "items": 1234,
            "photos": 5,
            "interactions": 99,
            "captions": 4,
            "recommendations": 2,
        },
        runs=all_runs(),
        sources=(SourceSummary("interactions", 110, 99, 4, 7, AT),),
        rejections=(
            Rejection("interactions", "event_time lies in the future", 4, '{"item_id": "<b>"}'),
        ),
        photos=PhotoSummary(5, kinds, 1, 2),
        captions=some_captions(),
        users=(a_user(),),
        metrics=(
            recall("popularity", 0.061, 0.05, 0.07),
            recall("caption", 0.312, 0.29, 0.33),
            recall("popularity", None, None, None, "history 20+"),
            recall("caption", None, None, None, "history 20+"),
        ),
        splits={"time": FACTS},
    )
    return replace(data, **changes)  # type: ignore[arg-type]


@cache
def full_page() -> str:
    return render(full())


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_titles_captions_and_ids_are_escaped():
    page = full_page()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;caption&#39;)&lt;/script&gt; &amp; more" in page
    assert not re.search(r'<[^>]*[" ]onerror="alert', page)
    assert "<b>&quot;}" not in page
    for escaped in ("ends &lt;early&gt;", "u&lt;1&gt;", "&lt;i&gt;"):
        assert escaped in page


def test_attributes_are_shown_with_their_photo_and_counted():
    page = full_page()
    colour = "<dt>colour</dt><dd>&lt;b&gt;red</dd>"
    assert f'<dl class="attributes"><dt>kind</dt><dd>mug</dd>{colour}</dl>' in page
    assert 'aria-label="kind: mug 3, &lt;script' in page
    chart = page[page.index("<figcaption>Kind</figcaption>") :]
    assert ">mug</text>" in chart
    assert "&lt;script&gt;alert(3)&lt;/scrip\N{HORIZONTAL ELLIPSIS}</text>" in chart


def test_variants_are_shown_below_the_item_that_stands_for_them():
    page = full_page()
    assert page.count("<span>also: ") == 3
    assert page.count(", and 2 more</span>") == 1


def test_the_page_loads_nothing():
    page = full_page()
    targets = re.findall(r"""(?:src|href|action|data|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(target.startswith(("#", "data:image/jpeg")) for target in targets)
    assert not re.search(r"https?:|@import|<link|<iframe|<object", page)
    assert not [url for url in re.findall(r"url\(([^)]*)\)", page) if not url.startswith("#")]
    assert "default-src 'none'" in page


def test_every_link_and_reference_has_its_target_once():
    page = full_page()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert references
    assert set(references) <= set(ids)


def test_equal_values_give_equal_bytes():
    assert render(full()) == full_page()


def test_an_empty_shop_has_a_page_of_sentences():
    text = text_of(render(ReportData()))
    for sentence in (
        "The quality of the lists isn't known yet",
        "Nothing is known about the input",
        "There are no captions yet",
        "There are no lists to show",
        "There are no metrics yet",
        "No index has been built yet",
        "No stage has run on these tables yet",
    ):
        assert sentence in text


@pytest.mark.parametrize("field", [field.name for field in fields(ReportData)])
def test_any_part_may_be_missing(field: str):
    page = render(full(**{field: getattr(ReportData(), field)}))
    assert page.endswith("</html>")


def test_the_recall_curve_has_every_effort_and_the_chosen_one():
    tried = (TriedEffort(10, 100, 0.9, 0.88, 2000.0), TriedEffort(40, 100, 0.97, 0.96, 800.0))
    calibration = CalibrationState(0.95, 40, 100, 0.97, 0.96, 1000, None, tried)
    page = render(full(calibration=calibration))
    assert 'aria-label="Recall and lists a second of 2 search settings"' in page
    assert ">lists a second, one process</text>" in page
    assert "Recall against speed" not in render(full(calibration=calibration._replace(tried=())))


def test_details_may_be_absent_or_unreadable():
    bare = [replace(run, details={}, versions={}) for run in all_runs()]
    assert render(full(runs=tuple(bare))).endswith("</html>")
    broken = [replace(run, details=dict.fromkeys(run.details, "?")) for run in all_runs()]
    assert render(full(runs=tuple(broken))).endswith("</html>")


def test_the_summary_states_the_values_and_that_their_intervals_are_separate():
    text = text_of(full_page())
    assert "Captions find 5.1× as much of what users chose next as popularity does" in text
    assert "Recall@10 is 0.312 (95 % interval 0.290–0.330) against 0.061 (0.050–0.070)" in text
    assert "The intervals don't overlap" in text
    assert "items 1,234" in text
    assert "Delivery of 24 November 2026, 09:12 UTC; 99 in the table now" in text


def test_the_summary_says_that_a_small_difference_may_be_chance():
    metrics = (recall("popularity", 0.3, 0.28, 0.33), recall("caption", 0.31, 0.3, 0.34))
    text = text_of(render(full(metrics=metrics)))
    assert "Captions find no more" in text
    assert "The intervals overlap" in text


def test_too_few_users_give_words_instead_of_a_number():
    many = [recall(arm, 0.2, 0.1, 0.3, "history 1-4") for arm in ("popularity", "caption")]
    (split,) = splits(full(metrics=(*full().metrics, *many)))
    for label in (">1-4<", ">1,411<", ">20+<", ">too few<"):
        assert label in split.multiples
    few = full(metrics=(recall("caption", None, None, None),))
    assert headline(few) is None
    # In the chart and in the table.
    assert render(few).count(">too few users<") == 2


def test_arms_stand_in_their_order_and_slices_by_size():
    tenths = [f"popularity {tenth} of 10" for tenth in range(10, 0, -1)]
    metrics = [
        recall(arm, 0.1, 0.0, 0.2, slice)
        for arm in ("zeta", "title_caption", "caption/max_similarity", "caption", "random")
        for slice in ("all", "history 20+", "history 5-19", "history 1-4", *tenths)
    ]
    (split,) = splits(full(metrics=tuple(metrics)))
    assert list(split.accuracy) == [
        "random",
        "caption",
        "caption/max_similarity",
        "title_caption",
        "zeta",
    ]
    histories = [split.multiples.index(f">{name}<") for name in ("1-4", "5-19", "20+")]
    assert histories == sorted(histories)
    deciles = [split.multiples.rindex(f">{tenth}<") for tenth in range(1, 11)]
    assert deciles == sorted(deciles)


def with_difference(
    row: MetricRow,
    value: float,
    low: float,
    high: float,
) -> MetricRow:
    return replace(row, difference=value, difference_low=low, difference_high=high)


def test_a_difference_whose_interval_contains_zero_is_named():
    metrics = (
        recall("popularity", 0.061, 0.05, 0.07),
        with_difference(recall("caption", 0.312, 0.29, 0.33), 0.25, 0.2, 0.3),
        with_difference(recall("random", 0.05, 0.04, 0.06), -0.01, -0.03, 0.01),
    )
    data = full(metrics=metrics)
    (split,) = splits(data)
    assert split.indistinct == ("random",)
    for label in (">+0.250<", ">-0.010<", "less popularity"):
        assert label in split.differences
    assert "Recall@10 shows no difference from popularity for random." in text_of(render(data))


def test_the_page_shows_other_metrics_and_leaks():
    shuffled = replace(
        recall("caption", 0.0175, 0.01, 0.02), metric="recall_shuffled", p_value=None
    )
    coverage = replace(recall("caption", 0.61, None, None), metric="coverage")
    facts = {"cut": "2026-10-20", "candidates": 571, "above_chance": ["caption"]}
    splits = {"time": facts}
    text = text_of(render(full(splits=splits, metrics=(*full().metrics, shuffled, coverage))))
    assert "Caption predicts shuffled items better than chance. Something leaks" in text
    assert "every arm must fall to chance, 0.0175" in text
    assert "Coverage Recall, shuffled items" in text


def test_a_photo_that_cant_be_shown_has_a_placeholder_and_the_others_an_alt_text():
    page = full_page()
    # Among the failures, in the history, as a reason, and three variants.
    assert page.count('class="photo missing" role="img"') == 6
    assert len(re.findall("<img ", page)) == 6
    assert len(re.findall(r'<img src="[^"]+" alt="', page)) == 6
    assert "<span>truncated</span>" in page


@pytest.mark.parametrize(
    "issue",
    [
        DataIssue(
            "Photos that end early or are damaged", 1, "no caption; the item's title is used"
        ),
        DataIssue("Photos in printing colors (CMYK)", 1, "converted to RGB"),
        DataIssue("Events that repeat another", 7, "counted once"),
        DataIssue("Titles and captions with scripts", 3, "the scripts aren't encoded"),
        DataIssue("Events on items that the catalogue lacks", 41, "stored, but not used"),
        DataIssue(
            "Users with more events in a day than a person makes",
            1,
            "treated as bots; their 5,400 events are not used",
        ),
    ],
)
def test_data_issues_say_what_occurred_and_how_it_was_handled(issue: DataIssue):
    assert issue in data_issues(full())


def test_data_issues_leave_out_what_did_not_occur():
    assert all(issue.count for issue in data_issues(full()))
    assert data_issues(ReportData()) == []


def test_data_issues_of_a_sample_say_so():
    issues = data_issues(full(counts={"photos": 1_000_000}))
    handled = [issue.handling for issue in issues if "CMYK" in issue.what]
    assert handled == ["converted to RGB (in a sample of 5 photos)"]


def test_approximate_search_states_the_recall_promised_and_measured():
    text = text_of(full_page())
    assert "it finds 98.3 % of what exact search finds. The promise is 95 %." in text
    assert "on disk 231 kB" in text


def audit_metric(
    metric: str, value: float, low: float | None = None, high: float | None = None
) -> MetricRow:
    return MetricRow("captions", "llava@1", metric, 0, "all", value, low, high, 500)


AUDIT_METRICS = (
    audit_metric("distinct_share", 0.93),
    audit_metric("agreement/colour", 0.81, 0.77, 0.84),
    audit_metric("agreement_shuffled/colour", 0.12, 0.1, 0.15),
    audit_metric("self_rank_10", 0.03, 0.01, 0.06),
    audit_metric("self_rank_10_chance", 0.02),
    audit_metric("self_median_rank", 240),
    audit_metric("drift_changed", 0.4, 0.3, 0.5),
    audit_metric("self_median_rank_chance", 250.5),
    audit_metric("blank_cosine", 0.9, 0.88, 0.92),
    audit_metric("pair_cosine", 0.5, 0.45, 0.55),
)


def with_evaluation(details: dict[str, object]) -> ReportData:
    """The full page after an evaluation with these details of the caption audit."""
    return full(caption_audit=details)


def with_audit(**changes: object) -> ReportData:
    """A captioner that names colors, but finds its captions again no better than chance."""
    captioner = {
        "model": "llava@1",
        "captions": 9000,
        "sampled": 500,
        "recaptioned": 100,
        "failures": {"model_died": 2},
        "blank_caption": "A grey <b>wall.",
        "blank_error": "",
        "earlier": ["llava@0, short.1"],
    }
    red = PhotoCard("A-1", HOSTILE, PIXEL, caption="a red mug")
    mug = PhotoCard("A-2", None, PIXEL, caption="a mug")
    data = with_evaluation({"captioners": [captioner | changes]})
    return replace(
        data,
        metrics=(*data.metrics, *AUDIT_METRICS),
        audit_examples=(
            AuditExample(red, "<script>a bag", 499.5),
            AuditExample(mug, attribute="colour", value="<i>red"),
        ),
    )


@pytest.mark.parametrize(
    "words",
    [
        "Captions that name the catalogue&#39;s colour 81 % 77 %–84 % "
        "12 % 10 %–15 % captions of other photos",
        "Distinct captions, in the sample 93 %",
        "The sample is 500 of 9,000 captions in force.",
        "The model described 100 of the photos a second time",
        "2 of them got no caption then (model died 2) and count as not found",
        "the model says: “A grey &lt;b&gt;wall.”",
        "Earlier captions of these photos are by llava@0",
        "a red mug Described again: &lt;script&gt;a bag A-1 · its own caption has rank 499.5",
        "a mug colour in the catalogue: &lt;i&gt;red A-2",
    ],
)
def test_the_audit_stands_with_the_captions_and_each_metric_with_its_control(words: str):
    page = render(with_audit())
    assert words in text_of(page[page.index('id="audit"') : page.index('id="recommendations"')])


def test_a_metric_no_better_than_its_control_is_in_doubt():
    (audit,) = audits(with_audit())
    doubtful = {line.metric.metric for line in audit.lines if line.doubtful}
    assert doubtful == {"self_rank_10", "blank_cosine"}
    assert render(with_audit()).count("In doubt here") == 2


def test_metrics_of_captions_are_no_scores_of_lists():
    assert splits(with_audit()) == splits(full())
    assert headline(with_audit()) == headline(full())
    assert data_issues(with_audit()) == data_issues(full())


def test_without_an_audit_the_page_has_no_word_of_it():
    few = MetricRow("captions", "llava@1", "distinct_share", 0, "all", None, None, None, 12)
    examples = with_audit().audit_examples
    for data in (full(), ReportData(), full(audit_examples=examples), full(metrics=(few,))):
        assert "come from the photos" not in render(data)


def test_a_captioner_that_could_not_describe_again_is_named():
    text = text_of(render(with_evaluation({"trouble": "no <key>"})))
    assert "couldn't describe the photos again: no &lt;key&gt;" in text
    refusing = text_of(render(with_audit(blank_caption="", blank_error="the model refused")))
    assert "For a blank grey photo the model gives no caption, as it should" in refusing


def photo_bytes(
    format: str,
    mode: str = "RGB",
    **save,
) -> bytes:  # type: ignore[no-untyped-def]
    image = Image.new(mode, (400, 200))
    image.paste((200,) * len(mode), (0, 0, 200, 200))
    return encoded(image, format, **save)


def test_kinds_of_photos():
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.new("RGB", (400, 200), "red")]
    assert pictures.kind(photo_bytes("JPEG")) == "JPEG"
    assert pictures.kind(photo_bytes("JPEG", "CMYK")) == "JPEG, CMYK"
    assert pictures.kind(photo_bytes("JPEG", exif=turned)) == "JPEG, turned by EXIF"
    assert pictures.kind(photo_bytes("PNG", "RGBA")) == "PNG, transparent"
    assert pictures.kind(photo_bytes("GIF", save_all=True, append_images=frames)) == "GIF, animated"
    assert pictures.kind(b"<!DOCTYPE html>") == pictures.kind(b"") == "unreadable"


def test_a_thumbnail_is_a_small_jpeg_or_a_named_error():
    with Image.open(io.BytesIO(pictures.thumbnail(photo_bytes("PNG", "RGBA")))) as thumbnail:
        assert thumbnail.format == "JPEG"
        assert thumbnail.size == (160, 80)
    with pytest.raises(PhotoError, match="no bytes"):
        pictures.thumbnail(b"")
