"""spark-submit entry point: photos into captions."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["caption", *sys.argv[1:]]))
