"""The table that the packaged captioner was trained on: `benchmarks/captioner_data.py OUT.parquet`.

Its sources are folders next to the project's (`../shared/data`) and the demo: studio photos of
fashion, people's snapshots of clothing, and renderings of the demo's products. Knows the split, and
the words for the labels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vlm4rec_spark.demo.drawing import ATTRIBUTES, render

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLIT_SEED = 0
_TEST_SHARE = 0.13
TRAIN_SEED = 1_000_000
TEST_SEED = 2_000_000
"""First seeds of the training and held-out renderings; the demo's shop has seeds below a million.
"""
RENDERINGS = 40_000
WEIGHTS = 1.0, 3.0, 0.3
_USES = {
    "classic": "the office and dinners",
    "sporty": "training and weekends",
    "romantic": "dates and summer parties",
    "rustic": "cabins and long walks",
}

KINDS = {
    "Tshirts": "t-shirt",
    "Kurtas": "kurta",
    "Kurtis": "kurti",
    "Tunics": "tunic",
    "Tops": "top",
    "Shirts": "shirt",
    "Watches": "watch",
    "Handbags": "handbag",
    "Wallets": "wallet",
    "Belts": "belt",
    "Backpacks": "backpack",
    "Dresses": "dress",
    "Sarees": "saree",
    "Sweatshirts": "sweatshirt",
    "Clutches": "clutch",
    "Caps": "cap",
    "Sweaters": "sweater",
    "Jackets": "jacket",
    "Ties": "tie",
    "Innerwear Vests": "undershirt",
    "Skirts": "skirt",
    "Scarves": "scarf",
    "Stoles": "stole",
    "Free Gifts": "free gift",
    "Kurta Sets": "kurta set",
    "Mufflers": "muffler",
    "Camisoles": "camisole",
    "Tracksuits": "tracksuit",
    "Basketballs": "basketball",
    "Footballs": "football",
    "Rucksacks": "rucksack",
    "Wristbands": "wristband",
    "Umbrellas": "umbrella",
    "Nehru Jackets": "nehru jacket",
    "Lounge Tshirts": "lounge t-shirt",
    "Blazers": "blazer",
    "Face Moisturisers": "face moisturiser",
    "Jewellery Set": "jewellery set",
    "Boxers": "boxer shorts",
    "Trunk": "trunks",
    "Shoe Laces": "shoelaces",
    "Ipad": "tablet computer",
    "Cushion Covers": "cushion cover",
    "Shoe Accessories": "shoe accessory",
}
"""Article types whose word isn't the type itself in lower case."""
USES = {
    "Casual": "everyday use",
    "Sports": "sports",
    "Ethnic": "ethnic wear",
    "Formal": "formal wear",
    "Smart Casual": "smart casual wear",
    "Party": "parties",
    "Travel": "travel",
    "Home": "the home",
}
COLOURS = {"Multi": "multicoloured", "Skin": "skin-coloured"}
_AUDIENCES = (
    ("boys", r"boys?"),
    ("girls", r"girls?"),
    ("women", r"wom[ae]n|ladies"),
    ("men", r"m[ae]n|gents"),
    ("men and women", r"unisex"),
    ("children", r"kids?|children"),
)
SNAPSHOT_KINDS = {
    "T-Shirt": "t-shirt",
    "Pants": "pants",
    "Longsleeve": "long-sleeved shirt",
    "Shirt": "shirt",
    "Dress": "dress",
    "Shoes": "shoes",
    "Outwear": "outerwear",
    "Shorts": "shorts",
    "Hat": "hat",
    "Skirt": "skirt",
    "Undershirt": "undershirt",
    "Polo": "polo shirt",
    "Blazer": "blazer",
    "Hoodie": "hoodie",
    "Body": "bodysuit",
    "Top": "top",
    "Blouse": "blouse",
}

CLASSES = {
    "dress": ("dress",),
    "hat": ("hat", "cap"),
    "longsleeve": ("long-sleeved shirt", "sweatshirt", "sweater", "hoodie"),
    "outwear": ("outerwear", "jacket", "blazer", "rain jacket"),
    "pants": (
        "pants",
        "trousers",
        "jeans",
        "track pants",
        "lounge pants",
        "leggings",
        "jeggings",
        "tights",
        "capris",
    ),
    "shirt": ("shirt", "blouse"),
    "shoes": (
        "shoes",
        "casual shoes",
        "sports shoes",
        "formal shoes",
        "heels",
        "flats",
        "sandals",
        "sports sandals",
        "flip flops",
        "booties",
    ),
    "shorts": ("shorts", "lounge shorts", "boxer shorts", "trunks"),
    "skirt": ("skirt",),
    "t-shirt": ("t-shirt", "lounge t-shirt"),
}
"""What counts as right for a class of `clothing-photos`; chosen before any had a caption."""

_PALETTE = (
    ("black", (24, 24, 26)),
    ("charcoal", (58, 60, 63)),
    ("grey", (128, 128, 130)),
    ("white", (238, 238, 236)),
    ("beige", (214, 198, 168)),
    ("brown", (104, 70, 46)),
    ("brown", (150, 112, 76)),
    ("red", (178, 28, 38)),
    ("maroon", (98, 24, 36)),
    ("pink", (232, 152, 176)),
    ("pink", (226, 70, 120)),
    ("orange", (226, 112, 40)),
    ("yellow", (232, 200, 66)),
    ("green", (56, 122, 62)),
    ("green", (26, 70, 54)),
    ("green", (150, 186, 80)),
    ("olive", (104, 106, 62)),
    ("turquoise", (64, 178, 178)),
    ("blue", (62, 104, 178)),
    ("blue", (78, 104, 140)),
    ("blue", (150, 186, 224)),
    ("navy blue", (32, 40, 74)),
    ("purple", (110, 62, 138)),
    ("purple", (92, 40, 74)),
)
"""The colours of the colour words of snapshots, sRGB: chosen by eye."""


def audience(title: str) -> str | None:
    """The audience that a title names first; children only if there is no other.

    Women in "Women's Boyfriend Jeans", and boys in "Kids Boys Shirt".
    """
    matches = [
        (name == "children", match.start(), name)
        for name, words in _AUDIENCES
        if (match := re.search(rf"\b({words})('?s)?\b", title.lower()))
    ]
    return min(matches)[-1] if matches else None


def fashion(folder: Path) -> pd.DataFrame:
    """One row per studio photo: image, title, article_type, base_colour, usage, gender, test.

    And the caption's words: kind, colour, use, audience. `test` is a seeded choice of groups, so
    that no photo's bytes and no title are on both sides.
    """
    files = sorted(folder.glob("part-*.parquet"))
    rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    rows["gender"] = rows["title"].map(audience)
    rows["kind"] = rows["article_type"].map(lambda kind: KINDS.get(kind, kind.lower()))
    rows["colour"] = rows["base_colour"].map(
        lambda name: COLOURS.get(name, str(name).lower()), na_action="ignore"
    )
    rows["use"] = rows["usage"].map(USES, na_action="ignore")
    rows["audience"] = rows["gender"]
    rows["test"] = _is_test(rows)
    return rows


def _is_test(rows: pd.DataFrame) -> np.ndarray:
    """Photos that share bytes or a title, directly or through others, are chosen together."""
    digest = rows["image"].map(lambda data: hashlib.sha256(data).hexdigest())
    title = rows["title"].str.lower().str.split().str.join(" ")
    group = np.arange(len(rows))
    while True:
        before = group.copy()
        for key in (digest, title):
            group = pd.Series(group).groupby(key.to_numpy()).transform("min").to_numpy()
        if (group == before).all():
            break
    return np.random.default_rng(SPLIT_SEED).random(len(rows))[group] < _TEST_SHARE


def snapshots(folder: Path) -> pd.DataFrame:
    """One row per labelled snapshot: image, kind, measured colour, audience, sender_id.

    The audience is known only for children's clothes.
    """
    rows = pd.read_parquet(folder / "photos.parquet")
    rows["kind"] = rows["label"].map(SNAPSHOT_KINDS)
    rows["colour"] = rows["image"].map(main_colour)
    rows["audience"] = np.where(rows["kids"], "children", None)
    return rows


def main_colour(photo: bytes) -> str:
    """The name of the commonest colour in the photo's middle, where the product is, by CIELAB."""
    with Image.open(io.BytesIO(photo)) as image:
        small = image.convert("RGB").resize((48, 48), Image.Resampling.BOX)
    # Snapshots are taken in dim rooms: what is lightest in the photo counts as nearly white.
    lightest = max(60.0, float(np.percentile(small.convert("L"), 97)))
    exposed = np.asarray(small, float) * (235 / lightest)
    middle = Image.fromarray(exposed.clip(0, 255).astype(np.uint8)).crop((14, 14, 34, 34))
    reduced = middle.quantize(4, method=Image.Quantize.MEDIANCUT, kmeans=4)
    counts = sorted(reduced.getcolors() or [], reverse=True)
    palette = np.array(reduced.getpalette() or [], float).reshape(-1, 3)
    commonest = _lab(palette[counts[0][1]])
    names = [name for name, _ in _PALETTE]
    colours = np.array([_lab(np.array(rgb, float)) for _, rgb in _PALETTE])
    return names[int(((colours - commonest) ** 2).sum(axis=1).argmin())]


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of an sRGB colour (0 to 255), D65."""
    share = rgb / 255
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(matrix) @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def renderings(count: int, first: int = TRAIN_SEED) -> pd.DataFrame:
    """One row per drawing of a demo product: image, attributes, and the demo's sentence."""
    with ProcessPoolExecutor() as pool:
        return pd.DataFrame(list(pool.map(_drawn, range(first, first + count), chunksize=100)))


def _drawn(seed: int) -> dict[str, object]:
    attributes, photo = render(seed)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=92)
    return {"image": file.getvalue(), **attributes, "caption": sentence(attributes)}


def sentence(attributes: Mapping[str, str]) -> str:
    """The true description of a drawn product with these attributes."""
    look = " ".join(attributes[name] for name in ("colour", "pattern", "material", "kind"))
    return f"A {look} in a {attributes['style']} style, for {_USES[attributes['style']]}."


def table(
    parts: Sequence[str], data: Path, count: int, weights: Sequence[float] = WEIGHTS
) -> pd.DataFrame:
    """The training table: photo, caption, weight and attributes; no fashion photo of the test.

    `weights`: how often a studio photo, a snapshot and a rendering are seen.
    """
    frames = []
    if "fashion" in parts:
        rows = fashion(data / "fashion")
        train = rows.loc[~rows["test"], ["image", "kind", "colour", "audience", "use"]]
        frames.append(train.assign(weight=weights[0]))
    if "snapshots" in parts:
        rows = snapshots(data / "clothing-labelled")
        frames.append(rows[["image", "kind", "colour", "audience"]].assign(weight=weights[1]))
    if "renderings" in parts:
        rows = renderings(count)
        frames.append(rows[["image", *ATTRIBUTES, "caption"]].assign(weight=weights[2]))
    return pd.concat(frames, ignore_index=True)


def clothing_photos(folder: Path) -> pd.DataFrame:
    """One row per photo of the test-only folder: image, class_name."""
    files = sorted(folder.glob("*/*.*"))
    return pd.DataFrame(
        {
            "image": [file.read_bytes() for file in files],
            "class_name": [file.parent.name for file in files],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--renderings", type=int, default=RENDERINGS)
    parser.add_argument("--parts", nargs="+", default=["fashion", "snapshots", "renderings"])
    parser.add_argument(
        "--weights",
        type=float,
        nargs=3,
        default=WEIGHTS,
        metavar=("STUDIO", "SNAPSHOT", "RENDERING"),
    )
    options = parser.parse_args()
    out = options.out
    rows = table(options.parts, options.data, options.renderings, options.weights)
    unfinished = out.with_suffix(".tmp")
    rows.to_parquet(unfinished, index=False)
    unfinished.replace(out)
    print(f"{len(rows):,} photos in {out}, {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
