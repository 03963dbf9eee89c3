"""What was unusual in the data that was taken, and how it was handled. Knows the stages' run
details; no HTML."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlm4rec_spark.report.data import ReportData, group_of_details

_ERROR_CLASSES = {
    "empty": "Photos without a single byte",
    "not_an_image": "Photos that are something else",
    "html_page": "Photos that are a web page under a photo's name",
    "svg": "Photos that are an SVG drawing under a photo's name",
    "unsupported": "Photos in a format that isn't decoded",
    "truncated": "Photos that end early or are damaged",
    "too_large": "Photos with too many pixels to decode",
    "too_small": "Photos with a side of only a few pixels",
    "blank": "Photos of a single color",
    "empty_caption": "Photos for which the model answered nothing",
    "too_short": "Photos with a caption of fewer than three words",
    "refusal": "Photos that the model refused to describe",
    "echo": "Photos for which the model repeated its prompt",
    "repetition": "Photos for which the model repeated itself",
    "unreadable": "Photos that could no longer be read",
    "changed_since": "Photos that had changed since they were ingested",
    "bad_attributes": "Photos for which the model gave no usable JSON",
    "model_died": "Photos on which the model's process died",
    "model_hung": "Photos on which the model gave no answer in time",
    "out_of_memory": "Photos on which the model ran out of memory",
}
# A photo's kind is its format and its traits, such as "JPEG, CMYK".
_TRAITS = {
    "CMYK": ("Photos in printing colors (CMYK)", "converted to RGB"),
    "transparent": ("Photos with transparency", "placed on white"),
    "turned by EXIF": ("Photos that the camera marks as turned", "turned upright"),
    "animated": ("Animated photos", "first frame used"),
}
_REPEATED = {
    "items": ("Catalogue rows that repeat another", "taken once"),
    "photos": ("Photos that were already there, unchanged", "not read again"),
    "interactions": ("Events that repeat another", "counted once"),
}


@dataclass(frozen=True)
class DataIssue:
    """How often something unusual occurred, and how it was handled."""

    what: str
    count: int
    handling: str


def data_issues(data: ReportData) -> list[DataIssue]:
    """In the order of the pipeline: photos, catalogue, log, users, texts. Issues that didn't occur
    are left out."""
    issues = (*_photos(data), *_log_and_users(data), *_text_issues(data))
    return [issue for issue in issues if issue.count]


def _photos(data: ReportData) -> Iterator[DataIssue]:
    for error_class, count in data.captions.failed_classes.items():
        what = _ERROR_CLASSES.get(error_class, f"Photos on which the model failed: {error_class}")
        yield DataIssue(what, count, "no caption; the item's title is used")
    yield DataIssue(
        "Photos whose exact bytes another item also has",
        data.photos.shared_photos,
        f"{data.photos.shared_contents:,} distinct, each captioned once",
    )
    sampled = ""
    if data.photos.sampled < data.counts.get("photos", 0):
        sampled = f" (in a sample of {data.photos.sampled:,} photos)"
    for trait, (what, handling) in _TRAITS.items():
        counts = [count for kind, count in data.photos.kinds.items() if trait in kind.split(", ")]
        yield DataIssue(what, sum(counts), handling + sampled)
    without_photo = _int(data.details("ingest"), "items_without_photo")
    yield DataIssue("Items without a photo", without_photo, "their title is used")


def _log_and_users(data: ReportData) -> Iterator[DataIssue]:
    for source in data.sources:
        what, handling = _REPEATED[source.name]
        yield DataIssue(what, source.skipped, handling)
    ingest = data.details("ingest")
    yield DataIssue(
        "Events on items that the catalogue lacks",
        _int(ingest, "unknown_item_events"),
        "stored, but not used",
    )
    yield DataIssue(
        "Items without any event",
        _int(ingest, "untouched_items"),
        "can be recommended all the same",
    )
    profiles = data.details("profiles")
    yield DataIssue(
        "Users with more events in a day than a person makes",
        _int(profiles, "bot_users"),
        f"treated as bots; their {_int(profiles, 'bot_events'):,} events are not used",
    )
    yield DataIssue(
        "Users without a usable history",
        _int(profiles, "users_without_history"),
        "no profile, so no list of their own",
    )


def _text_issues(data: ReportData) -> Iterator[DataIssue]:
    embed = data.details("embed")
    yield DataIssue("Items without a caption", _int(embed, "fallback"), "their title is encoded")
    text_problems = group_of_details(embed, "text_problems")
    yield DataIssue(
        "Titles and captions with scripts",
        _int(text_problems, "scripts"),
        "the scripts aren't encoded",
    )
    yield DataIssue(
        "Titles and captions with markup",
        _int(text_problems, "markup"),
        "the markup isn't encoded",
    )
    yield DataIssue(
        "Titles and captions that are too long",
        _int(text_problems, "too_long"),
        "encoded up to embed.max_words",
    )
    identical = group_of_details(embed, "identical_vectors")
    for representation in sorted(identical):
        yield DataIssue(
            f"Items whose {representation.replace('_', ' + ')} vector another item also has",
            _int(identical, representation),
            "told apart only by their id",
        )


def _int(details: Mapping[str, object], key: str) -> int:
    try:
        return int(float(str(details.get(key, 0))))
    except ValueError:
        return 0
