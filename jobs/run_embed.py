"""spark-submit entry point: texts to vectors."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["embed", *sys.argv[1:]]))
