"""Figures to SVG for the page: intervals per arm, time per stage, photos per value.

Knows matplotlib; knows no table and no HTML page.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm4rec_spark.report.data import Metric, RecallCurve, StageRun, arm_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, SOFT = "#1f2328", "#6a6f76", "#d9d6cf", "#c2410c", "#f0c4a8"
_SHADES = ("#1f2328", "#6a6f76", "#3d6b8e", "#7a5c99", "#8a8f3c")
_LABEL_LENGTH, _ROOM = 24, 60
"""Characters of a label at most, and those that have room side by side under half a page."""
_DECADE = 10
"""Times the slowest from which speeds stand on a logarithmic axis."""
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


def forest(
    panels: Sequence[tuple[str, Sequence[Metric | None]]], arms: Sequence[str], highlight: str
) -> str:
    """A forest plot: one panel per (title, one metric per arm), values with 95 % intervals; arms top to bottom.

    Values on both sides of 0, such as differences, have a line at 0, and those whose interval crosses it are hollow.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for panel, (title, metrics) in zip(axes, panels, strict=True):
            _forest_panel(panel, title, metrics, arms, highlight)
        axes[0].set_yticks(range(len(arms)), [arm_name(arm) for arm in arms])
        axes[0].set_ylim(len(arms) - 0.5, -0.5)

    return _svg(draw, width=10.5, height=0.75 + 0.3 * len(arms), panels=len(panels))


def _forest_panel(
    panel: Axes, title: str, metrics: Sequence[Metric | None], arms: Sequence[str], highlight: str
) -> None:
    there = [metric for metric in metrics if metric and metric.value is not None]
    most = max((metric.high or metric.value or 0 for metric in there), default=0) or 1e-3
    least = min((metric.low or 0 for metric in there), default=0)
    signed = least < 0
    for place, (arm, metric) in enumerate(zip(arms, metrics, strict=True)):
        colour = ACCENT if arm == highlight else INK
        if metric is None or metric.value is None:
            panel.text(
                0,
                place,
                "" if metric is None else "too few users",
                va="center",
                color=MUTED,
                size=9,
            )
            continue
        low = metric.value if metric.low is None else metric.low
        high = metric.value if metric.high is None else metric.high
        panel.hlines(place, 0, metric.value, color=RULE, linewidth=1, linestyle=(0, (1, 2)))
        panel.hlines(place, low, high, color=colour, linewidth=3.5, alpha=0.35)
        filled = colour if not signed or low > 0 or high < 0 else "white"
        panel.plot(
            [metric.value], [place], "o", color=colour, markerfacecolor=filled, markersize=4.5
        )
        said = f"{metric.value:+.3f}" if signed else f"{metric.value:.3f}"
        panel.text(
            high + 0.03 * (most - min(least, 0)), place, said, va="center", color=colour, size=9
        )
    if signed:
        panel.axvline(0, color=MUTED, linewidth=0.8)
    panel.set_title(title, loc="left", size=10, color=INK, fontweight="semibold")
    panel.set_xlim(1.12 * min(least, 0), most + 0.3 * (most - min(least, 0)))


Panel = tuple[str, Sequence[str], Mapping[str, Sequence["Metric | None"]]]
"""Title, labels along the axis, and by arm a metric at each of them."""


def multiples(panels: Sequence[Panel], highlight: str) -> str:
    """Small multiples: per (title, slices, metrics of each arm by slice) points per arm, with their intervals."""
    most = (
        max(
            (
                metric.high or 0
                for _, _, lines in panels
                for line in lines.values()
                for metric in line
                if metric
            ),
            default=0,
        )
        or 1e-3
    )

    def draw(axes: Sequence[Axes]) -> None:
        for panel, (title, slices, lines) in zip(axes, panels, strict=True):
            for shade, (arm, line) in enumerate(lines.items()):
                colour = ACCENT if arm == highlight else _SHADES[shade % len(_SHADES)]
                points = [
                    (place + 0.07 * (shade - len(lines) / 2), metric)
                    for place, metric in enumerate(line)
                    if metric and metric.value is not None
                ]
                for x, metric in points:
                    if metric.low is not None and metric.high is not None:
                        panel.vlines(
                            x, metric.low, metric.high, color=colour, linewidth=2, alpha=0.3
                        )
                heights = [metric.value or 0.0 for _, metric in points]
                # Names, unlike numbers, are in no order that a line could follow.
                style = "o-" if all(name[0].isdigit() for name in slices) else "o"
                panel.plot(
                    [x for x, _ in points],
                    heights,
                    style,
                    color=colour,
                    markersize=3,
                    linewidth=1,
                    label=arm_name(arm),
                )
            panel.set_title(title, loc="left", size=10, color=INK, fontweight="semibold")
            wide = (
                max(len(line) for name in slices for line in name.split("\n")) * len(slices) > _ROOM
            )
            panel.set_xticks(
                range(len(slices)),
                list(slices),
                size=8,
                rotation=20 if wide else 0,
                ha="right" if wide else "center",
            )
            panel.set_xlim(-0.6, len(slices) - 0.4)
            panel.set_ylim(0, 1.05 * most)
            panel.grid(axis="y", color=RULE, linewidth=0.6)
        axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")

    return _svg(
        draw,
        width=9.6,
        height=2.5 * -(-len(panels) // 2),
        panels=len(panels),
        columns=2,
        shared=False,
    )


def durations(runs: Sequence[StageRun]) -> str:
    """Seconds per stage, in the order given, top to bottom."""

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        longest = max((run.seconds for run in runs), default=0) or 1
        for place, run in enumerate(runs):
            axes.barh(
                place, run.seconds, height=0.56, color=ACCENT if run.seconds == longest else SOFT
            )
            axes.text(
                run.seconds + 0.012 * longest,
                place,
                f"{run.seconds:,.1f} s",
                va="center",
                color=INK,
                size=9,
            )
        axes.set_yticks(range(len(runs)), [run.stage.replace("_", " ") for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * longest)

    return _svg(draw, width=4.4, height=0.5 + 0.27 * len(runs))


def recall_curve(found: RecallCurve) -> str:
    """Recall against speed: each setting down to its lower bound, one line per number of candidates; and the promise,
    exact search and what was taken."""

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        each_many = sorted({each.candidates for each in found.tried})
        for candidates, shade, marker in zip(each_many, _SHADES, "os^vP", strict=False):
            line = sorted(
                (each for each in found.tried if each.candidates == candidates),
                key=lambda each: each.leaves,
            )
            below, above = [each.recall - each.low for each in line], [0.0] * len(line)
            axes.errorbar(
                [each.per_second for each in line],
                [each.recall for each in line],
                [below, above],
                color=shade,
                marker=marker,
                markersize=4,
                linewidth=1,
                capsize=3,
                label=f"{candidates:,} candidates",
            )
            for each, aside in ((line[0], (0, -15)), (line[-1], (-12, 0))):
                axes.annotate(
                    f"{each.leaves:,}",
                    (each.per_second, each.recall),
                    aside,
                    size=9,
                    color=MUTED,
                    textcoords="offset points",
                    ha="center",
                    va="center",
                )
        if found.exact:
            axes.plot(
                [found.exact],
                [1],
                "D",
                color=INK,
                markerfacecolor="white",
                markersize=6,
                label="exact search",
            )
        place = (
            (found.taken.per_second, found.taken.recall) if found.taken else (found.exact or 0, 1)
        )
        if found.taken or found.exact:
            words = f"{found.taken.leaves:,} leaves" if found.taken else "exact search"
            axes.plot(
                [place[0]],
                [place[1]],
                "o",
                color=ACCENT,
                markerfacecolor="none",
                markersize=13,
                markeredgewidth=1.8,
                label=f"taken: {words}",
            )
        axes.axhline(
            found.promise,
            color=ACCENT,
            linewidth=1,
            linestyle=(0, (4, 2)),
            label=f"promise: {found.promise}",
        )
        speeds = [each.per_second for each in found.tried] + [
            found.exact or found.tried[0].per_second
        ]
        if max(speeds) > _DECADE * min(speeds) > 0:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel("lists a second, one process on the driver")
        axes.set_ylabel(f"recall@{found.k}, 1 = all that exact search finds", size=9)
        axes.figure.legend(
            frameon=False, fontsize=9, labelcolor=INK, loc="outside lower left", ncols=2
        )

    # Narrow, so that its words can still be read on a telephone.
    return _svg(draw, width=5.2, height=4.2)


def values(counts: Sequence[tuple[str, int]]) -> str:
    """How many photos have a value, in the order given, top to bottom."""

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        most = max(count for _, count in counts)
        for place, (_, count) in enumerate(counts):
            axes.barh(place, count, height=0.56, color=ACCENT if count == most else SOFT)
            axes.text(count + 0.02 * most, place, f"{count:,}", va="center", color=INK, size=9)
        axes.set_yticks(range(len(counts)), [_shortened(value) for value, _ in counts])
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_xlim(0, 1.25 * most)
        axes.set_xticks([])

    return _svg(draw, width=3.7, height=0.3 + 0.27 * len(counts))


def _shortened(text: str) -> str:
    return (
        text
        if len(text) <= _LABEL_LENGTH
        else text[: _LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )


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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(
            -(-panels // columns), columns, sharey=shared and panels > 1, squeeze=False
        )
        every = list(grid.flat)
        for axes in every[:panels]:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0, pad=6)
            if shared:
                axes.grid(axis="x", color=RULE, linewidth=0.6)
                axes.locator_params(axis="x", nbins=4)
            axes.set_axisbelow(True)
        for axes in every[panels:]:
            axes.set_axis_off()
        draw(every[:panels])
        return _inline(figure)


def _inline(figure: Figure) -> str:
    """The figure as an <svg> that can stand in a page among others."""
    out = io.StringIO()
    figure.savefig(
        out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
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
    # matplotlib names the parts of every figure alike. Nothing refers to them but to markers and clip paths, which get
    # a prefix that is this figure's own; its style sheet would hold for the whole page, and the typeface is the page's.
    svg = re.sub(
        r'(?<=<g) id="[^"]*"|<style.*?</style>|font-family: [^;]*;', "", svg, flags=re.DOTALL
    )
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'(id="|url\(#|href="#)', rf"\1c{own}-", svg).strip()
