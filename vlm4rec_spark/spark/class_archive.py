"""The classes of Spark and Delta as the JVM wants them in memory: it starts in half the time.

Java calls it class data sharing. The archive belongs to a virtual environment and is made once,
when that is set up: `python -m vlm4rec_spark.spark.class_archive`. Java ignores an archive that
doesn't fit its version or its jars, and a missing one costs nothing but time.
"""

import tempfile

from pyspark import SparkContext
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.spark import jars
from vlm4rec_spark.spark.session import ARCHIVE, QUIET_ARCHIVE, SparkSettings, session


def make() -> None:
    """Start Spark, do what every run does, and archive the classes that it took (200 MB)."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    ARCHIVE.unlink(missing_ok=True)
    settings = SparkSettings(driver_memory="1g")
    spark = session(settings, [f"-XX:ArchiveClassesAtExit={ARCHIVE}", *QUIET_ARCHIVE])
    print(f"Spark {spark.version} with Delta {jars.DELTA_VERSION} starts.")
    with tempfile.TemporaryDirectory() as folder:
        _use(spark, f"{folder}/table")
    spark.stop()
    jvm = SparkContext._gateway.proc  # type: ignore[union-attr]
    # It ends where its input does, and writes the archive then.
    jvm.stdin.close()
    jvm.wait()


def _use(spark: SparkSession, table: str) -> None:
    """Delta tables, joins, windows and Python workers."""
    rows = spark.range(100).selectExpr(
        "CAST(id AS STRING) AS id",
        "id % 7 AS n",
        "array(named_struct('score', 1D)) AS items",
        "current_timestamp() AS at",
    )
    spark.sql(
        f"CREATE TABLE delta.`{table}` (id STRING NOT NULL, n BIGINT, items ARRAY<STRUCT<score: "
        "DOUBLE>>, at TIMESTAMP) USING DELTA CLUSTER BY (id) "
        "TBLPROPERTIES ('delta.enableChangeDataFeed' = 'true')"
    )
    rows.write.format("delta").mode("append").save(table)
    changed = rows.mapInArrow(lambda batches: batches, rows.schema).withColumn("n", F.lit(9))
    spark.sql(
        f"MERGE INTO delta.`{table}` old USING {{new}} new ON old.id = new.id "
        "WHEN MATCHED AND old.n < 5 THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *",
        new=changed,
    ).collect()
    stored = spark.read.format("delta").load(table).persist()
    totals = stored.groupBy("n").agg(F.countDistinct("id"), F.max("at"))
    stored.join(totals, on="n", how="left").orderBy("id").toArrow()
    stored.selectExpr("id", "to_json(items)").write.csv(f"{table}-csv")
    spark.read.csv(f"{table}-csv").where("_c0 > '5'").count()


if __name__ == "__main__":
    make()
