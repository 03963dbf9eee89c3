"""How the command line speaks: words for people, or JSON lines for a cluster's log. Knows no command."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging import LogRecord

from rich.console import Console
from rich.markup import escape

OURS = logging.getLogger("vlm4rec_spark")


def speak(as_json: bool, **context: str) -> None:
    """Choose how; `context` (run_id, stage) goes into every JSON line."""
    OURS.handlers = [_Lines(context) if as_json else _Words()]
    OURS.setLevel(logging.INFO)
    OURS.propagate = False


class _Words(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)

    def emit(self, record: LogRecord) -> None:
        said = escape(record.getMessage())
        if record.levelno >= logging.ERROR:
            said = f"[bold red]Error:[/] {said}"
        elif hasattr(record, "figures"):
            said = f"{datetime.fromtimestamp(record.created):%H:%M:%S} {said}"
        elif record.levelno == logging.INFO:
            said = f"[dim]  {said}[/]"
        self._console.print(said, soft_wrap=True, highlight=False)


class _Lines(logging.StreamHandler):
    def __init__(self, context: dict[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        figures = getattr(record, "figures", {})
        line = {
            "at": at,
            "level": record.levelname,
            **self._context,
            "message": record.getMessage(),
            **figures,
        }
        return json.dumps(line, ensure_ascii=False)
