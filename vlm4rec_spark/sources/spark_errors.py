"""Turns errors of Spark's readers into errors of one line that name the config key."""

from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException

from vlm4rec_spark.errors import RunError, UsageError


@contextmanager
def readable_errors(missing: str, broken: str) -> Iterator[None]:
    """Raise UsageError, beginning with `missing`, if a path is wrong or nothing is there.

    Raise RunError, beginning with `broken`, for any other error of Spark.
    """
    try:
        yield
    except AnalysisException as error:
        raise UsageError(f"{missing}: {first_line(error)}") from None
    except (PySparkException, Py4JJavaError) as error:
        raise RunError(f"{broken}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of the message that isn't empty; without one, the error's class."""
    java = getattr(error, "java_exception", None)
    text = str(error) if java is None else java.toString()
    lines = (" ".join(line.split()) for line in text.splitlines())
    return next(filter(None, lines), type(error).__name__)
