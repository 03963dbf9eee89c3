"""spark-submit entry point: photos to captions."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["caption", *sys.argv[1:]]))
