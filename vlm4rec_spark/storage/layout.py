"""How a record of `schemas.py` becomes a Delta table, and whether an existing table is like it.

Knows DDL, table properties and schemas; reads and writes no rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql.types import (
    DataType,
    DateType,
    NumericType,
    StringType,
    StructType,
    TimestampType,
)

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.storage.schemas import LAYOUT, TABLES, Table

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_LAYOUT_KEY = "vlm4rec.layout"


def check(tables: Tables) -> None:
    """Check that this release can read every existing table. Changes nothing; raises RunError."""
    if tables.in_catalog and not tables.spark.catalog.databaseExists(tables.location):
        raise RunError(
            f"tables: there is no schema {tables.location}. Create it, or name a folder with a / "
            "in it."
        )
    for table in filter(tables.exists, TABLES.values()):
        name = tables.name_of(table)
        _check_layout(tables.properties(table), name)
        _check_schema(table, tables.stored_schema(table), name)


def create_statement(table: Table, sql_name: str) -> str:
    """The statement that creates the table where there is none.

    It is SQL, because names have at most two parts in Delta's builder, and three in a catalog.
    """
    cluster = f"CLUSTER BY ({', '.join(table.cluster)}) " if table.cluster else ""
    properties = [f"{_quoted(key)} = {_quoted(value)}" for key, value in properties_of(table)]
    return (
        f"CREATE TABLE IF NOT EXISTS {sql_name} ({table.ddl}) USING DELTA {cluster}"
        f"COMMENT {_quoted(table.comment)} TBLPROPERTIES ({', '.join(properties)})"
    )


def properties_of(table: Table) -> list[tuple[str, str]]:
    """The Delta properties that the table is created with."""
    properties = [(f"delta.constraints.{name}", check) for name, check in table.checks]
    if table.feed:
        properties.append(("delta.enableChangeDataFeed", "true"))
    if table.personal:
        columns = ",".join(statistics_columns(table))
        properties.append(("delta.dataSkippingStatsColumns", columns))
    return [*properties, *table.properties, (_LAYOUT_KEY, str(LAYOUT))]


def statistics_columns(table: Table) -> list[str]:
    """The columns of which files carry a minimum and a maximum: none that identify a person."""
    return [
        field.name
        for field in table.schema
        if field.name not in table.personal and _has_statistics(field.dataType)
    ]


def _has_statistics(data_type: DataType) -> bool:
    return isinstance(data_type, NumericType | DateType | TimestampType | StringType)


def _check_layout(properties: dict[str, str], name: str) -> None:
    layout = properties.get(_LAYOUT_KEY, str(LAYOUT))
    if layout != str(LAYOUT):
        raise RunError(
            f"The table {name} has layout {layout}; this release reads layout {LAYOUT} only. Start "
            "in a new folder, with --set tables=…. Captions that were paid for can be brought over "
            "with `vlm4rec import-captions`."
        )


def _check_schema(table: Table, schema: StructType, name: str) -> None:
    expected = _types(table.schema)
    actual = _types(schema)
    wrong = []
    for column in sorted(expected | actual):
        if column not in expected:
            wrong.append(f"{column} isn't known")
        elif column not in actual:
            wrong.append(f"{column} is missing")
        elif actual[column] != expected[column]:
            wrong.append(f"{column} is {actual[column]}, expected {expected[column]}")
    if wrong:
        raise RunError(
            f"The table {name} has another schema than this release writes: "
            f"{'; '.join(wrong)}. Name another place with --set tables=…, or move the "
            "table away."
        )


def _types(schema: StructType) -> dict[str, str]:
    return {field.name: field.dataType.simpleString() for field in schema}


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
