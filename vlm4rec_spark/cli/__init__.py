"""The command line: `vlm4rec <stage> --config FILE --set key=value`.

Turns every error into one paragraph and an exit code: 0 success, or another run is at work;
1 a run failed; 2 wrong use or configuration; 75 told to stop, run it again to go on.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
import yaml

from vlm4rec_spark.cli import reporter
from vlm4rec_spark.errors import UsageError, Vlm4RecError, error_line

app = typer.Typer(
    name="vlm4rec",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""From product photos and an interaction log to the best k items for every user.

Each stage reads and writes Delta tables and adds a row to the table `runs`. It can be run twice,
or killed at any moment. `vlm4rec run` runs all stages. `vlm4rec demo` draws a shop for them.""",
)

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file with what differs from conf/base.yaml; repeatable, later files win.",
        metavar="FILE",
    ),
]
SettingOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="One setting, such as recommend.k=20; repeatable, wins over files.",
        metavar="KEY=VALUE",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show stack traces and the libraries' messages.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


class CommonOptions(NamedTuple):
    """The options of every command that loads a configuration."""

    files: list[Path] | None
    assignments: list[str] | None
    debug: bool


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    reporter.configure(as_json=False)
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        code = app(args=argv, standalone_mode=False) or 0
        if code != 130:
            return code
        raise KeyboardInterrupt  # typer turns it into exit code 130
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
    if message:
        logging.getLogger(__name__).log(logging.ERROR if code else logging.WARNING, "%s", message)
    return code


def _command(name: str, help_text: str | None = None) -> Callable[[Callable[..., None]], None]:
    """Register a command; its function gets the common options as the first argument."""

    def register(function: Callable[..., None]) -> None:
        def command(
            config: ConfigFiles = None,
            set_: SettingOverrides = None,
            debug: Debug = False,
            **own: Any,
        ) -> None:
            function(CommonOptions(config, set_, debug), **own)

        # Typer reads a command's options from its signature.
        _, *own = signature(function, eval_str=True).parameters.values()
        *common, _ = signature(command, eval_str=True).parameters.values()
        command.__signature__ = Signature([*own, *common])  # type: ignore[attr-defined]
        app.command(name, help=help_text or function.__doc__)(command)

    return register


def _stage(name: str, help_text: str) -> None:
    @_command(name, help_text)
    def stage(common: CommonOptions) -> None:
        from vlm4rec_spark.cli.commands import run_stages

        run_stages(name, common)


# The help lists commands in the order of their registration: that of the work.
_stage("ingest", "Read catalogue, photos and log into tables; bad rows go to `rejected`.")

Retry = Annotated[
    bool, typer.Option("--retry-failed", help="Try failed and rejected captions again too.")
]
ErrorClass = Annotated[
    str | None,
    typer.Argument(metavar="[CLASS]", help="With --retry-failed: only this error class."),
]


@_command("caption")
def caption(
    common: CommonOptions,
    error_class: ErrorClass = None,
    retry_failed: Retry = False,
) -> None:
    """Caption every photo that has no caption yet; identical photos are captioned once.

    A photo is captioned again only if its bytes, the prompt, the model or its parameters have
    changed. `vlm4rec plan` shows beforehand how many photos that is and what they cost.
    `caption.budget` limits one run; items with the most events come first.

    Work is committed in chunks of `caption.chunk_photos`. On SIGTERM a run finishes its current
    batches and ends with exit code 75. Run it again to go on.
    """
    from vlm4rec_spark.cli.commands import run_stages

    run_stages("caption", common, _retry(error_class, retry_failed))


@_command("plan")
def show_plan(
    common: CommonOptions,
    error_class: ErrorClass = None,
    retry_failed: Retry = False,
    as_json: Json = False,
) -> None:
    """Show what `caption` would do now: how many photos, why, how long and at what price.

    Reads no photo's bytes and changes nothing. Speed and tokens are measured by earlier runs with
    this model. Before the first run they come from `caption.assumed`.
    """
    from vlm4rec_spark.cli.commands import run_plan

    run_plan(common, as_json, _retry(error_class, retry_failed))


def _retry(error_class: str | None, retry_failed: bool) -> str | None:
    if error_class and not retry_failed:
        raise UsageError(f"{error_class}: an error class needs --retry-failed.")
    return (error_class or "") if retry_failed else None


_stage("embed", "Encode titles and captions whose text is new or has changed.")
_stage("index", "Build the index of the items' vectors, a folder.")
_stage("profiles", "Weight every user's history and average its vectors.")
_stage("recommend", "Write the best k items of every user, with a reason for each.")


@_command("evaluate")
def evaluate(common: CommonOptions, as_json: Json = False) -> None:
    """Evaluate every arm on held-out events, with confidence intervals.

    The section `evaluate` of the configuration has splits, arms and control. The metrics go to the
    table `metrics` and into the report. `--json` prints the rows of `metrics`, the size of each
    split, and the versions of the tables that were read. If nothing has changed since the last
    evaluation, it prints those of the last one.
    """
    from vlm4rec_spark.cli.commands import run_evaluate

    run_evaluate(common, as_json)


_stage("publish", "Write the tables that marketing systems read.")
_stage("report", "Write the HTML report.")
_stage("run", "Run all stages, from ingest to report.")


@app.command(
    "export",
    hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def export() -> None:
    """The old name of `publish`."""
    raise UsageError("export is called publish now: vlm4rec publish.")


@_command("import-captions")
def import_captions(
    common: CommonOptions,
    path: Annotated[
        str, typer.Argument(help="File, folder or Delta table: item_id and text, or captions.")
    ],
    format: Annotated[str, typer.Option(help="csv, json, parquet or delta.")] = "csv",
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="A column and its name in the source: text=description; repeatable.",
            metavar="NAME=COLUMN",
        ),
    ] = None,
) -> None:
    """Import captions from another system in place of the caption stage; run `embed` after it."""
    from vlm4rec_spark.cli.commands import run_import

    run_import(common, path, format, column)


@_command("status")
def show_status(common: CommonOptions) -> None:
    """Show the size of all tables, the last run of each stage, and which index is in use.

    Changes nothing, and may run while another run is at work. `size` counts the current version of
    a table. `on disk` also counts older versions, which `vlm4rec maintain` deletes.

    The status of a run is *ok*, *unchanged* (its inputs hadn't changed, so it had nothing to do) or
    *failed*. An index is used for the representation that it was last built for.
    """
    from vlm4rec_spark.cli.commands import run_status

    run_status(common)


@_command("show")
def show_one(
    common: CommonOptions,
    kind: Annotated[Literal["user", "item"], typer.Argument(help="What to look at.")],
    id_: Annotated[
        str, typer.Argument(metavar="ID", help="Its id, as in the log or the catalogue.")
    ],
) -> None:
    """Show everything about one user or item: `vlm4rec show user U`, `vlm4rec show item I`.

    A user: the history with its weights, the number of seen items, and the recommendations. Each
    has its reason: the nearest item of the history, and the most significant words of both.

    An item: its catalogue row, its photos with their captions or errors, its nearest neighbors in
    the index, and how many users have it on their list.

    Changes nothing. An unknown id ends with code 1 and the nearest ids. Put `--` before an id that
    begins with a dash.
    """
    from vlm4rec_spark.cli.commands import run_show

    run_show(common, kind, id_)


@_command("tune")
def tune(
    common: CommonOptions,
    out: Annotated[Path, typer.Option(help="Configuration file to write.")] = Path("tuned.yaml"),
    representation: Annotated[
        list[str] | None,
        typer.Option(
            help="title, caption or title_caption; default: the configured one. Several are "
            "compared on the items that have all of them."
        ),
    ] = None,
    metric: Annotated[
        Literal["ndcg", "recall"], typer.Option(help="The metric to maximize, at evaluate.k.")
    ] = "ndcg",
) -> None:
    """Choose the settings of profiles and blend, and write them as a configuration file.

    Tries profile shapes, decays, event weights and the share of item-item scores, one after
    another, each with the best of the earlier ones. It uses a validation cut: the training part of
    the first split in `evaluate.splits` is cut once more. So `evaluate` later uses events that
    took no part in the choice. Embeddings and indexes are built once.

    The file holds the best settings. Its comments list all trials with their metrics and
    intervals. It also defines an arm `content`: the best settings without item-item scores.
    Changes no table. Needs the embeddings of `embed`.
    """
    from vlm4rec_spark.cli.commands import run_tune

    run_tune(common, out, representation, metric)


@_command("maintain")
def maintain(common: CommonOptions) -> None:
    """Join small files; delete old ones, old indexes and what killed runs left. Changes no row.

    Every table: OPTIMIZE joins small files into larger ones. Then VACUUM deletes the files that no
    version of the last `maintain.retention_hours` needs. Running readers are safe, and time travel
    works for that long. Less than Delta's week (168) is refused.

    The index folder: versions in use and the latest `maintain.index_versions` stay. Older ones
    that runs of these tables have built are deleted, and half-built ones. Nothing younger than a
    day is deleted, and nothing that isn't certainly a version of an index.

    Once a week is enough. It does nothing while another run is at work on the tables. It can be
    killed at any moment and run twice.
    """
    from vlm4rec_spark.cli.commands import run_maintain

    run_maintain(common)


@_command("config")
def show_config(common: CommonOptions) -> None:
    """Print the effective configuration as YAML."""
    from vlm4rec_spark.config import load

    settings = load(common.files, common.assignments).model_dump(mode="json")
    print(yaml.safe_dump(settings, sort_keys=False), end="")


@app.command("demo")
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for raw files, tables, index and report.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Another seed is another shop.")] = 7,
    items: Annotated[int, typer.Option(min=50, help="Items in the catalogue.")] = 560,
    users: Annotated[int, typer.Option(min=50, help="Users in the log.")] = 2_000,
    set_: SettingOverrides = None,
    debug: Debug = False,
) -> None:
    """Draw a shop with photos, run every stage on it, and write a report.

    Needs no cluster, no GPU and no download.
    """
    from vlm4rec_spark.cli.commands import run_demo

    run_demo(CommonOptions([Path("demo.yaml")], set_, debug), out, seed, items, users)


@app.command("train-captioner")
def train_captioner(
    table: Annotated[
        Path, typer.Argument(help="Labelled photos: a Parquet file or folder, or a CSV file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model, its card and its curve.")],
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN",
            help="An attribute of the captions and its column: kind=category; repeatable.",
        ),
    ] = None,
    photo: Annotated[
        str, typer.Option(help="Column with the photo's bytes, or its path relative to the table.")
    ] = "photo",
    seen: Annotated[
        int, typer.Option(min=1, help="Photos to train on; each is used several times.")
    ] = 400_000,
    batch: Annotated[int, typer.Option(min=2, help="Photos per step.")] = 96,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Train a small captioner on your own labelled photos, for `caption.model.model`.

    `kind`, `colour`, `pattern`, `material`, `audience`, `style` and `use` have fixed positions in
    the sentences. Other attributes follow with their names. A photo may lack any of them.
    A column `caption` may hold sentences of your own, and a column `weight` how often a photo is
    used; 1 is normal. One photo in twenty is held out to measure the result. Unusable photos are
    counted by class.

    Decoded photos and the checkpoint are in a folder beside the model's, with `-training` at the
    end of its name. On a GPU it takes minutes. The default, 400,000 photos, takes some four hours
    on two cores. It can be killed at any moment: the same command goes on from the last checkpoint,
    two minutes back at most.
    """
    from vlm4rec_spark.cli.train_captioner import run_training

    run_training(table, out, photo, attribute or [], (seen, batch, seed), debug)


def quiet() -> None:
    """Turn the libraries' messages off, here and in workers that inherit this environment."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # Py4J logs a stack trace to the root logger. Without a handler Python would print it.
    logging.getLogger().addHandler(logging.NullHandler())


def _explain(error: BaseException) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    if isinstance(error, Vlm4RecError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return "Interrupted. Run the same command again to go on.", 1
    # Wrong use. Newer typer carries its own click, so this isn't an error class of click.
    if format_message := getattr(error, "format_message", None):
        message = format_message()
        # Without any command the help was printed, and the message is empty.
        return f"{message} See: vlm4rec --help" if message else "", 2
    message = _JVM_DIED if _jvm_died(error) else error_line(error)
    return f"{message} (--debug shows the stack trace.)", 1


_JVM_DIED = (
    "Spark's JVM has ended: it was killed, or it had too little memory (spark.driver_memory). "
    "Committed work stays. Run the same command again to go on."
)


def _jvm_died(error: BaseException) -> bool:
    kind = type(error).__name__
    # Py4J takes a dying JVM's silence for a missing name. The names that we use always exist.
    nameless = kind == "Py4JError" and "does not exist in the JVM" in str(error)
    return isinstance(error, ConnectionError) or kind == "Py4JNetworkError" or nameless
