"""The errors that people see. Knows their exit codes; knows nothing of how they are shown."""


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
