"""spark-submit entry point: small files joined, old ones deleted, old index versions gone."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["maintain", *sys.argv[1:]]))
