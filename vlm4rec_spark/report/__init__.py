"""The HTML report: collects from the tables, renders one page, writes it. Knows the order of the three."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.report.data import ReportSettings

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables


def write(tables: Tables, settings: ReportSettings) -> Path:
    """Write the page to `settings.path`, whole or not at all. Raises RunError when it can't be written."""
    # Here, so that reading the config, which knows ReportSettings, loads neither Jinja2 nor matplotlib.
    from vlm4rec_spark.report.collect import collect
    from vlm4rec_spark.report.page import render

    path = Path(settings.path)
    page = render(collect(tables, settings))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError as refused:
        aside.unlink(missing_ok=True)
        raise RunError(f"report.path: {path} can't be written ({refused}).") from None
    return path
