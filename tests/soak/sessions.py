"""Runs of the command line as sessions of their own, and the processes in them."""

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

RUN = "import sys; from vlm4rec_spark.cli import main; raise SystemExit(main(sys.argv[1:]))"


def start(
    command: str,
    settings: Iterable[str],
    folder: Path,
    log: Path,
) -> subprocess.Popen:
    """Start a command with these settings in the folder. Its output is appended to the log."""
    words = [sys.executable, "-c", RUN, command, "--config", "test.yaml"]
    words += [word for setting in settings for word in ("--set", setting)]
    with log.open("ab") as output:
        return subprocess.Popen(
            words,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
        )


def members(process: subprocess.Popen) -> list[psutil.Process]:
    """The living processes of the session that `process` leads."""
    living = []
    for member in psutil.process_iter():
        # It may have ended in the meantime.
        with suppress(OSError, psutil.Error):
            in_session = os.getsid(member.pid) == process.pid
            if in_session and member.status() != psutil.STATUS_ZOMBIE:
                living.append(member)
    return living


def called(process: subprocess.Popen, word: str) -> list[psutil.Process]:
    """Those of them whose command line has this word or a path that ends in it, as java's has."""
    matching = []
    for member in members(process):
        # It may have ended in the meantime.
        with suppress(psutil.Error):
            if any(part == word or part.endswith(f"/{word}") for part in member.cmdline()):
                matching.append(member)
    return matching


def kill_all(process: subprocess.Popen) -> None:
    for member in members(process):
        member.kill()
