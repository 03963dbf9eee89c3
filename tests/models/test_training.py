"""Training a captioner: what is read from a table, a training that is stopped goes on as it would have, the card."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, SwinConfig

from vlm4rec_spark.cli import main
from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.training import augment, card, labelled, measure, network, train
from vlm4rec_spark.training.measure import Share
from vlm4rec_spark.training.teacher import WIDTH, Teacher

COLUMNS = {"photo": "photo", "caption": "caption", "weight": "weight"}
COLOURS = {"red": (190, 30, 30), "green": (30, 150, 40), "blue": (30, 60, 190)}
GOOD = 120


def photo(number: int, colour: str) -> bytes:
    rng = np.random.default_rng(number)
    pixels = np.full((40, 30, 3), 250, np.uint8)
    pixels[8:32, 6:24] = np.clip(
        np.array(COLOURS[colour]) + rng.integers(-20, 20, (24, 18, 1)), 0, 255
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows() -> pd.DataFrame:
    """So many good photos, then one copy, and four that can't be used."""
    colours = [list(COLOURS)[number % 3] for number in range(GOOD)]
    good = pd.DataFrame(
        {
            "photo": [photo(number, colour) for number, colour in enumerate(colours)],
            "category": ["hat" if number % 2 else "casual shoes" for number in range(GOOD)],
            "shade": colours,
            "weight": 1.0,
            "caption": None,
        }
    )
    good.loc[0, ["caption", "weight"]] = ["A  hat of my own.", 7.0]
    good.loc[1, "shade"] = None
    bad = [(b"", "hat"), (b"<html>", "hat"), (None, "hat"), (photo(999, "red"), None)]
    others = [{"photo": data, "category": kind, "weight": 1.0} for data, kind in bad]
    return pd.concat([good, good.iloc[[5]], pd.DataFrame(others)], ignore_index=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("labelled") / "photos.parquet"
    rows().to_parquet(file)
    return file


Read = Callable[[], labelled.Labelled]


@pytest.fixture(scope="module")
def read(table: Path) -> Read:
    attributes = {"kind": "category", "colour": "shade"}
    return lambda: labelled.read(
        table, COLUMNS, attributes, network.SIDE, table.parent / "work", lambda text: None
    )


def test_a_table_becomes_photos_words_and_labels(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read()
    assert found.photos.shape == (GOOD + 1, 3, 128, 128)
    assert found.photos[3, :, 64, 64].argmax() == 0  # red
    assert found.rejected == {"empty": 2, "html_page": 1, "unlabelled": 1}
    assert found.values == {"kind": ["casual shoes", "hat"], "colour": ["blue", "green", "red"]}
    assert found.labels["kind"][:3].tolist() == [0, 1, 0]
    assert found.labels["colour"][:4].tolist() == [2, -1, 0, 2]
    assert found.sentences[:4] == [
        "A hat of my own.",
        "This is a hat.",
        "Casual shoes in blue.",
        "This is a red hat.",
    ]
    assert found.weights[:2].tolist() == [7.0, 1.0]
    assert 0 < found.held_out.sum() < GOOD / 5
    assert found.held_out[5] == found.held_out[GOOD]  # a photo and its copy are on one side
    # What was decoded once isn't decoded again.
    monkeypatch.setattr(labelled, "decode", None)
    assert (read().photos == found.photos).all()


def test_a_csv_may_name_photos_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(100):
        (tmp_path / "files" / f"{number}.png").write_bytes(photo(number, "green"))
    lines = [f"files/{number}.png,hat" for number in range(100)] + ["files/gone.png,hat"]
    (tmp_path / "photos.csv").write_text("\n".join(["file,kind", *lines]))
    columns = COLUMNS | {"photo": "file"}
    found = labelled.read(
        tmp_path / "photos.csv", columns, {"kind": "kind"}, 32, tmp_path / "work", lambda text: None
    )
    assert (len(found.sentences), found.rejected) == (100, {"unreadable": 1})
    assert found.photos[0, :, 16, 16].argmax() == 1


def test_what_can_not_be_read_is_said(table: Path, tmp_path: Path) -> None:
    def asked(file: Path, attributes: dict[str, str]) -> None:
        labelled.read(file, COLUMNS, attributes, 32, tmp_path / "work", lambda text: None)

    with pytest.raises(UsageError, match=r"gone\.parquet: there is no such table"):
        asked(tmp_path / "gone.parquet", {"kind": "category"})
    with pytest.raises(
        UsageError,
        match=r"it has no column group; it has photo, category, shade, weight, caption\.",
    ):
        asked(table, {"kind": "group"})
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(UsageError, match=r"text\.parquet: it can't be read as Parquet"):
        asked(tmp_path / "text.parquet", {"kind": "category"})
    rows().iloc[-9:].to_parquet(tmp_path / "few.parquet")
    with pytest.raises(
        RunError,
        match=r"5 of 9 photos can be learnt from, at least 100 are needed\. Left out: .*html",
    ):
        asked(tmp_path / "few.parquet", {"kind": "category"})


# Training


PLAN = train.TrainingPlan(seen=4 * 6, batch=6, seed=3)


class Killed(Exception):
    pass


def test_a_training_that_was_killed_ends_as_it_would_have(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, told = read(), list[str]()
    curve, _ = train.train(photos, tmp_path / "whole", tmp_path, PLAN, told.append)
    assert (curve[-1].seen, set(curve[-1].right)) == (24, {"kind", "colour"})
    assert told[-1].startswith("24 of 24 photos seen, ")

    work, save, saved = tmp_path / "work", train._save, list[int]()
    work.mkdir()

    def kill(*given: object) -> None:
        save(*given)  # type: ignore[arg-type]
        saved.append(1)
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(train, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "_save", kill)
    with pytest.raises(Killed):
        train.train(photos, tmp_path / "parts", work, PLAN, told.append)
    train.train(photos, tmp_path / "parts", work, PLAN, told.append)
    assert "going on from step 2 of 4" in told
    whole, parts = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts

    # The ordinary backend loads it, and says words that it was taught.
    (said,) = measure.describe(tmp_path / "parts", [Image.new("RGB", (50, 50), (200, 0, 0))])
    assert set(said.lower().replace(".", "").replace(",", "").split()) <= set(
        " ".join(photos.sentences).lower().replace(".", "").replace(",", "").split()
    )

    with pytest.raises(
        UsageError, match=r"checkpoint\.pt: it belongs to a training with other photos or settings"
    ):
        train.train(
            photos, tmp_path / "parts", work, train.TrainingPlan(seen=30, batch=6), told.append
        )


def test_a_training_goes_on_from_another_captioner_and_keeps_the_words_that_both_know(
    read: Read, tmp_path: Path
) -> None:
    photos = read()
    train.train(photos, tmp_path / "first", tmp_path, PLAN, lambda text: None)
    torch.manual_seed(0)
    before, _ = network.build(photos.sentences)
    network.inherit(before, AutoProcessor.from_pretrained(tmp_path / "first"), tmp_path / "first")
    other = replace(photos, sentences=[said.replace("hat", "bonnet") for said in photos.sentences])
    torch.manual_seed(0)
    model, processor = network.build(other.sentences)
    untaught = model.get_input_embeddings().weight.detach().clone()
    network.inherit(model, processor, tmp_path / "first")
    theirs, ours = (each.get_input_embeddings().weight for each in (before, model))
    words = (
        AutoProcessor.from_pretrained(tmp_path / "first").tokenizer.get_vocab(),
        processor.tokenizer.get_vocab(),
    )
    assert torch.equal(ours[words[1]["red"]], theirs[words[0]["red"]])
    assert torch.equal(ours[words[1]["bonnet"]], untaught[words[1]["bonnet"]])
    taken, given = (each.model.vision_tower.state_dict() for each in (model, before))
    assert all(torch.equal(taken[name], given[name]) for name in given)

    plan = replace(PLAN, start=str(tmp_path / "first"), mirrored=0.5, seen=12)
    (tmp_path / "work").mkdir()
    train.train(other, tmp_path / "second", tmp_path / "work", plan, lambda text: None)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    same = {name for name, each in first.items() if torch.equal(each, second[name])}
    early = {name for name in same if ".layers.0." in name and "vision_tower" in name}
    assert len(early) > 10
    assert not any("multi_modal_projector" in name for name in same)

    (tmp_path / "again").mkdir()
    train.train(
        other, tmp_path / "third", tmp_path / "again", replace(plan, kept=0.5), lambda text: None
    )
    third = load_file(tmp_path / "third" / "model.safetensors")
    projector = next(
        name for name in first if "multi_modal_projector" in name and name.endswith("weight")
    )
    torch.testing.assert_close(
        third[projector], (first[projector] + second[projector]) / 2, atol=1e-3, rtol=0
    )
    learnt = next(name for name in first if name.endswith("embed_tokens.weight"))
    bonnet = words[1]["bonnet"]
    torch.testing.assert_close(third[learnt][bonnet], second[learnt][bonnet], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("gone", "--start gone: there is no captioner"),
        ("none", "no captioner can be read from it"),
        ("other", "its captioner is of another shape than those that are trained here"),
    ],
)
def test_only_a_captioner_of_this_kind_can_be_started_from(
    read: Read,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    said: str,
) -> None:
    start = tmp_path / folder
    if folder == "none":
        start.mkdir()
        (start / "config.json").write_text("{}")
    if folder == "other":
        small = SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        )
        model, processor = network.build(read().sentences, small)
        model.save_pretrained(start)
        processor.save_pretrained(start)
    given = folder if folder == "gone" else str(start)
    assert (
        main(
            [
                "train-captioner",
                str(table),
                "--out",
                str(tmp_path / "out"),
                "--attribute",
                "kind=category",
                "--start",
                given,
            ]
        )
        == 2
    )
    assert said in " ".join(capsys.readouterr().err.split())


def test_photos_are_drawn_by_weight_and_never_those_held_out(read: Read) -> None:
    photos = read()
    _, processor = network.build(photos.sentences)
    data = train._Photos(photos, processor, "cpu")
    drawn = data.draw(20_000, np.random.default_rng(0))
    assert not photos.held_out[drawn].any()
    often = np.bincount(drawn, minlength=len(photos.sentences))
    assert 6 < often[0] / often[(photos.weights == 1) & ~photos.held_out].mean() < 8


# Photos changed at random


def test_changed_photos_depend_on_the_seed_and_stay_photos() -> None:
    photos = torch.randint(
        0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    first, again, other = (
        augment.augment(photos, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == photos.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() < 1.3
    assert torch.equal(augment.plain(photos), photos / 127.5 - 1)


def test_a_share_of_the_photos_is_mirrored_at_most() -> None:
    photos = torch.randint(
        0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    changed = augment.augment(photos, torch.Generator().manual_seed(1), mirrored=0.5)
    as_it_is, turned = augment.plain(photos), augment.plain(photos.flip(-1))
    untouched = [
        torch.equal(new, old) or torch.equal(new, other)
        for new, old, other in zip(changed, as_it_is, turned, strict=True)
    ]
    assert untouched == [True] * 4 + [False] * 4
    assert (
        0 < sum(torch.equal(new, old) for new, old in zip(changed[:4], as_it_is, strict=False)) < 4
    )
    whole = augment.augment(photos, torch.Generator().manual_seed(1), mirrored=1.0)
    assert whole.shape == photos.shape


def test_the_background_is_what_reaches_the_edge() -> None:
    photo = torch.ones(1, 3, 64, 64)
    photo[..., 16:48, 16:48] = 0.3
    photo[..., 28:36, 28:36] = 1.0  # a white print on the product
    cover = augment._background(photo)[0, 0]
    assert cover[:10].min() == 1
    assert cover[20:44, 20:44].max() == 0
    assert augment._background(torch.full((1, 3, 64, 64), 0.5)).max() == 0


def test_the_teacher_sees_each_photo_alone() -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    teacher = Teacher("cpu")
    together = teacher.features(pixels)
    assert together.shape == (3, WIDTH)
    assert torch.allclose(together[1:2], teacher.features(pixels[1:2]), atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


# What is said of the result


def test_shares_are_over_the_photos_whose_truth_is_known() -> None:
    values = {"kind": ["hat", "shoes"], "colour": ["red", "blue"]}
    captions = ["A red hat.", "A blue hat.", "Red shoes.", "Nothing."]
    truth = [
        {"kind": "hat", "colour": "red"},
        {"kind": "hat", "colour": "red"},
        {"kind": "hat"},
        {"kind": "shoes"},
    ]
    assert measure.shares(captions, "A blue hat.", truth, values) == {
        "kind": Share(photos=4, values=2, right=0.5, blank=0.75, majority=0.75),
        "colour": Share(photos=2, values=2, right=0.5, blank=0.0, majority=1.0),
    }


def test_the_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    made = card.Made(
        "vlm4rec train-captioner x",
        "`x.parquet`",
        "CC0.",
        1_200,
        {"html_page": 2},
        train.TrainingPlan(teacher=True),
        90.0,
        "a GPU",
    )
    curve = [train.Point(96, 5.0, {"kind": 0.1}), train.Point(192, 4.0, {"kind": 0.3})]
    card.write(tmp_path, made, {"kind": Share(61, 2, 0.5, 0.25, 0.75)}, curve)
    text = (tmp_path / "README.md").read_text()
    for words in (
        "`vlm4rec train-captioner x`",
        "1,200 photos; left out: 2 html page.",
        "seed 0; 1.5 minutes on a GPU",
        "| kind | 2 | 61 | 0.500 | 0.250 | 0.750 |",
        "## Licence\n\nCC0.",
        "EfficientNet-Lite0",
    ):
        assert words in text
    with Image.open(tmp_path / "curve.png") as curve_there:
        assert curve_there.width > 600


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "Name at least one --attribute"),
        (["--attribute", "kind="], "--attribute kind=: write it as ours=theirs"),
        (["--attribute", "kind=a", "--attribute", "kind=b"], "each of ours once"),
        (["--attribute", "kind=group"], "it has no column group"),
    ],
)
def test_wrong_use_is_said_before_any_work(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["train-captioner", str(table), "--out", str(tmp_path / "out"), *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    assert (
        main(
            ["train-captioner", str(table), "--out", str(tmp_path), "--attribute", "kind=category"]
        )
        == 2
    )
    assert "it holds something that isn't a model" in " ".join(capsys.readouterr().err.split())


def test_the_command_makes_a_model_with_its_card(table: Path, tmp_path: Path) -> None:
    command = [
        "train-captioner",
        str(table),
        "--out",
        str(tmp_path / "mine"),
        "--attribute",
        "kind=category",
        "--seen",
        "24",
        "--batch",
        "12",
        "--licence",
        "Ours.",
    ]
    assert main(command) == 0
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "--attribute kind=category --seen 24 --batch 12 --rate 0.001 --seed 0`" in text
    assert "| kind | 2 |" in text
    assert {file.name for file in (tmp_path / "mine").iterdir()} >= {
        "model.safetensors",
        "curve.png",
        "config.json",
    }
