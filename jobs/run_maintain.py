"""spark-submit entry point: join small files, delete old ones and old index versions."""

import sys

from vlm4rec_spark.cli import main

raise SystemExit(main(["maintain", *sys.argv[1:]]))
