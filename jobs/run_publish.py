"""spark-submit entry point: recommendations into what consumers read."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["export", *sys.argv[1:]]))
