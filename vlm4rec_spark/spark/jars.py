"""Delta's jar files: where they are, and their one download. Knows no Spark session.

Not by spark.jars.packages: that fetches 31 more jars, most of them Spark's own, and prints a report
at every start. It also looks for the home folder in the password file and not at HOME.
Python downloads them, because it knows the network's certificates (SSL_CERT_FILE) and its proxy
(HTTPS_PROXY). Java doesn't.
"""

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
ORGANIZATION = "io.delta"
SHA256 = {
    "delta-spark_4.2_2.13": "27d4fd8b1f879535c573ed1c718177d6a27f24d3e626ba02e216369725721ead",
    "delta-storage": "c46735481fa8e326b0957be02b4420cbcab4b325bb08009b7f2045a95133f1cc",
}
"""The jars by name, and the checksum of each."""
NAMES = tuple(SHA256)
REPOSITORY = "https://repo1.maven.org/maven2/io/delta"


def find(local: Sequence[Path], ivy: Path) -> list[Path]:
    """The local jar files if any, else those in the Ivy folder of `spark-submit --packages`.

    Missing ones are downloaded into the Ivy folder. Raises UsageError when a local file doesn't
    exist or the download fails.
    """
    for jar in local:
        if not jar.is_file():
            raise UsageError(f"spark.delta_jars: there is no file {jar}.")
    if local:
        return list(local)
    jars = {name: ivy / "jars" / f"{ORGANIZATION}_{name}-{DELTA_VERSION}.jar" for name in NAMES}
    missing = {name: jar for name, jar in jars.items() if not jar.is_file()}
    if missing:
        log.info("Downloading the Delta jars (10 MB) into %s, once", ivy / "jars")
    for name, jar in missing.items():
        _download(name, jar)
    return list(jars.values())


def _download(name: str, jar: Path) -> None:
    """Download one jar, completely or not at all."""
    url = f"{REPOSITORY}/{name}/{DELTA_VERSION}/{name}-{DELTA_VERSION}.jar"
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise OSError("the download has another checksum")
        jar.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetching-", dir=jar.parent) as folder:
            Path(folder, jar.name).write_bytes(content)
            Path(folder, jar.name).replace(jar)
    except (OSError, HTTPException) as error:
        files = " and ".join(f"{jar_name}-{DELTA_VERSION}.jar" for jar_name in NAMES)
        raise UsageError(
            f"The Delta jars can't be downloaded: {url} ({error}). This needs a network, once. "
            f"Without one, set spark.delta_jars to local copies of {files}."
        ) from None
