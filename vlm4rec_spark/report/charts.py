"""Figures to SVG for the page: intervals per arm and slice, photos per value.

Knows matplotlib; knows no table and no HTML page.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm4rec_spark.report.data import MetricRow, arm_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlm4rec_spark.storage.state import CalibrationState

INK = "#1f2328"
MUTED = "#6a6f76"
RULE = "#d9d6cf"
ACCENT = "#c2410c"
SOFT = "#f0c4a8"
_SHADES = ("#1f2328", "#6a6f76", "#3d6b8e", "#7a5c99", "#8a8f3c")
_LABEL_LENGTH = 24
"""Characters of a label at most."""
_AXIS_LENGTH = 60
"""Characters of all labels that fit side by side under half a page."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vlm4rec_spark",  # else ids are random and no two pages equal
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's typeface
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}


class ForestPanel(NamedTuple):
    """One metric per arm, in the order of the arms; None for an arm without the metric."""

    title: str
    metrics: Sequence[MetricRow | None]


class SlicePanel(NamedTuple):
    """Labels along the axis, and by arm a metric at each of them."""

    title: str
    slices: Sequence[str]
    lines: Mapping[str, Sequence[MetricRow | None]]


def forest(
    panels: Sequence[ForestPanel],
    arms: Sequence[str],
    highlight: str,
) -> str:
    """A forest plot: values with 95 % intervals, one panel per metric, arms top to bottom.

    Values on both sides of 0, such as differences, get a line at 0. Those whose interval contains 0
    are hollow.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for panel_axes, panel in zip(axes, panels, strict=True):
            _draw_forest_panel(panel_axes, panel, arms, highlight)
        axes[0].set_yticks(range(len(arms)), [arm_label(arm) for arm in arms])
        axes[0].set_ylim(len(arms) - 0.5, -0.5)

    return _svg(draw, width=10.5, height=0.75 + 0.3 * len(arms), panels=len(panels))


def _draw_forest_panel(
    axes: Axes,
    panel: ForestPanel,
    arms: Sequence[str],
    highlight: str,
) -> None:
    valid = [metric for metric in panel.metrics if metric and metric.value is not None]
    right = max((metric.high or metric.value or 0 for metric in valid), default=0) or 1e-3
    left = min((metric.low or 0 for metric in valid), default=0)
    left = min(left, 0)
    span = right - left
    for row, (arm, metric) in enumerate(zip(arms, panel.metrics, strict=True)):
        color = ACCENT if arm == highlight else INK
        if metric and metric.value is None:
            _write(axes, 0, row, "too few users", MUTED)
        elif metric:
            _draw_interval(
                axes,
                row,
                metric,
                color,
                signed=left < 0,
                gap=0.03 * span,
            )
    if left < 0:
        axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_title(panel.title, loc="left", size=10, color=INK, fontweight="semibold")
    axes.set_xlim(1.12 * left, right + 0.3 * span)


def _draw_interval(
    axes: Axes,
    row: int,
    metric: MetricRow,
    color: str,
    signed: bool,
    gap: float,
) -> None:
    """A dot for the value, a bar for its interval, and the number `gap` to the right of it."""
    value = metric.value or 0.0
    low = value if metric.low is None else metric.low
    high = value if metric.high is None else metric.high
    axes.hlines(
        row,
        0,
        value,
        color=RULE,
        linewidth=1,
        linestyle=(0, (1, 2)),
    )
    axes.hlines(
        row,
        low,
        high,
        color=color,
        linewidth=3.5,
        alpha=0.35,
    )
    hollow = signed and low <= 0 <= high
    fill = "white" if hollow else color
    axes.plot(
        [value],
        [row],
        "o",
        color=color,
        markerfacecolor=fill,
        markersize=4.5,
    )
    number = f"{value:+.3f}" if signed else f"{value:.3f}"
    _write(axes, high + gap, row, number, color)


def _write(axes: Axes, x: float, row: int, text: str, color: str) -> None:
    """At the height of a row."""
    axes.text(x, row, text, va="center", color=color, size=9)


def multiples(panels: Sequence[SlicePanel], highlight: str) -> str:
    """Small multiples: points with intervals, by slice along the axis and by arm in color."""
    metrics = [
        metric for panel in panels for line in panel.lines.values() for metric in line if metric
    ]
    top = max((metric.high or 0 for metric in metrics), default=0) or 1e-3

    def draw(axes: Sequence[Axes]) -> None:
        for panel_axes, panel in zip(axes, panels, strict=True):
            for number, (arm, line) in enumerate(panel.lines.items()):
                color = ACCENT if arm == highlight else _SHADES[number % len(_SHADES)]
                offset = 0.07 * (number - len(panel.lines) / 2)
                # Names, unlike numbers, have no order that a line could follow.
                connected = all(name[0].isdigit() for name in panel.slices)
                style = "o-" if connected else "o"
                _draw_slice_line(
                    panel_axes,
                    line,
                    offset,
                    style,
                    color,
                    arm_label(arm),
                )
            _label_slices(panel_axes, panel)
            panel_axes.set_ylim(0, 1.05 * top)
        axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")

    rows = -(-len(panels) // 2)
    return _svg(
        draw,
        width=9.6,
        height=2.5 * rows,
        panels=len(panels),
        columns=2,
        shared=False,
    )


def _draw_slice_line(
    axes: Axes,
    line: Sequence[MetricRow | None],
    offset: float,
    style: str,
    color: str,
    label: str,
) -> None:
    positions: list[float] = []
    values: list[float] = []
    for number, metric in enumerate(line):
        if metric is None or metric.value is None:
            continue
        positions.append(number + offset)
        values.append(metric.value)
        if metric.low is not None and metric.high is not None:
            axes.vlines(
                number + offset,
                metric.low,
                metric.high,
                color=color,
                linewidth=2,
                alpha=0.3,
            )
    axes.plot(
        positions,
        values,
        style,
        color=color,
        markersize=3,
        linewidth=1,
        label=label,
    )


def _label_slices(axes: Axes, panel: SlicePanel) -> None:
    axes.set_title(panel.title, loc="left", size=10, color=INK, fontweight="semibold")
    longest = max(len(line) for name in panel.slices for line in name.split("\n"))
    wide = longest * len(panel.slices) > _AXIS_LENGTH
    axes.set_xticks(
        range(len(panel.slices)),
        list(panel.slices),
        size=8,
        rotation=20 if wide else 0,
        ha="right" if wide else "center",
    )
    axes.set_xlim(-0.6, len(panel.slices) - 0.4)
    axes.grid(axis="y", color=RULE, linewidth=0.6)


def recall_curve(calibration: CalibrationState) -> str:
    """Recall against speed of the tried efforts with their lower bounds; the chosen one is full."""

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        speeds = [effort.lists_per_second for effort in calibration.tried]
        recalls = [effort.recall for effort in calibration.tried]
        lows = [effort.low for effort in calibration.tried]
        axes.vlines(speeds, lows, recalls, color=MUTED)
        axes.plot(speeds, recalls, "o", color=MUTED)
        axes.axhline(calibration.target_recall, color=ACCENT, linestyle="dashed")
        if chosen := calibration.chosen:
            axes.plot(chosen.lists_per_second, chosen.recall, "o", color=ACCENT)
        axes.set_xlabel("lists a second, one process")
        axes.set_ylabel("recall")

    return _svg(draw, width=5.2, height=3.4)


def values(counts: Sequence[tuple[str, int]]) -> str:
    """How many photos have each value, in the given order, top to bottom."""

    highest = max(count for _, count in counts)

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        for row, (_, count) in enumerate(counts):
            axes.barh(row, count, height=0.56, color=ACCENT if count == highest else SOFT)
            _write(axes, count + 0.02 * highest, row, f"{count:,}", INK)
        axes.set_yticks(range(len(counts)), [_shortened(value) for value, _ in counts])
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_xlim(0, 1.25 * highest)
        axes.set_xticks([])

    return _svg(draw, width=3.7, height=0.3 + 0.27 * len(counts))


def _shortened(text: str) -> str:
    if len(text) <= _LABEL_LENGTH:
        return text
    return text[: _LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _svg(
    draw: Callable[[Sequence[Axes]], None],
    width: float,
    height: float,
    panels: int = 1,
    columns: int | None = None,
    shared: bool = True,
) -> str:
    import matplotlib

    # Figure itself, not pyplot: no global state, no display.
    from matplotlib.figure import Figure

    columns = min(columns or panels, panels)
    rows = -(-panels // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=shared and panels > 1, squeeze=False)
        for axes in grid.flat[:panels]:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0, pad=6)
            if shared:
                axes.grid(axis="x", color=RULE, linewidth=0.6)
                axes.locator_params(axis="x", nbins=4)
            axes.set_axisbelow(True)
        for axes in grid.flat[panels:]:
            axes.set_axis_off()
        draw(list(grid.flat[:panels]))
        return _inline(figure)


def _inline(figure: Figure) -> str:
    """The figure as an <svg> that can stand in a page next to others."""
    out = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", metadata=metadata)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # The HTML parser knows SVG's namespaces; without them the page holds no address at all.
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        r'<svg \1 aria-hidden="true" focusable="false">',
        svg,
        count=1,
    )
    svg = svg.replace("xlink:href", "href")
    # A style sheet would apply to the whole page, and the typeface is the page's.
    unwanted = r'(?<=<g) id="[^"]*"|<style.*?</style>|font-family: [^;]*;'
    svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    # matplotlib uses the same ids in every figure. Only markers and clip paths are referred to;
    # they get a prefix of this figure's own.
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'(id="|url\(#|href="#)', rf"\1c{prefix}-", svg).strip()
