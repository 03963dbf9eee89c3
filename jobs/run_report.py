"""spark-submit entry point: the tables into an HTML page."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["report", *sys.argv[1:]]))
