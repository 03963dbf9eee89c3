"""The HTML report: collects from the tables, renders one page, writes it. Knows the order of these
steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.report.data import ReportSettings

if TYPE_CHECKING:
    from vlm4rec_spark.storage.state import StageState
    from vlm4rec_spark.storage.tables import Tables


def write(tables: Tables, states: Mapping[str, StageState], settings: ReportSettings) -> Path:
    """Write the page to `settings.path`, whole or not at all. Raises RunError if it can't be
    written."""
    # Here, so that the config can import ReportSettings without Jinja2 and matplotlib.
    from vlm4rec_spark.report.collect import collect
    from vlm4rec_spark.report.page import render

    path = Path(settings.path)
    page = render(collect(tables, states, settings))
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(page, encoding="utf-8")
        tmp.replace(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise RunError(f"report.path: {path} can't be written ({error}).") from None
    return path
