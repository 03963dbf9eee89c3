"""spark-submit entry point: vectors to an index."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["index", *sys.argv[1:]]))
