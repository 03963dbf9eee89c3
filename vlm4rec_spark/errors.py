"""The errors that people see. Knows their exit codes and their words; knows nothing of how they are shown."""


class Vlm4RecError(Exception):
    """Something a person can act on, said in one paragraph."""

    exit_code = 1


class RunError(Vlm4RecError):
    """A run that had begun failed."""


class Resumable(RunError):
    """A run was told to stop, and did so at a point from which the same command goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later."""


class UsageError(Vlm4RecError):
    """Wrong use or configuration, found before any work was done."""

    exit_code = 2


class Busy(Vlm4RecError):
    """Another run is at work on the same tables: nothing is wrong, and there is nothing to do."""

    exit_code = 0


def first_words(error: BaseException) -> str:
    """What an unforeseen error says, without the frames that Spark puts into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A worker's own exception stands at the end of the Python traceback inside Spark's message.
    inner = [line for line in lines if line.startswith(("vlm4rec_spark.errors.", "vlm4rec_spark."))]
    # Py4J begins with the name of what was called, and says on the next line what happened.
    called = len(lines) > 1 and lines[0].startswith("An error occurred while calling")
    said = (
        inner[-1].split(": ", 1)[-1]
        if inner
        else lines[called].lstrip(": ")
        if lines
        else "no message"
    )
    return f"{type(error).__name__}: {said[:600]}"
