"""The command line's messages: text for people, or JSON lines for a cluster's log."""

import json
import logging
from datetime import UTC, datetime
from logging import LogRecord

from rich.console import Console
from rich.markup import escape

LOG = logging.getLogger("vlm4rec_spark")


def configure(as_json: bool, **context: str) -> None:
    """Choose the format; `context` (run_id, stage) goes into every JSON line."""
    LOG.handlers = [_JsonLines(context) if as_json else _Text()]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


class _Text(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)

    def emit(self, record: LogRecord) -> None:
        text = escape(record.getMessage())
        if record.levelno >= logging.ERROR:
            text = f"[bold red]Error:[/] {text}"
        elif hasattr(record, "figures"):
            text = f"{datetime.fromtimestamp(record.created):%H:%M:%S} {text}"
        elif record.levelno == logging.INFO:
            text = f"[dim]  {text}[/]"
        self._console.print(text, soft_wrap=True, highlight=False)


class _JsonLines(logging.StreamHandler):
    def __init__(self, context: dict[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self._context,
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        return json.dumps(line, ensure_ascii=False)
