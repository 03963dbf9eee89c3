"""Delta's jar files: where they are, and how they get there once. Knows no Spark session.

They are not left to spark.jars.packages: that drags in 31 more jars, most of them Spark's own again, prints a report
into every start, and asks Java for the home folder, which looks in the password file and not at HOME.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm4rec_spark.errors import UsageError

log = logging.getLogger(__name__)

DELTA_VERSION = "4.4.0"
ORGANISATION = "io.delta"
NAMES = ("delta-spark_4.2_2.13", "delta-storage")


def find(named: Sequence[Path], ivy: Path, java: Path) -> list[Path]:
    """The jar files that were named, else those in the Ivy folder, where `spark-submit --packages` keeps them too.

    Fetched into it when they are missing. Raises UsageError when a named file isn't there or the fetching fails.
    """
    for jar in named:
        if not jar.is_file():
            raise UsageError(f"spark.delta_jars: there is no file {jar}.")
    if named:
        return list(named)
    jars = [ivy / "jars" / f"{ORGANISATION}_{name}-{DELTA_VERSION}.jar" for name in NAMES]
    if not all(jar.is_file() for jar in jars):
        log.info("Fetching the Delta jars (10 MB) into %s, once", ivy / "jars")
        _fetch(ivy / "jars", java)
    return jars


def _fetch(target: Path, java: Path) -> None:
    """Puts the jars into `target`, each whole or not at all, by the Ivy that comes with Spark."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetching-", dir=target) as name:
            folder = Path(name)
            failure = _ivy(folder, java, [])
            if "PKIX" in failure and (store := _trust_store(folder)):
                # A network with a certificate of its own, which this Java doesn't know; Python may.
                trust = {"trustStore": store, "trustStoreType": "jks"}
                failure = _ivy(folder, java, [f"-Djavax.net.ssl.{key}={value}" for key, value in trust.items()])
            if not failure:
                for jar in (folder / "jars").iterdir():
                    jar.replace(target / jar.name)
    except (OSError, subprocess.SubprocessError) as stopped:
        failure = str(stopped)
    if failure:
        files = " and ".join(f"{name}-{DELTA_VERSION}.jar" for name in NAMES)
        raise UsageError(
            f"The Delta jars can't be fetched into {target} ({failure}). It takes a network, once; "
            f"without one, point spark.delta_jars to local copies of {files}."
        )


def _ivy(folder: Path, java: Path, options: list[str]) -> str:
    """Fetches into `folder`/jars; returns why it failed, or nothing."""
    import pyspark

    spark_jars = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent, "jars")
    needed = "".join(
        f'<dependency org="{ORGANISATION}" name="{name}" rev="{DELTA_VERSION}" transitive="false" conf="*->default"/>'
        for name in NAMES
    )
    module = folder / "ivy.xml"
    module.write_text(
        '<ivy-module version="2.0"><info organisation="vlm4rec" module="delta"/>'
        f"<dependencies>{needed}</dependencies></ivy-module>"
    )
    command = [str(java), *options, "-cp", f"{spark_jars}/*", "org.apache.ivy.Main", "-error", "-ivy", str(module)]
    command += ["-cache", f"{folder}/cache", "-retrieve", f"{folder}/jars/[organisation]_[artifact]-[revision].[ext]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    return next((line for line in lines if "Exception" in line), "Ivy found no such jars, or no network")


def _trust_store(folder: Path) -> Path | None:
    """The certificates that Python trusts (SSL_CERT_FILE, or the system's) as a Java key store, None without any."""
    certificates = ssl.create_default_context().get_ca_certs(binary_form=True)
    content = struct.pack(">III", 0xFEEDFEED, 2, len(certificates))
    for number, certificate in enumerate(certificates):
        alias = str(number).encode()
        content += struct.pack(">IH", 2, len(alias)) + alias + struct.pack(">QH", 0, 5) + b"X.509"
        content += struct.pack(">I", len(certificate)) + certificate
    # The digest that closes a JKS file: the password in UTF-16, a fixed phrase, the content.
    content += hashlib.sha1("changeit".encode("utf-16-be") + b"Mighty Aphrodite" + content).digest()
    store = folder / "trust.jks"
    store.write_bytes(content)
    return store if certificates else None
