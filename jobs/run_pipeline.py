"""spark-submit entry point: all stages, one after another."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["run", *sys.argv[1:]]))
