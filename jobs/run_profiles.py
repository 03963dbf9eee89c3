"""spark-submit entry point: events to user profiles."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["profiles", *sys.argv[1:]]))
