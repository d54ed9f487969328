"""Errors caused by a user's input; they name the argument, its value, the cause and the remedy."""

import reprlib


class SpecError(ValueError):
    """A network specification, or an option of an analysis, cannot be used as given."""


class DataError(ValueError):
    """A data set is missing, damaged, or of the wrong shape or type."""


class _Short(reprlib.Repr):
    """Representations that are cut off before they are long."""

    def repr_instance(self, x: object, level: int) -> str:
        """Of a layer with layers inside only the name: it may stand for any number of them."""
        children = getattr(type(x), "children", None)
        if children is not None and children(x):
            return f"{type(x).__name__}(...)"
        return super().repr_instance(x, level)


_SHORT = _Short()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 20
_SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 300, 60, 300


def shown(value: object) -> str:
    """A value as text of one line, however long or broken its own representation is."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an integer of 5000 digits, layers nested too deeply, a class of anyone's
        return f"<{type(value).__name__}>"
    return " ".join(text.split()) if "\n" in text else text


def problem(error: type[ValueError], argument: str, value: object, cause: str, remedy: str):
    """Builds an error whose single line names the argument, its value, the cause and the remedy."""
    return error(f"{argument}={shown(value)}: {cause}; {remedy}")
