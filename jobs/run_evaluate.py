"""spark-submit entry point: held-out events to metrics."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["evaluate", *sys.argv[1:]]))
