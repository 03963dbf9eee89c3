"""spark-submit entry point: profiles into everybody's top-k recommendations."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["recommend", *sys.argv[1:]]))
