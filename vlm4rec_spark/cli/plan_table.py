"""The tables of `vlm4rec plan`. Knows the terminal; the figures come from the pipeline."""

from rich.console import Console
from rich.table import Table

from vlm4rec_spark.caption.estimate import CaptionPlan
from vlm4rec_spark.caption.settings import CaptionSettings


def show(
    plan: CaptionPlan,
    settings: CaptionSettings,
    console: Console,
) -> None:
    """How many photos get a caption and why the others don't, then time and price."""
    console.print(_photos(plan))
    console.print(_effort(plan, settings))


def _photos(plan: CaptionPlan) -> Table:
    table = Table(title="Photos to caption", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("photos", f"{plan.wanted:,}", end_section=True)
    rows = {
        "reused: captioned before": plan.reused,
        "kept: captioned by another prompt or model": plan.kept,
        "given up: failed, not tried again": plan.given_up,
        "duplicates: same bytes as another photo": plan.duplicates,
    }
    for name, photos in rows.items():
        table.add_row(name, f"{photos:,}")
    table.add_row("[bold]to caption[/]", f"[bold]{plan.to_caption:,}[/]")
    for reason, photos in plan.reasons.items():
        table.add_row(f"  {reason.replace('_', ' ')}", f"{photos:,}")
    if plan.now < plan.to_caption:
        table.add_row("within the budget, items with most events first", f"{plan.now:,}")
    return table


def _effort(plan: CaptionPlan, settings: CaptionSettings) -> Table:
    rates = plan.rates
    title = f"Time and price of {plan.now:,} photos"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    speed = f"{rates.photos_per_second:,.3g} photos/s, {rates.speed}"
    table.add_row("device-hours", f"{plan.device_hours:,.3g}", speed)
    per_photo = f"{rates.input_tokens:,.0f} per photo, {rates.tokens}"
    table.add_row("input tokens", f"{plan.input_tokens:,}", per_photo)
    per_photo = f"{rates.output_tokens:,.0f} per photo, {rates.tokens}"
    table.add_row("output tokens", f"{plan.output_tokens:,}", per_photo)
    if settings.prices.any:
        table.add_row("cost", f"{plan.cost:,.2f}")
    else:
        table.add_row("cost", "–", "no price is set in caption.prices")
    return table
