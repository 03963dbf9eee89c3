"""Training a captioner: tables of photos, resumed trainings, augmented photos, the model card."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hostile_photos import encoded
from PIL import Image

from vlm4rec_spark.cli import main
from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.training import augment, card, labelled, measure, network, train
from vlm4rec_spark.training.measure import Share

COLOURS = {"red": (190, 30, 30), "green": (30, 150, 40), "blue": (30, 60, 190)}
GOOD = 120


def photo(number: int, colour: str) -> bytes:
    rng = np.random.default_rng(number)
    pixels = np.full((40, 30, 3), 250, np.uint8)
    noise = rng.integers(-20, 20, (24, 18, 1))
    pixels[8:32, 6:24] = np.clip(np.array(COLOURS[colour]) + noise, 0, 255)
    return encoded(Image.fromarray(pixels), "PNG")


def rows() -> pd.DataFrame:
    """GOOD photos, then a copy of one, and four that can't be used."""
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
    bad = pd.DataFrame(
        {
            "photo": [b"", b"<html>", None, photo(999, "red")],
            "category": ["hat", "hat", "hat", None],
            "weight": 1.0,
        }
    )
    return pd.concat([good, good.iloc[[5]], bad], ignore_index=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("labelled") / "photos.parquet"
    rows().to_parquet(file)
    return file


def ignore(message: object) -> None:
    """Takes progress messages."""


def read(table: Path) -> labelled.Labelled:
    attributes = {"kind": "category", "colour": "shade"}
    return labelled.read(table, "photo", attributes, network.SIDE, table.parent / "work", ignore)


@pytest.fixture(scope="module")
def photos(table: Path) -> labelled.Labelled:
    return read(table)


def test_a_table_becomes_photos_words_and_labels(table, photos, monkeypatch):
    assert photos.photos.shape == (GOOD + 1, 3, 128, 128)
    assert photos.photos[3, :, 64, 64].argmax() == 0  # red
    assert photos.rejected == {"empty": 2, "html_page": 1, "unlabelled": 1}
    assert photos.values == {"kind": ["casual shoes", "hat"], "colour": ["blue", "green", "red"]}
    assert photos.labels["kind"][:3].tolist() == [0, 1, 0]
    assert photos.labels["colour"][:4].tolist() == [2, -1, 0, 2]
    assert photos.sentences[:4] == [
        "A hat of my own.",
        "This is a hat.",
        "Casual shoes in blue.",
        "This is a red hat.",
    ]
    assert photos.weights[:2].tolist() == [7.0, 1.0]
    assert 0 < photos.held_out.sum() < GOOD / 5
    assert photos.held_out[5] == photos.held_out[GOOD]  # a photo and its copy are on one side
    # A second reading decodes nothing.
    monkeypatch.setattr(labelled, "decode", None)
    assert (read(table).photos == photos.photos).all()


def test_a_csv_may_name_photos_by_their_path(tmp_path):
    (tmp_path / "files").mkdir()
    for number in range(100):
        (tmp_path / "files" / f"{number}.png").write_bytes(photo(number, "green"))
    lines = [f"files/{number}.png,hat" for number in range(100)] + ["files/gone.png,hat"]
    (tmp_path / "photos.csv").write_text("\n".join(["file,kind", *lines]))
    work = tmp_path / "work"
    csv = labelled.read(tmp_path / "photos.csv", "file", {"kind": "kind"}, 32, work, ignore)
    assert (len(csv.sentences), csv.rejected) == (100, {"unreadable": 1})
    assert csv.photos[0, :, 16, 16].argmax() == 1


def broken_table(folder: Path, name: str) -> Path:
    file = folder / f"{name}.parquet"
    if name == "text":
        file.write_text("no table")
    if name in ("few", "whole"):
        table = rows()
        table.iloc[-9:].to_parquet(file) if name == "few" else table.to_parquet(file)
    return file


@pytest.mark.parametrize(
    ("name", "column", "error", "message"),
    [
        ("gone", "category", UsageError, r"gone\.parquet: there is no such table"),
        (
            "whole",
            "group",
            UsageError,
            r"it has no column group; it has photo, category, shade, weight, caption\.",
        ),
        ("text", "category", UsageError, r"text\.parquet: it can't be read as Parquet"),
        (
            "few",
            "category",
            RunError,
            r"5 of 9 photos can be learnt from, at least 100 are needed\. Left out: .*html",
        ),
    ],
)
def test_a_table_that_can_not_be_used_is_an_error(
    tmp_path, name: str, column: str, error: type[Exception], message: str
):
    table = broken_table(tmp_path, name)
    with pytest.raises(error, match=message):
        labelled.read(table, "photo", {"kind": column}, 32, tmp_path / "work", ignore)


# Training


PLAN = train.TrainingPlan(seen=4 * 6, batch=6, seed=3)


def train_in(
    folder: Path,
    photos: labelled.Labelled,
    plan: train.TrainingPlan = PLAN,
    report: Callable[[str], None] = ignore,
) -> train.Training:
    """The checkpoint goes to the folder, and the model to its folder `model`."""
    return train.train(photos, folder / "model", folder, plan, report)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def first(photos: labelled.Labelled, tmp_path_factory) -> tuple[Path, train.Training]:
    """A trained captioner's folder, and its training."""
    folder = tmp_path_factory.mktemp("first")
    return folder / "model", train_in(folder, photos)


def test_a_training_has_a_curve(first):
    curve = first[1].curve
    assert (curve[-1].seen, set(curve[-1].right)) == (24, {"kind", "colour"})
    assert first[1].seconds > 0


def test_a_killed_training_goes_on_to_the_same_weights(
    photos,
    first,
    tmp_path,
    monkeypatch,
):
    save = train._save
    saved: list[Path] = []

    def save_and_die(checkpoint: Path, state: dict) -> None:
        save(checkpoint, state)
        saved.append(checkpoint)
        if len(saved) == 2:
            raise Killed

    messages: list[str] = []
    monkeypatch.setattr(train, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "_save", save_and_die)
    with pytest.raises(Killed):
        train_in(tmp_path, photos, PLAN, messages.append)
    train_in(tmp_path, photos, PLAN, messages.append)
    assert "going on from step 2 of 4" in messages
    assert messages[-1].startswith("24 of 24 photos seen, ")
    whole, resumed = (
        (folder / "model.safetensors").read_bytes() for folder in (first[0], tmp_path / "model")
    )
    assert whole == resumed
    message = r"checkpoint\.pt: it belongs to a training with other photos or settings"
    with pytest.raises(UsageError, match=message):
        train_in(tmp_path, photos, replace(PLAN, seen=30))


def words_of(text: str) -> set[str]:
    return set(text.lower().replace(".", "").replace(",", "").split())


def test_the_ordinary_backend_loads_a_trained_captioner(photos, first):
    (caption,) = measure.describe(first[0], [Image.new("RGB", (50, 50), (200, 0, 0))])
    assert words_of(caption) <= words_of(" ".join(photos.sentences))


def command(
    table: Path,
    out: Path,
    *options: str,
) -> list[str]:
    return ["train-captioner", str(table), "--out", str(out), *options]


def test_photos_are_drawn_by_weight_and_never_those_held_out(photos):
    _, processor = network.build(photos.sentences)
    data = train._Photos(photos, processor, "cpu")
    drawn = data.draw(20_000, np.random.default_rng(0))
    assert not photos.held_out[drawn].any()
    counts = np.bincount(drawn, minlength=len(photos.sentences))
    ordinary = (photos.weights == 1) & ~photos.held_out
    assert 6 < counts[0] / counts[ordinary].mean() < 8


# Augmented photos


def random_photos(count: int, side: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=rng)


def augmented(photos: torch.Tensor, seed: int) -> torch.Tensor:
    return augment.augment(photos, torch.Generator().manual_seed(seed))


def test_changed_photos_depend_on_the_seed_and_stay_photos():
    photos = random_photos(6, 64)
    changed = augmented(photos, 1)
    assert changed.shape == photos.shape
    assert torch.equal(changed, augmented(photos, 1))
    assert not torch.equal(changed, augmented(photos, 2))
    assert changed.abs().max() < 1.3
    assert torch.equal(augment.plain(photos), photos / 127.5 - 1)


def test_the_background_is_what_reaches_the_edge():
    photo = torch.ones(1, 3, 64, 64)
    photo[..., 16:48, 16:48] = 0.3
    photo[..., 28:36, 28:36] = 1.0  # a white print on the product
    cover = augment._background(photo)[0, 0]
    assert cover[:10].min() == 1
    assert cover[20:44, 20:44].max() == 0
    assert augment._background(torch.full((1, 3, 64, 64), 0.5)).max() == 0


# Figures and card


def test_shares_are_over_the_photos_whose_truth_is_known():
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


def test_the_card_says_where_the_model_comes_from(photos, tmp_path):
    plan = train.TrainingPlan(seen=192, batch=96, seed=0)
    curve = [train.Point(96, 5.0, {"kind": 0.1}), train.Point(192, 4.0, {"kind": 0.3})]
    training = train.Training(plan, curve, 90.0, "a GPU")
    photos = replace(photos, sentences=["A hat."] * 1_200, rejected={"html_page": 2})
    shares = {"kind": Share(61, 2, 0.5, 0.25, 0.75)}
    card.write(tmp_path, "vlm4rec train-captioner x", "x.parquet", photos, training, shares)
    text = " ".join((tmp_path / "README.md").read_text().split())
    for words in (
        "`vlm4rec train-captioner x`",
        "1,200 photos; left out: 2 html page.",
        "seed 0; 1.5 minutes on a GPU.",
        "| kind | 2 | 61 | 0.500 | 0.250 | 0.750 |",
        "Data: `x.parquet`.",
    ):
        assert words in text
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Name at least one --attribute"),
        (["--attribute", "kind="], "--attribute kind=: write it as name=column"),
        (["--attribute", "kind=a", "--attribute", "kind=b"], "each is given once"),
        (["--attribute", "kind=group"], "it has no column group"),
    ],
)
def test_wrong_options_are_errors_before_any_work(
    table,
    tmp_path,
    capsys,
    options: list[str],
    message: str,
):
    assert main(command(table, tmp_path / "out", *options)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_left_alone(
    table,
    tmp_path,
    capsys,
):
    (tmp_path / "letter.txt").write_text("Dear")
    assert main(command(table, tmp_path, "--attribute", "kind=category")) == 2
    assert "this folder has files but no model" in " ".join(capsys.readouterr().err.split())


def test_the_command_makes_a_model_with_its_card(table, tmp_path):
    out = tmp_path / "mine"
    options = "--attribute kind=category --seen 24 --batch 12"
    assert main(command(table, out, *options.split())) == 0
    text = (out / "README.md").read_text()
    choices = "--attribute=kind=category --seen=24 --batch=12 --seed=0`"
    assert f"{table} --out={out} --photo=photo {choices}" in text
    assert "| kind | 2 |" in text
    files = {file.name for file in out.iterdir()}
    assert files >= {"model.safetensors", "curve.png", "config.json"}
