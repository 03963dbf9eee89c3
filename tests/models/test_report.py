"""The report's page from literal values: what it shows, and that nothing in the data can get out of its place."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from datetime import UTC, datetime
from functools import cache

import pytest
from PIL import Image

from vlm4rec_spark.models.photos.decode import PhotoError
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.caption_audit_section import audits
from vlm4rec_spark.report.data import (
    AuditExample,
    Captions,
    DiscordantUser,
    Failure,
    Metric,
    PhotoStock,
    Recommended,
    Rejection,
    ReportData,
    SharedPhoto,
    ShownPhoto,
    SourceSummary,
    StageRun,
    User,
    figures,
)
from vlm4rec_spark.report.data_quality import Finding, findings
from vlm4rec_spark.report.metrics_section import headline, splits
from vlm4rec_spark.report.page import render

AT = datetime(2026, 11, 24, 9, 12, tzinfo=UTC)
PIXEL = "data:image/jpeg;base64,/9j/4AAQSkZJRg=="
HOSTILE = "<script>alert('title')</script>"


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


def scores(
    arm: str, recall: float | None, low: float | None, high: float | None, slice: str = "all"
) -> Metric:
    return Metric(
        "time",
        arm,
        "recall",
        10,
        slice,
        recall,
        low,
        high,
        25 if recall is None else 1411,
        None if arm == "popularity" else "popularity",
        0.0002,
    )


def full() -> ReportData:
    hostile = ShownPhoto(
        "A-1", HOSTILE, PIXEL, caption="a red mug <script>alert('caption')</script> & more"
    )
    told = ShownPhoto(
        "A-2", "Mug 2", PIXEL, caption="mug, red.", attributes={"kind": "mug", "colour": "<b>red"}
    )
    broken = ShownPhoto("B-2", '" onerror="alert(1)', None, "truncated")
    return ReportData(
        counts={
            "items": 1234,
            "photos": 5,
            "interactions": 99,
            "captions": 4,
            "recommendations": 2,
        },
        runs=(
            a_run(
                "ingest", unknown_item_events="41", items_without_photo="5", untouched_items="14"
            ),
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
                identical_vectors='{"caption": 2}',
                fallback="6",
                text_problems='{"scripts": 3, "markup": 0, "too_long": 8}',
            ),
            a_run(
                "index",
                items="1234",
                dimension="384",
                approximate="true",
                bytes="231004",
                folder="/index/abc",
            ),
            a_run(
                "profiles",
                representation="caption",
                bot_users="1",
                bot_events="5400",
                users_without_history="2",
            ),
            a_run(
                "recommend", k="10", search="ScaNN", recall_promised="0.95", recall_measured="0.983"
            ),
            a_run(
                "evaluate",
                time='{"cut": "2026-10-20", "users": 1411, "candidates": 571, "left_out_share": 0.048}',
            ),
        ),
        sources=(SourceSummary("interactions", 110, 99, 4, 7, AT),),
        rejections=(
            Rejection("interactions", "event_time lies in the future", 4, '{"item_id": "<b>"}'),
        ),
        stock=PhotoStock(
            5,
            {"JPEG": 3, "JPEG, CMYK": 1, "GIF, animated": 1},
            1,
            2,
            (SharedPhoto(hostile, "C-3", 2),),
        ),
        captions=Captions(
            {"ok": 3, "failed": 1},
            {"truncated": 1},
            (hostile, told),
            (Failure(broken, "truncated", "ends <early>"),),
            a_run("caption"),
            attributes={"kind": (("mug", 3), ("<script>alert(3)</script>" * 3, 1))},
        ),
        users=(
            User(
                "u<1>",
                9,
                18,
                (hostile, broken),
                (Recommended(hostile, 0.87, broken, ("red", "<i>"), (broken,) * 5),),
            ),
        ),
        metrics=(
            scores("popularity", 0.061, 0.05, 0.07),
            scores("caption", 0.312, 0.29, 0.33),
            scores("popularity", None, None, None, "history 20+"),
            scores("caption", None, None, None, "history 20+"),
        ),
    )


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
    assert (
        "<b>&quot;}" not in page
        and "ends &lt;early&gt;" in page
        and "u&lt;1&gt;" in page
        and "&lt;i&gt;" in page
    )


def test_attributes_are_shown_with_their_photo_and_counted():
    page = full_page()
    assert (
        '<dl class="attributes"><dt>kind</dt><dd>mug</dd><dt>colour</dt><dd>&lt;b&gt;red</dd></dl>'
        in page
    )
    assert 'aria-label="kind: mug 3, &lt;script' in page
    chart = page[page.index("<figcaption>Kind</figcaption>") :]
    assert (
        ">mug</text>" in chart
        and "&lt;script&gt;alert(3)&lt;/scrip\N{HORIZONTAL ELLIPSIS}</text>" in chart
    )


def test_what_shares_a_place_stands_below_it():
    page = full_page()
    assert page.count("<span>shares its place: ") == 3
    assert page.count(", and 2 more</span>") == 1


def calibrated(**details: object) -> str:
    """A page on an approximate index; `recall_curve` as a structure."""
    told = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in details.items()
    }
    return render(
        ReportData(runs=(a_run("index", approximate="true", items="9"), a_run("recommend", **told)))
    )


CURVE = {
    "tried": [[1, 10, 0.7, 0.68, 900], [2, 10, 0.8, 0.78, 700], [4, 20, 0.96, 0.953, 600]],
    "exact": 50,
}


def test_the_recall_curve_shows_what_was_tried_promised_and_taken():
    found = {"recall_promised": "0.95", "k": "10"}
    page = calibrated(**found, recall_curve=CURVE | {"taken": [4, 20]})
    chart = page[page.index("Recall against speed") : page.index("</figure>")]
    for word in (
        "10 candidates",
        "20 candidates",
        "exact search",
        "promise: 0.95",
        "taken: 4 leaves",
        "100",
        "1,000",
        "lists a second, one process on the driver",
        "recall@10, 1 = all that exact search finds",
    ):
        assert f">{word}</text>" in chart
    (alt,) = re.findall(r'aria-label="(Recall against[^"]*)"', page)
    assert " ".join(alt.split()) == (
        "Recall against lists a second of 3 settings of the search: from 70 % to 96 %; promised are 95 %. "
        "Taken: 4 leaves and 20 candidates, 96 %, at least 95.3 %, at 600 lists a second. Exact search makes 50."
    )
    exact = calibrated(**found, recall_curve=CURVE | {"taken": None})
    assert (
        ">taken: exact search</text>" in exact
        and "Taken: exact search. Exact search makes 50." in exact
    )


def test_the_lower_bound_of_each_setting_is_drawn():
    lower = {"tried": [[1, 10, 0.9, 0.5, 900], [2, 10, 0.97, 0.96, 700]], "exact": 500}
    drawn = [
        calibrated(recall_curve=curve, recall_promised="0.95")
        for curve in (lower, {**lower, "tried": [[1, 10, 0.9, 0.6, 900], lower["tried"][1]]})
    ]
    assert ">0.5</text>" in drawn[0] and ">0.5</text>" not in drawn[1]


def test_without_a_recall_curve_the_page_has_no_frame_for_it():
    for broken in ("nonsense", {"tried": [[1, 2]]}, {"tried": 3}, {"tried": [], "exact": None}):
        assert "Recall against" not in calibrated(recall_curve=broken, recall_promised="0.95")
    assert "Recall against" not in calibrated(recall_curve=CURVE, recall_promised="?")


def test_the_page_asks_nobody_for_anything():
    page = full_page()
    targets = re.findall(r"""(?:src|href|action|data|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets and all(target.startswith(("#", "data:image/jpeg")) for target in targets)
    assert not re.search(r"https?:|@import|<link|<iframe|<object", page)
    assert not [url for url in re.findall(r"url\(([^)]*)\)", page) if not url.startswith("#")]
    assert "default-src 'none'" in page


def test_every_link_and_reference_has_its_target_once():
    page = full_page()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }


def test_equal_values_give_equal_bytes():
    assert render(full()) == full_page()


def test_an_empty_shop_has_a_page_of_sentences():
    text = text_of(render(ReportData()))
    for sentence in (
        "How good the lists are isn't known yet",
        "Nothing is known of what went in",
        "There are no captions yet",
        "There are no lists to show",
        "There are no metrics yet",
        "No index has been built yet",
        "No stage has been run on these tables yet",
    ):
        assert sentence in text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReportData)])
def test_any_part_may_be_missing(field: str):
    nothing = ReportData()
    assert render(dataclasses.replace(full(), **{field: getattr(nothing, field)})).endswith(
        "</html>"
    )


def test_details_may_be_absent_or_unreadable():
    bare = tuple(dataclasses.replace(run, details={}, versions={}) for run in full().runs)
    assert render(dataclasses.replace(full(), runs=bare))
    broken = tuple(
        dataclasses.replace(run, details=dict.fromkeys(run.details, "?")) for run in full().runs
    )
    assert render(dataclasses.replace(full(), runs=broken))
    assert figures("not json") == figures("[1]") == figures(None) == {}


def test_the_summary_states_the_figures_and_whether_they_are_apart():
    text = text_of(full_page())
    assert "Captions find 5.1× as much of what users chose next as popularity does" in text
    assert "Recall@10 is 0.312 (95 % interval 0.290–0.330) against 0.061 (0.050–0.070)" in text
    assert "the intervals are apart" in text
    assert "items 1,234" in text
    close = dataclasses.replace(
        full(), metrics=(scores("popularity", 0.3, 0.28, 0.33), scores("caption", 0.31, 0.3, 0.34))
    )
    text = text_of(render(close))
    assert "Captions find no more" in text and "the intervals overlap" in text


def test_too_few_users_give_words_instead_of_a_number():
    many = [scores(arm, 0.2, 0.1, 0.3, "history 1-4") for arm in ("popularity", "caption")]
    (split,) = splits(dataclasses.replace(full(), metrics=(*full().metrics, *many)))
    assert [line in split.multiples for line in (">1-4<", ">1,411<", ">20+<", ">too few<")] == [
        True
    ] * 4
    alone = dataclasses.replace(full(), metrics=(scores("caption", None, None, None),))
    assert headline(alone) is None
    assert render(alone).count(">too few users<") == 2  # in the chart and in the table


def test_arms_stand_in_their_order_and_slices_by_size():
    tenths = [f"popularity {tenth} of 10" for tenth in range(10, 0, -1)]
    metrics = [
        scores(arm, 0.1, 0.0, 0.2, slice)
        for arm in ("zeta", "title_caption", "caption/max_similarity", "caption", "random")
        for slice in ("all", "history 20+", "history 5-19", "history 1-4", *tenths)
    ]
    (split,) = splits(dataclasses.replace(full(), metrics=tuple(metrics)))
    assert list(split.by_metric) == [
        "random",
        "caption",
        "caption/max_similarity",
        "title_caption",
        "zeta",
    ]
    places = [split.multiples.index(f">{name}<") for name in ("1-4", "5-19", "20+")]
    assert places == sorted(places)
    tenth_at = [split.multiples.rindex(f">{tenth}<") for tenth in range(1, 11)]
    assert tenth_at == sorted(tenth_at)


def test_a_difference_that_crosses_zero_is_not_seen():
    def less(arm: str, value: float, low: float, high: float) -> Metric:
        return dataclasses.replace(scores(arm, value, low, high), metric="recall_difference")

    apart = (less("caption", 0.25, 0.2, 0.3), less("random", -0.01, -0.03, 0.01))
    told = dataclasses.replace(
        full(), metrics=(*full().metrics, scores("random", 0.05, 0.04, 0.06), *apart)
    )
    (split,) = splits(told)
    assert split.unseen == ("random",)
    assert [text in split.differences for text in (">+0.250<", ">-0.010<", "less popularity")] == [
        True
    ] * 3
    assert "No difference from popularity seen in Recall@10 of random." in text_of(render(told))


def test_what_is_beyond_accuracy_and_what_leaks_is_told():
    exchanged = [
        dataclasses.replace(scores(arm, 0.0175, 0.01, 0.02), metric="recall_shuffled")
        for arm in ("caption",)
    ]
    spread = [dataclasses.replace(scores("caption", 0.61, None, None), metric="coverage")]
    facts = '{"cut": "2026-10-20", "users": 1411, "candidates": 571, "above_chance": ["caption"]}'
    leaking = (*full().runs[:-1], a_run("evaluate", time=facts))
    text = text_of(
        render(
            dataclasses.replace(
                full(), runs=leaking, metrics=(*full().metrics, *exchanged, *spread)
            )
        )
    )
    assert "Caption finds more of exchanged items than chance does: something leaks" in text
    assert (
        "every arm must fall to chance, 0.0175" in text
        and "Coverage Recall, items exchanged" in text
    )


def test_users_whom_one_arm_served_stand_with_photos():
    red, blue = (ShownPhoto(f"{colour}-1", f"{colour} mug", PIXEL) for colour in ("red", "blue"))
    apart = (DiscordantUser("time", "u<7>", "caption", "popularity", 3, red, (blue,)),)
    page = render(dataclasses.replace(full(), apart=apart))
    assert "caption had it at rank 3 for u&lt;7&gt;; popularity had nothing, but" in text_of(page)
    assert 'alt="red mug"' in page and 'alt="blue mug"' in page


def test_a_photo_that_cant_be_shown_has_a_placeholder_and_the_others_an_alt_text():
    page = full_page()
    assert (
        page.count('class="photo missing" role="img"') == 6
    )  # in failures, history, reason, and three more
    assert len(re.findall("<img ", page)) == len(re.findall(r'<img src="[^"]+" alt="', page)) == 7
    assert "<span>truncated</span>" in page


def test_findings_name_what_was_met_and_leave_out_what_was_not():
    found = findings(full())
    assert (
        Finding("Photos that end early or are damaged", 1, "no caption; the item goes by its title")
        in found
    )
    assert (
        Finding("Photos in printing colours (CMYK)", 1, "converted to RGB (5 photos looked at)")
        not in found
    )
    assert Finding("Photos in printing colours (CMYK)", 1, "converted to RGB") in found
    assert Finding("Events that repeat another", 7, "counted once") in found
    assert (
        Finding("Titles and captions with page scripts", 3, "the scripts aren't encoded") in found
    )
    assert (
        Finding("Events of items that the catalogue lacks", 41, "kept, but count for nobody")
        in found
    )
    bots = next(finding for finding in found if "events in a day" in finding.what)
    assert (bots.count, bots.fate) == (1, "taken for bots; their 5,400 events count for nothing")
    assert not [finding for finding in found if finding.count == 0]
    assert findings(ReportData()) == []


def test_only_a_sample_looked_at_is_said():
    many = dataclasses.replace(full(), counts={"photos": 1_000_000})
    assert [f.fate for f in findings(many) if "CMYK" in f.what] == [
        "converted to RGB (5 photos looked at)"
    ]


def test_approximate_search_states_the_recall_promised_and_measured():
    text = text_of(full_page())
    assert "98.3 %" in text and "promised are 95 %" in text
    assert "on disk 231 kB" in text


def audited(
    metric: str, value: float, low: float | None = None, high: float | None = None
) -> Metric:
    return Metric("captions", "llava@1", metric, 0, "all", value, low, high, 500)


def with_audit(**told: object) -> ReportData:
    """A captioner that tells colours, but finds its captions again no better than chance."""
    captioner = {
        "model": "llava@1",
        "in_force": 9000,
        "sampled": 500,
        "asked": 100,
        "failures": {"model_died": 2},
        "of_nothing": "A grey <b>wall.",
        "refused": "",
        "earlier": ["llava@0, short.1"],
    } | told
    runs = [
        dataclasses.replace(
            run, details=run.details | {"caption_audit": json.dumps({"captioners": [captioner]})}
        )
        if run.stage == "evaluate"
        else run
        for run in full().runs
    ]
    figures = (
        audited("distinct_share", 0.93),
        audited("agreement/colour", 0.81, 0.77, 0.84),
        audited("agreement_shuffled/colour", 0.12, 0.1, 0.15),
        audited("self_rank_10", 0.03, 0.01, 0.06),
        audited("self_rank_10_chance", 0.02),
        audited("self_median_rank", 240),
        audited("drift_changed", 0.4, 0.3, 0.5),
        audited("self_median_rank_chance", 250.5),
        audited("blank_cosine", 0.9, 0.88, 0.92),
        audited("pair_cosine", 0.5, 0.45, 0.55),
    )
    few = AuditExample(
        ShownPhoto("A-1", HOSTILE, PIXEL, caption="a red mug"), "<script>a bag", 499.5
    )
    wrong = AuditExample(
        ShownPhoto("A-2", None, PIXEL, caption="a mug"), attribute="colour", value="<i>red"
    )
    return dataclasses.replace(
        full(), runs=tuple(runs), metrics=(*full().metrics, *figures), audit=(few, wrong)
    )


def test_the_audit_stands_with_the_captions_each_figure_beside_its_control():
    page = render(with_audit())
    text = text_of(page[page.index('id="audit"') : page.index('id="recommendations"')])
    named = "Captions that name the catalogue&#39;s colour 81 % 77 %–84 % 12 % 10 %–15 % captions of other photos"
    assert named in text
    assert "Distinct captions, of those looked at 93 %" in text
    assert (
        "500 of 9,000 captions in force were looked at. 100 of the photos were described a second time"
        in text
    )
    assert "2 of them got no caption then (model died 2) and count as not found" in text
    assert "the model says: “A grey &lt;b&gt;wall.”" in text
    assert "Earlier captions of these photos are by llava@0" in text
    assert (
        "a red mug Described again: &lt;script&gt;a bag A-1 · its own caption comes at rank 499.5"
        in text
    )
    assert "a mug colour in the catalogue: &lt;i&gt;red A-2" in text


def test_what_is_not_apart_from_its_control_is_in_doubt():
    (found,) = audits(with_audit())
    assert {line.figure.metric for line in found.lines if line.doubtful} == {
        "self_rank_10",
        "blank_cosine",
    }
    assert render(with_audit()).count("In doubt here") == 2


def test_figures_on_captions_are_no_scores_of_lists():
    assert splits(with_audit()) == splits(full())
    assert headline(with_audit()) == headline(full())
    assert findings(with_audit()) == findings(full())


def test_without_an_audit_the_page_has_no_word_of_it():
    for nothing in (full(), ReportData(), dataclasses.replace(full(), audit=with_audit().audit)):
        assert "come from the photos" not in render(nothing)
    few = Metric("captions", "llava@1", "distinct_share", 0, "all", None, None, None, 12)
    assert "come from the photos" not in render(dataclasses.replace(full(), metrics=(few,)))


def test_a_captioner_that_refused_to_be_asked_is_said():
    runs = tuple(
        dataclasses.replace(run, details={"caption_audit": '{"trouble": "no <key>"}'})
        if run.stage == "evaluate"
        else run
        for run in full().runs
    )
    assert "couldn't be asked again: no &lt;key&gt;" in text_of(
        render(dataclasses.replace(full(), runs=runs))
    )
    refusing = text_of(render(with_audit(of_nothing="", refused="the model refused")))
    assert "nothing but grey the model gives no caption, as it should" in refusing


def photo_bytes(format: str, mode: str = "RGB", **save) -> bytes:  # type: ignore[no-untyped-def]
    out = io.BytesIO()
    image = Image.new(mode, (400, 200))
    image.paste((200,) * len(mode), (0, 0, 200, 200))
    image.save(out, format, **save)
    return out.getvalue()


def test_kinds_of_photos():
    turned = Image.Exif()
    turned[0x0112] = 6
    more = [Image.new("RGB", (400, 200), "red")]
    assert pictures.kind(photo_bytes("JPEG")) == "JPEG"
    assert pictures.kind(photo_bytes("JPEG", "CMYK")) == "JPEG, CMYK"
    assert pictures.kind(photo_bytes("JPEG", exif=turned)) == "JPEG, turned by EXIF"
    assert pictures.kind(photo_bytes("PNG", "RGBA")) == "PNG, transparent"
    assert pictures.kind(photo_bytes("GIF", save_all=True, append_images=more)) == "GIF, animated"
    assert pictures.kind(b"<!DOCTYPE html>") == pictures.kind(b"") == "unreadable"


def test_a_thumbnail_is_a_small_jpeg_or_a_named_error():
    with Image.open(io.BytesIO(pictures.thumbnail(photo_bytes("PNG", "RGBA")))) as thumb:
        assert (thumb.format, thumb.size) == ("JPEG", (160, 80))
    with pytest.raises(PhotoError, match="no bytes"):
        pictures.thumbnail(b"")
