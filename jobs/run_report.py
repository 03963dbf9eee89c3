"""spark-submit entry point: tables to an HTML report."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["report", *sys.argv[1:]]))
