"""`ReportData` to one self-contained HTML page. Knows Jinja2 and how figures are written for
people; knows no Spark."""

import math
from collections.abc import Mapping
from datetime import datetime
from statistics import median

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from vlm4rec_spark import __version__
from vlm4rec_spark.report import caption_audit_section, charts
from vlm4rec_spark.report.data import MetricRow, PhotoCard, ReportData, arm_label
from vlm4rec_spark.report.data_quality import data_issues
from vlm4rec_spark.report.metrics_section import headline, splits

_LONG_CAPTION = 140
"""Median characters above which captions stand next to their photo instead of under it."""
_BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def render(data: ReportData) -> str:
    """The page. Titles, captions and ids come from strangers: everything is escaped but the
    charts."""
    # The template names lack the ending by which Jinja2 would turn autoescape on.
    environment = Environment(
        loader=PackageLoader("vlm4rec_spark.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "alt": _alt,
        "arm": arm_label,
        "audited": _value_with_interval,
        "count": _count,
        "duration": _duration,
        "interval": _interval,
        "moment": _moment,
        "p_value": _p_value,
        "share": _share,
        "size": _size,
    }
    attributes = data.captions.attributes
    calibration = data.calibration
    caption_lengths = [len(photo.caption or "") for photo in data.captions.samples]
    return environment.get_template("report.html.j2").render(
        data=data,
        headline=headline(data),
        splits=splits(data),
        audits=caption_audit_section.audits(data),
        trouble=data.caption_audit.get("trouble"),
        data_issues=data_issues(data),
        details={run.stage: run.details for run in data.runs},
        attributes={name: charts.values(counts) for name, counts in attributes.items()},
        long_captions=median(caption_lengths or [0]) > _LONG_CAPTION,
        columns=_columns,
        recall_lost=_recall_lost(data),
        recall_curve=charts.recall_curve(calibration) if calibration and calibration.tried else "",
        svg=Markup,
        version=__version__,
    )


def _columns(table: Mapping[str, Mapping[str, MetricRow]]) -> list[str]:
    """The columns that any row of a table has."""
    return list(dict.fromkeys(name for row in table.values() for name in row))


def _recall_lost(data: ReportData) -> str:
    """The share of exact search's lists that the served index misses, "" if search is exact."""
    try:
        lost = 1 - float(data.details("recommend")["recall_measured"])
    except (KeyError, ValueError):
        return ""
    return _share(lost) if lost > 0 else ""


def _count(number: object) -> str:
    """1234567 as 1,234,567 and 2.50 as 2.5, also numbers in text; other text unchanged."""
    text = str(number)
    try:
        return f"{float(text):,.2f}".removesuffix("0").removesuffix(".0")
    except ValueError:
        return text


def _share(number: object) -> str:
    try:
        percent = 100 * float(str(number))
    except ValueError:
        return str(number)
    return f"{percent:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _moment(time: object) -> str:
    """A UTC time, as a datetime or in ISO 8601; other text unchanged."""
    if not isinstance(time, datetime):
        try:
            time = datetime.fromisoformat(str(time))
        except ValueError:
            return str(time)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"


def _size(number: object) -> str:
    try:
        size = float(str(number))
    except ValueError:
        return str(number)
    power = min(int(math.log10(max(size, 1))) // 3, len(_BYTE_UNITS) - 1)
    return f"{size / 1000**power:.3g} {_BYTE_UNITS[power]}"


def _interval(metric: MetricRow) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f"{metric.low:.3f}–{metric.high:.3f}"


def _value_with_interval(metric: MetricRow, number: bool) -> Markup:
    """A share or a number, with its interval below."""
    write = _count if number else _share
    interval = ""
    if metric.low is not None and metric.high is not None:
        interval = f"{write(metric.low)}–{write(metric.high)}"
    return Markup('{}<span class="low-high">{}</span>').format(write(metric.value), interval)


def _alt(photo: PhotoCard) -> str:
    return ": ".join(filter(None, (photo.title or photo.item_id, photo.caption)))


def _p_value(metric: MetricRow | None) -> str:
    if metric is None or metric.p_value is None:
        return "–"
    return "< 0.001" if metric.p_value < 0.001 else f"{metric.p_value:.3f}"
