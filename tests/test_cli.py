"""The command line without Spark: exit codes, a paragraph per error, help, `vlm4rec config`."""

import json
import socket
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from py4j.protocol import Py4JError
from typer import Abort

from vlm4rec_spark.cli import app, main, reporter
from vlm4rec_spark.cli.commands import _cell
from vlm4rec_spark.config import CONF, Config, load
from vlm4rec_spark.errors import Busy, RunError, UsageError

STAGES = (
    "ingest",
    "caption",
    "embed",
    "index",
    "profiles",
    "recommend",
    "publish",
    "evaluate",
    "report",
    "run",
)
CONFIGURED = (*STAGES, "import-captions", "plan", "config", "status", "maintain", "tune")
OTHER_COMMANDS = ("demo", "show", "train-captioner")
COMMANDS = (*CONFIGURED, *OTHER_COMMANDS)


@pytest.fixture(autouse=True)
def no_spark(monkeypatch, tmp_path) -> None:
    def session(settings: object) -> None:
        raise AssertionError("this command must be refused before Spark starts")

    monkeypatch.setattr("vlm4rec_spark.cli.commands.session", session)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def refused(
    capsys: pytest.CaptureFixture[str],
    *argv: str,
    before: str = "",
) -> tuple[int, str]:
    """Exit code and message.

    The message is one paragraph on stderr, after the line `before`. Nothing else was printed, and
    no file was written.
    """
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert out == ""
    assert list(Path.cwd().iterdir()) == []
    assert err.startswith(f"{before}Error: ")
    assert err.endswith("\n")
    assert "\n\n" not in err
    assert "Traceback" not in err
    return code, err.removeprefix(f"{before}Error: ").rstrip("\n")


@pytest.mark.parametrize("command", STAGES)
def test_an_unknown_key_is_refused_by_every_stage(capsys, command: str):
    assert refused(capsys, command, "--set", "recomend.k=3") == (
        2,
        "--set recomend.k=3: unknown key 'recomend'. Did you mean 'recommend'?",
    )


@pytest.mark.parametrize(
    "argv", [["ingest"], ["run"], ["config"], ["import-captions", "captions.csv"]]
)
def test_a_missing_config_is_refused(capsys, argv: list[str]):
    assert refused(capsys, *argv, "--config", "gone.yaml") == (
        2,
        f"--config gone.yaml: there is no such file, here or in {CONF}.",
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["recomend"],
            "No such command 'recomend'. Did you mean 'recommend', 'embed'? See: vlm4rec --help",
        ),
        (
            ["run", "--confg", "x"],
            "No such option: --confg (Possible options: --config) See: vlm4rec --help",
        ),
        (["run", "--config"], "Option '--config' requires an argument. See: vlm4rec --help"),
        (["import-captions"], "Missing argument 'path'. See: vlm4rec --help"),
        (
            ["demo", "--items", "3"],
            "Invalid value for '--items': Input should be greater than or equal to 50 "
            "See: vlm4rec --help",
        ),
        (
            ["import-captions", "x", "--column", "text"],
            "--column text: write it as name=column, such as --column text=description.",
        ),
        (
            ["import-captions", "x", "--format", "xml"],
            "--format xml: use csv, json, parquet or delta.",
        ),
        (
            ["export", "--config", "cluster.yaml", "--set", "recommend.k=3"],
            "export is called publish now: vlm4rec publish.",
        ),
        (["caption", "Timeout"], "Timeout: an error class needs --retry-failed."),
        (
            ["tune", "--out", "/nowhere/tuned.yaml"],
            "--out /nowhere/tuned.yaml: there is no folder /nowhere.",
        ),
        (
            ["config", "--set", "recommend.k"],
            "--set 'recommend.k': write it as key=value, such as --set recommend.k=20.",
        ),
    ],
)
def test_wrong_use_is_code_two_with_the_right_use(capsys, argv: list[str], message: str):
    assert refused(capsys, *argv) == (2, message)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("The [bold]log[/] is empty."), 1, "The [bold]log[/] is empty."),
        (UsageError("No such thing."), 2, "No such thing."),
        (KeyboardInterrupt(), 1, "Interrupted. Run the same command again to go on."),
        (Abort(), 1, "Interrupted. Run the same command again to go on."),
        (
            ValueError("first line\n\n  second line"),
            1,
            "ValueError: first line (--debug shows the stack trace.)",
        ),
        (ValueError(), 1, "ValueError: no message (--debug shows the stack trace.)"),
        (
            ValueError(
                "Job aborted\n  File x\n"
                "vlm4rec_spark.errors.RunError: the photo: is gone\nat java.base"
            ),
            1,
            "ValueError: the photo: is gone (--debug shows the stack trace.)",
        ),
    ],
)
def test_an_error_inside_is_one_paragraph_and_its_code(
    capsys,
    monkeypatch,
    error: BaseException,
    code: int,
    message: str,
):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("vlm4rec_spark.cli.commands.run_stages", fails)
    assert refused(capsys, "run") == (code, message)


def test_debug_shows_the_stack_trace(capsys):
    assert main(["run", "--debug", "--set", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert (
        err.splitlines()[-1]
        == "Error: --set 'x': write it as key=value, such as --set recommend.k=20."
    )


def test_config_prints_yaml_that_loads_back_equal(capsys, tmp_path):
    assignments = ["recommend.k=3", "evaluate.cut=2025-05-01"]
    words = [word for assignment in assignments for word in ("--set", assignment)]
    assert main(["config", "--config", "demo.yaml", *words]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load([printed]) == load([Path("demo.yaml")], assignments)


def test_config_alone_prints_the_defaults(capsys):
    assert main(["config"]) == 0
    assert Config.model_validate(yaml.safe_load(capsys.readouterr().out)) == Config()


def test_help_names_every_command(capsys):
    public = {command.name for command in app.registered_commands if not command.hidden}
    assert public == set(COMMANDS)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [command for command in COMMANDS if f" {command} " not in out] == []
    assert " export " not in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command: str):
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert ("--config" in out) is (command not in ("demo", "train-captioner"))
    assert ("--set" in out) is (command != "train-captioner")
    assert "--debug" in out


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert " ingest " in out
    assert err == ""


def test_a_cluster_gets_json_lines_with_run_and_stage(capsys):
    reporter.configure(as_json=True, run_id="r1", stage="embed")
    reporter.LOG.info("embed: done", extra={"figures": {"rows_ok": 3}})
    reporter.LOG.error("a line\nof [bold]two[/]")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert datetime.fromisoformat(first.pop("at")).utcoffset() == timedelta(0)
    assert first == {
        "level": "INFO",
        "run_id": "r1",
        "stage": "embed",
        "message": "embed: done",
        "rows_ok": 3,
    }
    assert (second["level"], second["message"]) == ("ERROR", "a line\nof [bold]two[/]")


def test_another_run_at_work_is_not_an_error(capsys, monkeypatch):
    def busy(*_: object) -> None:
        raise Busy("Another run is at work on these tables: run r2.")

    monkeypatch.setattr("vlm4rec_spark.cli.commands.run_stages", busy)
    assert main(["run"]) == 0
    assert capsys.readouterr().err == "Another run is at work on these tables: run r2.\n"


def _closed_gateway(_: object) -> None:
    # The JVM's process was there, and then it isn't.
    gateway = socket.create_server(("127.0.0.1", 0))
    address = gateway.getsockname()
    gateway.close()
    socket.create_connection(address)


def _killed_jvm(_: object) -> None:
    # Py4J's own message, seen when the JVM was killed.
    raise Py4JError("org.apache.spark.sql.functions does not exist in the JVM")


@pytest.mark.parametrize("session", [_closed_gateway, _killed_jvm])
def test_a_jvm_that_dies_is_one_paragraph_with_a_hint(
    capsys,
    monkeypatch,
    session: Callable[[object], None],
):
    monkeypatch.setattr("vlm4rec_spark.cli.commands.session", session)
    code, message = refused(capsys, "ingest", before="  starting Spark\n")
    assert code == 1
    assert message.startswith(
        "Spark's JVM has ended: it was killed, or it had too little memory (spark.driver_memory)."
    )


def test_a_metric_in_the_headline_is_short():
    assert _cell(0.0984, 0.0591, 1.0) == ".098 [.059, 1.000]"
    assert _cell(None, None, None) == "too few users"
