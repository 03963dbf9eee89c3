"""The errors that people see, with exit codes and messages. Doesn't know how they are shown."""


class Vlm4RecError(Exception):
    """Something a person can act on, in one paragraph: what is wrong, where, and what to do."""

    exit_code = 1


class RunError(Vlm4RecError):
    """A run that had begun failed."""


class Resumable(RunError):
    """A run was told to stop. The same command goes on from where it stopped."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later."""


class UsageError(Vlm4RecError):
    """Wrong use or configuration, found before any work was done."""

    exit_code = 2


class Busy(Vlm4RecError):
    """Another run is at work on the same tables: nothing is wrong, and nothing is to do."""

    exit_code = 0


def error_line(error: BaseException) -> str:
    """The class of an unexpected error and one line of its message, past Spark's stack frames."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A worker's own exception is at the end of the Python traceback inside Spark's message.
    from_worker = [line for line in lines if line.startswith("vlm4rec_spark.")]
    if from_worker:
        message = from_worker[-1].split(": ", 1)[-1]
    elif len(lines) > 1 and lines[0].startswith("An error occurred while calling"):
        # Py4J begins with the name of the method. The error is on the next line.
        message = lines[1].lstrip(": ")
    else:
        message = lines[0].lstrip(": ") if lines else "no message"
    return f"{type(error).__name__}: {message[:600]}"
