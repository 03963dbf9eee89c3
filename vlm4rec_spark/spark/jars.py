"""Delta's jar files: where they are, and how they get there once. Knows no Spark session.

They are not left to spark.jars.packages: that drags in 31 more jars, most of them Spark's own again, prints a report
into every start, and asks Java for the home folder, which looks in the password file and not at HOME. Python fetches
them, because it knows the network's own certificates (SSL_CERT_FILE) and its proxy (HTTPS_PROXY); Java doesn't.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from vlm4rec_spark.errors import UsageError

log = logging.getLogger(__name__)

DELTA_VERSION = "4.4.0"
ORGANISATION = "io.delta"
SHA256 = {
    "delta-spark_4.2_2.13": "27d4fd8b1f879535c573ed1c718177d6a27f24d3e626ba02e216369725721ead",
    "delta-storage": "c46735481fa8e326b0957be02b4420cbcab4b325bb08009b7f2045a95133f1cc",
}
"""The jars by name, and the checksum of each."""
NAMES = tuple(SHA256)
REPOSITORY = "https://repo1.maven.org/maven2/io/delta"


def find(named: Sequence[Path], ivy: Path) -> list[Path]:
    """The jar files that were named, else those in the Ivy folder, where `spark-submit --packages` keeps them too.

    Fetched into it when they are missing. Raises UsageError when a named file isn't there or the fetching fails.
    """
    for jar in named:
        if not jar.is_file():
            raise UsageError(f"spark.delta_jars: there is no file {jar}.")
    if named:
        return list(named)
    jars = {name: ivy / "jars" / f"{ORGANISATION}_{name}-{DELTA_VERSION}.jar" for name in NAMES}
    missing = {name: jar for name, jar in jars.items() if not jar.is_file()}
    if missing:
        log.info("Fetching the Delta jars (10 MB) into %s, once", ivy / "jars")
    for name, jar in missing.items():
        _fetch(name, jar)
    return list(jars.values())


def _fetch(name: str, jar: Path) -> None:
    """Download one jar, whole or not at all."""
    url = f"{REPOSITORY}/{name}/{DELTA_VERSION}/{name}-{DELTA_VERSION}.jar"
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise OSError("what came has another checksum")
        jar.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetching-", dir=jar.parent) as folder:
            Path(folder, jar.name).write_bytes(content)
            Path(folder, jar.name).replace(jar)
    except (OSError, HTTPException) as failure:
        files = " and ".join(f"{other}-{DELTA_VERSION}.jar" for other in NAMES)
        raise UsageError(
            f"The Delta jars can't be fetched: {url} ({failure}). It takes a network, once; "
            f"without one, point spark.delta_jars to local copies of {files}."
        ) from None
