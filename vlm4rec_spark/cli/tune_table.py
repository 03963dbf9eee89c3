"""The result of `tune`, as a table for people and as a configuration file."""

from datetime import UTC, datetime
from pathlib import Path

import yaml
from rich.console import Console

from vlm4rec_spark import __version__
from vlm4rec_spark.cli.table_style import new_table
from vlm4rec_spark.evaluation.tune import Trial, Tuned, overrides

_SHOWN = 8


def write(tuned: Tuned, out: Path) -> None:
    """The best settings as YAML, all trials as comments above them."""
    content_arm = overrides(tuned.best_content.serving) | {"item_item": {"share": 0.0}}
    settings = overrides(tuned.best.serving)
    settings["evaluate"] = {"custom_arms": {"content": content_arm}}
    comments = "".join(f"# {line}".rstrip() + "\n" for line in _comments(tuned))
    tmp = out.with_name(f"{out.name}.tmp")
    tmp.write_text(comments + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    tmp.replace(out)


def _comments(tuned: Tuned) -> list[str]:
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    cut = f", cut {tuned.cut}" if tuned.cut else ""
    return [
        f"By vlm4rec tune {__version__} on {today}: the best of {len(tuned.trials)} settings by "
        f"{tuned.metric}@{tuned.k}",
        f"on {tuned.users:,} users and {tuned.candidates:,} candidates of the split "
        f"{tuned.split}{cut}.",
        "`vlm4rec evaluate` measures them on events that took no part in the choice.",
        "",
        *(_comment(trial, tuned) for trial in tuned.trials),
    ]


def show(tuned: Tuned, console: Console) -> None:
    """The best trials as a table."""
    title = f"Best of {len(tuned.trials)} settings on {tuned.split}"
    figures = (f"recall@{tuned.k}", f"ndcg@{tuned.k}", f"95 % of {tuned.metric}")
    table = new_table(title, ("last changed",), figures)
    ranked = sorted(tuned.trials, key=lambda trial: -tuned.value(trial))[:_SHOWN]
    if tuned.best_content not in ranked:
        ranked.append(tuned.best_content)
    for trial in ranked:
        name = trial.description if trial.blended else f"{trial.description} (content only)"
        table.add_row(name, f"{trial.recall:.4f}", f"{trial.ndcg:.4f}", _interval(trial))
    console.print(table)


def _comment(trial: Trial, tuned: Tuned) -> str:
    marks = {id(tuned.best_content): " <- best content", id(tuned.best): " <- best"}
    mark = marks.get(id(trial), "")
    metrics = f"recall {trial.recall:.4f}  ndcg {trial.ndcg:.4f}  {_interval(trial)}"
    return f"{metrics}  {trial.description}{mark}"


def _interval(trial: Trial) -> str:
    return f"[{trial.low:.4f}, {trial.high:.4f}]"
