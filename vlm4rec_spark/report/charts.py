"""Figures to SVG for the page: intervals per arm, time per stage, photos per value.

Knows matplotlib; knows no table and no HTML page.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlm4rec_spark.report.data import Metric, Run, arm_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, SOFT = "#1f2328", "#6a6f76", "#d9d6cf", "#c2410c", "#f0c4a8"
_LABEL_LENGTH = 24
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


def intervals(metrics: Sequence[Metric], highlight: str) -> str:
    """One metric's value and 95 % interval per arm, in the order given, top to bottom."""
    most = max((metric.high or metric.value or 0 for metric in metrics), default=0) or 1

    def draw(axes: Axes) -> None:
        for place, metric in enumerate(metrics):
            colour = ACCENT if metric.arm == highlight else INK
            if metric.value is None:
                axes.text(0, place, "too few users", va="center", color=MUTED, size=9)
                continue
            low = metric.value if metric.low is None else metric.low
            high = metric.value if metric.high is None else metric.high
            axes.hlines(place, 0, metric.value, color=RULE, linewidth=1, linestyle=(0, (1, 2)))
            axes.hlines(place, low, high, color=colour, linewidth=4, alpha=0.35)
            axes.plot([metric.value], [place], "o", color=colour, markersize=4.5)
            axes.text(high + 0.03 * most, place, f"{metric.value:.3f}", va="center", color=colour, size=9)
        axes.set_yticks(range(len(metrics)), [arm_name(metric.arm) for metric in metrics])
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * most)

    return _svg(draw, width=3.7, height=0.6 + 0.33 * len(metrics))


def durations(runs: Sequence[Run]) -> str:
    """Seconds per stage, in the order given, top to bottom."""

    def draw(axes: Axes) -> None:
        longest = max((run.seconds for run in runs), default=0) or 1
        for place, run in enumerate(runs):
            axes.barh(place, run.seconds, height=0.56, color=ACCENT if run.seconds == longest else SOFT)
            axes.text(run.seconds + 0.012 * longest, place, f"{run.seconds:,.1f} s", va="center", color=INK, size=9)
        axes.set_yticks(range(len(runs)), [run.stage.replace("_", " ") for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * longest)

    return _svg(draw, width=4.4, height=0.5 + 0.27 * len(runs))


def values(counts: Sequence[tuple[str, int]]) -> str:
    """How many photos have a value, in the order given, top to bottom."""

    def draw(axes: Axes) -> None:
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
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _svg(draw: Callable[[Axes], None], width: float, height: float) -> str:
    import matplotlib

    # Figure itself, not pyplot: no global state, no display.
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
        draw(axes)
        return _inline(figure)


def _inline(figure: Figure) -> str:
    """The figure as an <svg> that can stand in a page among others."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # The HTML parser knows SVG's namespaces; without them the page holds no address at all.
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    # matplotlib names the parts of every figure alike. Nothing refers to them but to markers and clip paths, which get
    # a prefix that is this figure's own; its style sheet would hold for the whole page, and the typeface is the page's.
    svg = re.sub(r'(?<=<g) id="[^"]*"|<style.*?</style>|font-family: [^;]*;', "", svg, flags=re.DOTALL)
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'(id="|url\(#|href="#)', rf"\1c{own}-", svg).strip()
