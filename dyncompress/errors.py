"""Everything that dyncompress raises on purpose.

DynCompressError
+-- TraceError           the network could not be run or followed; names the module path and the op
+-- UnknownMethodError   no such method; lists the registered names
+-- BudgetError          ill-formed or unreachable target; gives the reachable range
+-- PlanError            the plan does not fit this network; gives the first difference
+-- DistillationError    the student cannot be taught: no forward captured, wrong teacher, other outputs
+-- CheckpointError      a checkpoint or bundle holds no plan, another plan, or cannot be read
+-- ExportError          an exported file does not reproduce the network
+-- RecipeError          a recipe is unreadable or names something that does not exist
+-- SearchError          the search for a cheapest network can't be done; names what is missing
+-- WriteError           a file can't be written; what was there before still is

A message says what is wrong (with the value), what is allowed, and what to do.
"""


class DynCompressError(Exception):
    """Root of every error that dyncompress raises on purpose."""


class TraceError(DynCompressError):
    """The network could not be run or followed."""


class UnknownMethodError(DynCompressError):
    """No method of that name is registered."""


class BudgetError(DynCompressError):
    """The target is ill-formed or cannot be reached."""


class PlanError(DynCompressError):
    """The plan does not fit the network."""


class DistillationError(DynCompressError):
    """The student cannot be taught by this teacher."""


class CheckpointError(DynCompressError):
    """A checkpoint or bundle cannot be used."""


class ExportError(DynCompressError):
    """An exported file does not reproduce the network."""


class RecipeError(DynCompressError):
    """A recipe is unreadable or names something that does not exist."""


class SearchError(DynCompressError):
    """The search for the cheapest network within a drop of the score can't be done."""


class WriteError(DynCompressError, OSError):
    """A file can't be written; what was there before still is."""


def shown(value: object, most: int = 80) -> str:
    """A value as messages quote it: its repr, on one line and cut short where it is long.

    Example:
        >>> shown("a" * 1000, most=10)
        "'aaaaaa..."
    """
    if isinstance(value, int) and value.bit_length() > 4 * most:  # its digits would take long, and more than 4300 raise
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        value = value[: most + 1]
    elif isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > most:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."
