"""Figures to SVG for the page: intervals per arm, time per stage, photos per value.

Knows matplotlib; knows no table and no HTML page.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm4rec_spark.report.data import MetricRow, StageRun, arm_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlm4rec_spark.storage.state import CalibrationState, TriedEffort

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
_DECADE = 10
"""Speeds whose ratio exceeds this get a logarithmic axis."""
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
            axes.text(
                0,
                row,
                "too few users",
                va="center",
                color=MUTED,
                size=9,
            )
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
    axes.text(
        high + gap,
        row,
        number,
        va="center",
        color=color,
        size=9,
    )


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


def durations(runs: Sequence[StageRun]) -> str:
    """Seconds per stage, in the given order, top to bottom."""
    longest = max((run.seconds for run in runs), default=0) or 1

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        for row, run in enumerate(runs):
            color = ACCENT if run.seconds == longest else SOFT
            label = f"{run.seconds:,.1f} s"
            axes.barh(row, run.seconds, height=0.56, color=color)
            axes.text(
                run.seconds + 0.012 * longest,
                row,
                label,
                va="center",
                color=INK,
                size=9,
            )
        axes.set_yticks(range(len(runs)), [run.stage.replace("_", " ") for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * longest)

    return _svg(draw, width=4.4, height=0.5 + 0.27 * len(runs))


def recall_curve(calibration: CalibrationState, k: str) -> str:
    """Recall against speed: the tried settings with their lower bounds, one line per number of
    candidates.

    Marks the promise, exact search and the chosen setting.
    """

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        counts = sorted({effort.candidates for effort in calibration.tried})
        for candidates, color, marker in zip(counts, _SHADES, "os^vP", strict=False):
            efforts = [effort for effort in calibration.tried if effort.candidates == candidates]
            efforts.sort(key=lambda effort: effort.leaves)
            _draw_efforts(axes, efforts, color, marker)
        _draw_exact_and_chosen(axes, calibration)
        axes.axhline(
            calibration.target_recall,
            color=ACCENT,
            linewidth=1,
            linestyle=(0, (4, 2)),
            label=f"promise: {calibration.target_recall}",
        )
        _scale_speeds(axes, calibration)
        axes.set_ylabel(f"recall@{k}, 1 = all that exact search finds", size=9)
        axes.figure.legend(
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            loc="outside lower left",
            ncols=2,
        )

    # Narrow, so that its words can still be read on a telephone.
    return _svg(draw, width=5.2, height=4.2)


def _draw_efforts(
    axes: Axes,
    efforts: Sequence[TriedEffort],
    color: str,
    marker: str,
) -> None:
    """A line through efforts with the same number of candidates, their leaves at both ends."""
    below = [effort.recall - effort.low for effort in efforts]
    above = [0.0] * len(efforts)
    axes.errorbar(
        [effort.lists_per_second for effort in efforts],
        [effort.recall for effort in efforts],
        [below, above],
        color=color,
        marker=marker,
        markersize=4,
        linewidth=1,
        capsize=3,
        label=f"{efforts[0].candidates:,} candidates",
    )
    for effort, offset in ((efforts[0], (0, -15)), (efforts[-1], (-12, 0))):
        axes.annotate(
            f"{effort.leaves:,}",
            (effort.lists_per_second, effort.recall),
            offset,
            size=9,
            color=MUTED,
            textcoords="offset points",
            ha="center",
            va="center",
        )


def _draw_exact_and_chosen(axes: Axes, calibration: CalibrationState) -> None:
    exact = calibration.exact_lists_per_second
    chosen = calibration.chosen
    if exact:
        axes.plot(
            [exact],
            [1],
            "D",
            color=INK,
            markerfacecolor="white",
            markersize=6,
            label="exact search",
        )
    if chosen:
        speed = chosen.lists_per_second
        recall = chosen.recall
        label = f"chosen: {chosen.leaves:,} leaves"
    elif exact:
        speed = exact
        recall = 1.0
        label = "chosen: exact search"
    else:
        return
    axes.plot(
        [speed],
        [recall],
        "o",
        color=ACCENT,
        markerfacecolor="none",
        markersize=13,
        markeredgewidth=1.8,
        label=label,
    )


def _scale_speeds(axes: Axes, calibration: CalibrationState) -> None:
    speeds = [effort.lists_per_second for effort in calibration.tried]
    if calibration.exact_lists_per_second:
        speeds.append(calibration.exact_lists_per_second)
    if max(speeds) > _DECADE * min(speeds) > 0:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.08, y=0.08)
    axes.set_xlabel("lists a second, one process on the driver")


def values(counts: Sequence[tuple[str, int]]) -> str:
    """How many photos have each value, in the given order, top to bottom."""

    highest = max(count for _, count in counts)

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        for row, (_, count) in enumerate(counts):
            axes.barh(row, count, height=0.56, color=ACCENT if count == highest else SOFT)
            axes.text(
                count + 0.02 * highest,
                row,
                f"{count:,}",
                va="center",
                color=INK,
                size=9,
            )
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
