"""What `vlm4rec plan` shows. Knows the terminal; the figures come from the pipeline."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vlm4rec_spark.caption.estimate import CaptionPlan
from vlm4rec_spark.caption.settings import CaptionSettings


def show(plan: CaptionPlan, settings: CaptionSettings, console: Console) -> None:
    """Photos by what becomes of them, then what that takes."""
    table = Table(title="Photos that shall have a caption", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("wanted", f"{plan.wanted:,}", end_section=True)
    rows = {
        "reused: the caption is there": plan.reused,
        "kept: the caption of another prompt or model does": plan.kept,
        "given up: failed, and not tried again": plan.given_up,
        "duplicates: the very bytes of another one": plan.duplicates,
    }
    for name, photos in rows.items():
        table.add_row(name, f"{photos:,}")
    table.add_row("[bold]to caption[/]", f"[bold]{plan.to_caption:,}[/]")
    for reason, photos in plan.reasons.items():
        table.add_row(f"  {reason.replace('_', ' ')}", f"{photos:,}")
    if plan.now < plan.to_caption:
        table.add_row("within the budget, the most wanted first", f"{plan.now:,}")
    console.print(table)
    rates = plan.rates
    takes = Table(title=f"What {plan.now:,} photos take", title_justify="left", show_header=False)
    takes.add_column()
    takes.add_column(justify="right")
    takes.add_column()
    speed = f"{rates.photos_per_second:,.3g} photos/s, {rates.speed}"
    takes.add_row("device-hours", f"{plan.device_hours:,.3g}", speed)
    takes.add_row(
        "input tokens", f"{plan.input_tokens:,}", f"{rates.input_tokens:,.0f} each, {rates.tokens}"
    )
    takes.add_row(
        "output tokens",
        f"{plan.output_tokens:,}",
        f"{rates.output_tokens:,.0f} each, {rates.tokens}",
    )
    cost = (
        (f"{plan.cost:,.2f}", "")
        if settings.prices.any
        else ("–", "no price is set in caption.prices")
    )
    takes.add_row("cost", *cost)
    console.print(takes)
