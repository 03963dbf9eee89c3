"""The commands: each loads the configuration, starts Spark, runs stages and prints a summary."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from pyspark.sql import DataFrame
from rich.console import Console

from vlm4rec_spark.cli import CommonOptions, plan_table, quiet, show, status, tune_table
from vlm4rec_spark.cli.reporter import LOG, configure
from vlm4rec_spark.cli.table_style import new_table
from vlm4rec_spark.config import load
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.evaluation.tune import Metric
from vlm4rec_spark.pipeline import STAGES, Pipeline, Reporter, StageResult
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark import progress
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.storage import schemas

_HEADLINE_METRICS = ("recall", "ndcg")
_CONSOLE = Console(stderr=True)


def run_stages(
    name: str,
    common: CommonOptions,
    retry: str | None = None,
) -> None:
    """Run the stage `name`, or all of them for `run`; `retry` as in RunContext."""
    with _pipeline(common) as pipeline:
        pipeline.context.retry = retry
        _run(pipeline, STAGES if name == "run" else (name,))


def run_evaluate(common: CommonOptions, as_json: bool) -> None:
    """Run `evaluate`; with `as_json` print its metrics."""
    with _pipeline(common) as pipeline:
        _run(pipeline, ("evaluate",))
        if as_json:
            print(json.dumps(_evaluation(pipeline)))


def run_plan(
    common: CommonOptions,
    as_json: bool,
    retry: str | None,
) -> None:
    """Run `plan`."""
    with _pipeline(common) as pipeline:
        pipeline.context.retry = retry
        plan = pipeline.plan()
        if as_json:
            print(json.dumps(asdict(plan)))
        else:
            plan_table.show(plan, pipeline.config.caption, Console())


def run_import(
    common: CommonOptions,
    path: str,
    kind: str,
    columns: list[str] | None,
) -> None:
    """Run `import-captions`."""
    mapping = {}
    for column in columns or ():
        name, equals, source_name = column.partition("=")
        if not equals:
            raise UsageError(
                f"--column {column}: write it as name=column, such as --column text=description."
            )
        mapping[name] = source_name
    if kind not in ("csv", "json", "parquet", "delta"):
        raise UsageError(f"--format {kind}: use csv, json, parquet or delta.")
    source = Source(path=(path,), format=kind, columns=mapping)
    with _pipeline(common) as pipeline:
        _show([pipeline.import_captions(source)])


def run_demo(
    common: CommonOptions,
    out: Path,
    seed: int,
    items: int,
    users: int,
) -> None:
    """Draw the shop, run every stage on it, and print where the report is."""
    from vlm4rec_spark.demo import catalogue

    raw = out / "raw"
    settings = [
        *catalogue.settings(raw),
        f"tables={out / 'tables'}",
        f"index.folder={out / 'index'}",
        f"report.path={out / 'report.html'}",
    ]
    truth = raw / "truth.parquet"
    common = common._replace(assignments=settings + (common.assignments or []))
    with ThreadPoolExecutor(1) as pool:
        drawn = None if truth.exists() else pool.submit(catalogue.write, raw, seed, items, users)
        with _pipeline(common) as pipeline:
            if drawn:
                LOG.info("drawing a shop of %s items and %s users into %s", items, users, raw)
                drawn.result()
            _add_oracle(pipeline, truth)
            _run(pipeline, STAGES)


def run_tune(
    common: CommonOptions,
    out: Path,
    representations: list[str] | None,
    metric: Metric,
) -> None:
    """Run `tune`."""
    folder = out.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--out {out}: there is no folder {folder}.")
    with _pipeline(common) as pipeline:
        tuned = pipeline.tune(representations or [pipeline.config.representation], metric)
        tune_table.write(tuned, out)
        tune_table.show(tuned, _CONSOLE)
        _print_line(f"settings: {out.resolve()}. Use them: --config {out}")


def run_status(common: CommonOptions) -> None:
    """Run `status`."""
    with _pipeline(common) as pipeline:
        status.show(pipeline, Console())


def run_show(
    common: CommonOptions,
    kind: Literal["user", "item"],
    id_: str,
) -> None:
    """Run `show user` or `show item`."""
    with _pipeline(common) as pipeline:
        show_one = show.user if kind == "user" else show.item
        show_one(pipeline, id_, Console())


def run_maintain(common: CommonOptions) -> None:
    """Run `maintain`."""
    with _pipeline(common) as pipeline:
        result = pipeline.maintain()
        _report(result)
        if pipeline.config.log != "json":
            status.show_maintenance(result, _CONSOLE)


def _add_oracle(pipeline: Pipeline, truth: Path) -> None:
    """The true attributes as one-hot vectors: the evaluation shows how far captions could get."""
    import pandas as pd

    stored = pipeline.tables.read(schemas.EMBEDDINGS).where("representation = 'oracle'")
    if not stored.isEmpty():
        return
    table = pd.read_parquet(truth).sort_values("item_id", ignore_index=True)
    vectors = pd.get_dummies(table.drop(columns="item_id")).to_numpy(float)
    vectors /= (vectors**2).sum(axis=1, keepdims=True) ** 0.5
    rows = [
        (item_id, "oracle", "truth", "-", False, vector.tolist())
        for item_id, vector in zip(table["item_id"], vectors, strict=True)
    ]
    frame = pipeline.spark.createDataFrame(rows, schemas.EMBEDDINGS.schema)
    with pipeline.lease():
        pipeline.tables.upsert(schemas.EMBEDDINGS, frame)


@contextmanager
def _pipeline(common: CommonOptions) -> Iterator[Pipeline]:
    config = load(common.files, common.assignments)
    if not common.debug:
        quiet()
    as_json = config.log == "json"
    configure(as_json)
    LOG.info("starting Spark")
    spark = session(config.spark)
    spark.sparkContext.setLogLevel("WARN" if common.debug else "FATAL")

    def begin(run_id: str, stage: str) -> None:
        configure(as_json, run_id=run_id, stage=stage)
        if stage == "start":
            LOG.info("looking at the tables")

    reporter = Reporter(
        stage=begin,
        info=LOG.info,
        progress=partial(progress.watch, spark, None if as_json else _CONSOLE, LOG.info),
    )
    yield Pipeline(spark, config, reporter)


def _run(pipeline: Pipeline, stages: Sequence[str]) -> None:
    results = pipeline.run(stages, _report)
    if pipeline.config.log == "json":
        return
    _show(results)
    if "report" in stages:
        _print_line(f"report: {Path(pipeline.config.report.path).resolve()}")
    if "evaluate" in stages:
        _headline(pipeline)


def _report(result: StageResult) -> None:
    figures = {
        "rows_in": result.rows_in,
        "rows_ok": result.ok,
        "rows_failed": result.failed,
        "rows_skipped": result.skipped,
        "seconds": round(result.seconds, 1),
        **result.details,
    }
    outcome = "unchanged, nothing to do" if result.status == "unchanged" else "done"
    LOG.info("%s: %s, %.1f s", result.stage, outcome, result.seconds, extra={"figures": figures})


def _show(results: Sequence[StageResult]) -> None:
    columns = ("rows in", "ok", "failed", "skipped", "seconds")
    table = new_table("Stages of this run", ("stage", "status"), columns)
    for result in results:
        counts = (result.rows_in, result.ok, result.failed, result.skipped)
        cells = [f"{count:,}" for count in counts]
        table.add_row(result.stage, result.status, *cells, f"{result.seconds:.1f}")
    _CONSOLE.print(table)


def _print_line(text: str) -> None:
    _CONSOLE.print(text, soft_wrap=True, highlight=False)


def _evaluation(pipeline: Pipeline) -> dict[str, object]:
    """The metrics of the last evaluation, and the tables and settings that they are of."""
    state = pipeline.context.states()["evaluate"]
    runs = pipeline.tables.read(schemas.RUNS).where("stage = 'evaluate'")
    run = runs.where(runs["run_id"] == state.run_id).first()
    rows = _metrics(pipeline).orderBy("split", "arm", "metric", "k", "slice").collect()
    evaluation = state.output.evaluation
    assert run is not None and evaluation is not None
    return {
        "run_id": state.run_id,
        "versions": run["versions"],
        "config": json.loads(run["config"])["evaluate"],
        "details": evaluation["splits"] | {"caption_audit": evaluation["caption_audit"]},
        "metrics": [row.asDict() for row in rows],
    }


def _metrics(pipeline: Pipeline) -> DataFrame:
    """The metrics of the last evaluation."""
    metrics = pipeline.tables.read(schemas.METRICS)
    run_id = pipeline.context.states()["evaluate"].run_id
    return metrics.where(metrics["run_id"] == run_id).drop("run_id")


def _headline(pipeline: Pipeline) -> None:
    """The latest evaluation over all users, as a table for each split."""
    k = pipeline.config.evaluate.k
    cells = _cells(pipeline, k)
    for split in dict.fromkeys(cell_split for cell_split, _, _ in cells):
        title = f"{split} split, mean over users with 95 % interval"
        table = new_table(title, ("arm",), [f"{metric}@{k}" for metric in _HEADLINE_METRICS])
        for arm in pipeline.config.evaluate.arms:
            table.add_row(arm, *(cells[split, arm, metric] for metric in _HEADLINE_METRICS))
        _CONSOLE.print(table)


def _cells(pipeline: Pipeline, k: int) -> dict[tuple[str, str, str], str]:
    """The headline's figures by split, arm and metric."""
    # The caption audit's metrics are no score of an arm. The report shows them.
    shown = f"metric IN {_HEADLINE_METRICS} AND k = {k} AND slice = 'all' AND split != 'captions'"
    return {
        (row["split"], row["arm"], row["metric"]): _cell(row["value"], row["low"], row["high"])
        for row in _metrics(pipeline).where(shown).orderBy("split").collect()
    }


def _cell(
    value: float | None,
    low: float | None,
    high: float | None,
) -> str:
    if value is None:
        return "too few users"
    # Two of these and the arm's name fit into 80 columns.
    mean, lower, upper = (f"{number:.3f}".removeprefix("0") for number in (value, low, high))
    return f"{mean} [{lower}, {upper}]"
