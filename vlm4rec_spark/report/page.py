"""`ReportData` to one self-contained HTML page. Knows Jinja2 and how figures are written for people; knows no Spark."""

from __future__ import annotations

import math
from datetime import datetime
from statistics import median

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from vlm4rec_spark import __version__
from vlm4rec_spark.report import caption_audit_section, charts
from vlm4rec_spark.report.data import Metric, ReportData, ShownPhoto, arm_name
from vlm4rec_spark.report.data_quality import findings
from vlm4rec_spark.report.metrics_section import headline, splits
from vlm4rec_spark.report.recall_curve import calibration

_LONG_CAPTION = 140
"""Characters from which captions stand beside their photo instead of under it."""


def render(data: ReportData) -> str:
    """The page. Titles, captions and ids come from strangers: everything is escaped but the charts."""
    # Without the file ending that Jinja2 goes by, autoescape has to be said.
    pages = Environment(
        loader=PackageLoader("vlm4rec_spark.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "count": _count,
        "share": _share,
        "duration": _duration,
        "moment": _moment,
        "size": _size,
        "interval": _interval,
        "alt": _alt,
        "arm": arm_name,
        "p_value": _p_value,
        "audited": _audited,
    }
    tried = calibration(data.run("recommend"))
    return pages.get_template("report.html.j2").render(
        data=data,
        headline=headline(data),
        splits=splits(data),
        audits=caption_audit_section.audits(data),
        trouble=caption_audit_section.trouble(data),
        findings=findings(data),
        details={run.stage: run.details for run in data.runs},
        attributes={
            name: charts.values(counts) for name, counts in data.captions.attributes.items()
        },
        durations=charts.durations(data.runs) if data.runs else "",
        long_captions=median([len(photo.caption or "") for photo in data.captions.samples] or [0])
        > _LONG_CAPTION,
        columns=lambda table: list(dict.fromkeys(name for row in table.values() for name in row)),
        recall_lost=_recall_lost(data),
        calibration=tried,
        recall_curve=charts.recall_curve(tried) if tried else "",
        svg=Markup,
        version=__version__,
    )


def _recall_lost(data: ReportData) -> str:
    """What the index of the lists in use misses of an exact search's lists, "" where search is exact."""
    run = data.run("recommend")
    try:
        lost = 1 - float(run.details["recall_measured"]) if run else 0.0
    except (KeyError, ValueError):
        return ""
    return _share(lost) if lost > 0 else ""


def _count(number: object) -> str:
    """1234567 as 1,234,567 and 2.50 as 2.5, numbers in text too; anything else as it is."""
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
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _moment(time: object) -> str:
    """A UTC time, or one written in ISO 8601; anything else as it is."""
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
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _interval(metric: Metric) -> str:
    return (
        "" if metric.low is None or metric.high is None else f"{metric.low:.3f}–{metric.high:.3f}"
    )


def _audited(metric: Metric, number: bool) -> Markup:
    """A share or a number, with its interval below."""
    write = _count if number else _share
    ends = (
        ""
        if metric.low is None or metric.high is None
        else f"{write(metric.low)}–{write(metric.high)}"
    )
    return Markup('{}<span class="low-high">{}</span>').format(write(metric.value), ends)


def _alt(photo: ShownPhoto) -> str:
    return ": ".join(part for part in (photo.title or photo.item_id, photo.caption) if part)


def _p_value(metric: Metric | None) -> str:
    if metric is None or metric.p_value is None:
        return "–"
    return "< 0.001" if metric.p_value < 0.001 else f"{metric.p_value:.3f}"
