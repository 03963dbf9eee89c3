"""spark-submit entry point: profiles to top-k recommendations."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["recommend", *sys.argv[1:]]))
