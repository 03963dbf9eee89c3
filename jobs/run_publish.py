"""spark-submit entry point: recommendations to the tables that consumers read."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["publish", *sys.argv[1:]]))
