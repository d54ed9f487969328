"""The errors that a user's input can cause: what, its value, why, and what to do."""


class SpecError(ValueError):
    """A network specification, or an option of an analysis, cannot be used as it stands."""


class DataError(ValueError):
    """A data set is missing, damaged, or of the wrong shape or type."""


def problem(error: type[ValueError], argument: str, value: object, cause: str, remedy: str):
    """Builds the error whose one line names the argument, the value, the cause and the remedy."""
    return error(f"{argument}={value!r}: {cause}; {remedy}")
