"""What was unusual in the data although it was taken, and what became of it. Knows the stages' figures; no HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlm4rec_spark.report.data import ReportData, StageRun, figures

_BROKEN = {
    "empty": "Photos without a single byte",
    "not_an_image": "Photos that are something else",
    "html_page": "Photos that are a web page under a photo's name",
    "svg": "Photos that are an SVG drawing under a photo's name",
    "unsupported": "Photos of a kind that isn't decoded here",
    "truncated": "Photos that end early or are damaged",
    "too_large": "Photos with more pixels than are decoded",
    "too_small": "Photos with a side of a few pixels only",
    "blank": "Photos of one colour all over",
    "empty_caption": "Photos of which the model said nothing",
    "too_short": "Photos of which the model said fewer than three words",
    "refusal": "Photos that the model refused to describe",
    "echo": "Photos for which the model repeated its prompt",
    "repetition": "Photos for which the model repeated itself",
    "unreadable": "Photos that could not be read at their place any more",
    "changed_since": "Photos that were no longer those that had been ingested",
    "bad_attributes": "Photos for which the model gave no usable JSON",
    "model_died": "Photos over which the model's process ended",
    "model_hung": "Photos over which the model gave no answer in time",
    "out_of_memory": "Photos over which the model ran out of memory",
}
_KINDS = {
    "CMYK": ("Photos in printing colours (CMYK)", "converted to RGB"),
    "transparent": ("Photos with transparency", "laid on white"),
    "turned by EXIF": ("Photos that the camera says are turned", "turned upright"),
    "animated": ("Animated photos", "first frame taken"),
}
_REPEATED = {
    "items": ("Catalogue rows that repeat another", "taken once"),
    "photos": ("Photos that were there already, unchanged", "not read again"),
    "interactions": ("Events that repeat another", "counted once"),
}


@dataclass(frozen=True)
class Finding:
    """How often something was met, and what was done about it."""

    what: str
    count: int
    fate: str


def findings(data: ReportData) -> list[Finding]:
    """In the order of the data's way: photos, catalogue, log, users. What didn't occur is left out."""
    return [finding for finding in (*_photos(data), *_log(data), *_texts(data)) if finding.count]


def _photos(data: ReportData) -> Iterator[Finding]:
    for error_class, count in data.captions.failed_classes.items():
        what = _BROKEN.get(error_class, f"Photos on which the model failed with {error_class}")
        yield Finding(what, count, "no caption; the item goes by its title")
    yield Finding(
        "Photos whose very bytes another item has too",
        data.stock.shared_photos,
        f"{data.stock.shared_contents:,} distinct, each captioned once",
    )
    for word, (what, fate) in _KINDS.items():
        count = sum(n for kind, n in data.stock.kinds.items() if word in kind.split(", "))
        yield Finding(
            what,
            count,
            fate if _all_seen(data) else f"{fate} ({data.stock.looked_at:,} photos looked at)",
        )
    details = _details(data.run("ingest"))
    yield Finding(
        "Items without a photo", _int(details, "items_without_photo"), "go by their title"
    )


def _log(data: ReportData) -> Iterator[Finding]:
    for source in data.sources:
        what, fate = _REPEATED[source.name]
        yield Finding(what, source.skipped, fate)
    details = _details(data.run("ingest"))
    yield Finding(
        "Events of items that the catalogue lacks",
        _int(details, "unknown_item_events"),
        "kept, but count for nobody",
    )
    yield Finding(
        "Items that nobody touched",
        _int(details, "untouched_items"),
        "can be recommended all the same",
    )
    profiles = _details(data.run("profiles"))
    yield Finding(
        "Users with more events in a day than a person makes",
        _int(profiles, "bot_users"),
        f"taken for bots; their {_int(profiles, 'bot_events'):,} events count for nothing",
    )
    yield Finding(
        "Users without a usable history",
        _int(profiles, "users_without_history"),
        "no profile, so no list of their own",
    )


def _texts(data: ReportData) -> Iterator[Finding]:
    embed = _details(data.run("embed"))
    yield Finding(
        "Items without a caption", _int(embed, "fallback"), "their title is encoded instead"
    )
    untidy = {name: str(count) for name, count in figures(embed.get("text_problems")).items()}
    yield Finding(
        "Titles and captions with page scripts",
        _int(untidy, "scripts"),
        "the scripts aren't encoded",
    )
    yield Finding(
        "Titles and captions with markup", _int(untidy, "markup"), "the markup isn't encoded"
    )
    yield Finding(
        "Titles and captions that are too long",
        _int(untidy, "too_long"),
        "encoded up to embed.max_words",
    )
    identical = figures(embed.get("identical_vectors"))
    for representation in sorted(identical):
        yield Finding(
            f"Items whose {representation.replace('_', ' + ')} vector another item has too",
            _int({representation: str(identical[representation])}, representation),
            "told apart by nothing but their id",
        )


def _all_seen(data: ReportData) -> bool:
    return data.stock.looked_at >= data.counts.get("photos", 0)


def _details(run: StageRun | None) -> Mapping[str, str]:
    return run.details if run else {}


def _int(details: Mapping[str, str], key: str) -> int:
    try:
        return int(float(details.get(key, 0)))
    except ValueError:
        return 0
