"""What `tune` has found, for people and as a configuration file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from vlm4rec_spark import __version__
from vlm4rec_spark.evaluation.tune import Trial, Tuned, overrides

_SHOWN = 8


def write(tuned: Tuned, out: Path) -> None:
    """The best settings as YAML, the evidence as comments above them."""
    best, content = overrides(tuned.best.serving), overrides(tuned.best_content.serving)
    of_content = {
        "representation": content["representation"],
        "profiles": content["profiles"],
        "item_item": {"share": 0.0},
    }
    settings = {**best, "evaluate": {"custom_arms": {"content": of_content}}}
    cut = f", cut {tuned.cut}" if tuned.cut else ""
    lines = [
        f"By vlm4rec tune {__version__} on {datetime.now(UTC):%Y-%m-%d}: the best of {len(tuned.trials)} settings by "
        f"{tuned.metric}@{tuned.k}",
        f"on {tuned.users:,} users and {tuned.candidates:,} candidates of the split {tuned.split}{cut}.",
        "What they reach on events that chose nothing, `vlm4rec evaluate` says.",
        "",
        *(_line(trial, tuned) for trial in tuned.trials),
    ]
    beside = out.with_name(f"{out.name}.tmp")
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    beside.write_text(comments + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    beside.replace(out)


def show(tuned: Tuned, console: Console) -> None:
    """The best trials as a table."""
    table = Table(
        title=f"Best of {len(tuned.trials)} settings on {tuned.split}", title_justify="left"
    )
    for name in ("last changed", f"recall@{tuned.k}", f"ndcg@{tuned.k}", f"95 % of {tuned.metric}"):
        table.add_column(name, justify="left" if name == "last changed" else "right")
    ranked = sorted(tuned.trials, key=lambda trial: -getattr(trial, tuned.metric))[:_SHOWN]
    for trial in ranked if tuned.best_content in ranked else [*ranked, tuned.best_content]:
        name = trial.description if trial.blended else f"{trial.description} (content only)"
        table.add_row(
            name, f"{trial.recall:.4f}", f"{trial.ndcg:.4f}", f"[{trial.low:.4f}, {trial.high:.4f}]"
        )
    console.print(table)


def _line(trial: Trial, tuned: Tuned) -> str:
    mark = (
        " <- best"
        if trial is tuned.best
        else " <- best content"
        if trial is tuned.best_content
        else ""
    )
    return (
        f"recall {trial.recall:.4f}  ndcg {trial.ndcg:.4f}  [{trial.low:.4f}, {trial.high:.4f}]  "
        f"{trial.description}{mark}"
    )
