"""spark-submit entry point: catalogue, photos and log to tables."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["ingest", *sys.argv[1:]]))
