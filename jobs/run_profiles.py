"""spark-submit entry point: events into user profiles."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["profiles", *sys.argv[1:]]))
