"""Values out of JSON, as the annotations of a frozen dataclass say: every field there, of its type, and no other.

One pass turns what a file says into what the code may rely on; nothing is converted on the way (``1.0`` is no integer,
``true`` is none either).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dyncompress.errors import shown

LEAST, MOST = -1, 2**62
"""Integers of a file: what torch can count, with room to multiply by two."""
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", NoneType: "null", list: "a list",
          dict: "an object"}  # fmt: skip


class MistypedError(ValueError):
    """A value is not what its place takes; ``where`` is the place."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason, self.where = reason, ""

    def below(self, step: str) -> MistypedError:
        """The same, seen from one level further up."""
        self.where = f"{step}{self.where}"
        return self

    def __str__(self) -> str:
        return f"'{self.where.lstrip('.') or 'the whole'}' {self.reason}"


def typed(kind: Any, value: Any) -> Any:
    """A value of JSON as the annotated type: dataclasses, tuples and mappings of them, and plain values.

    Args:
        kind: The annotation.
        value: What `json.loads` gave.

    Raises:
        MistypedError: If it is of another type, too large, or has a field missing or too many.

    Example:
        >>> typed(tuple[int, ...], [1, 2])
        (1, 2)
        >>> typed(tuple[int, ...], [1, True])
        Traceback (most recent call last):
        dyncompress.typed.MistypedError: '[1]' is True; it takes an integer
    """
    if kind is Any:
        return value
    arm = _arms(kind).get(type(value))
    if arm is None:
        raise MistypedError(f"is {shown(value)}; it takes {' or '.join(_WORDS[t] for t in _arms(kind))}")
    if type(value) is int and not LEAST <= value <= MOST:
        raise MistypedError(f"is {shown(value)}; it takes an integer from {LEAST} to 2**62")
    if type(value) is str and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise MistypedError("holds half of a character; it takes a text that can be written as UTF-8")
    if is_dataclass(arm):
        return _record(arm, value)
    if type(value) is list:
        return _sequence(get_args(arm), value)
    if type(value) is dict:
        return _members({key: get_args(arm)[1] for key in value}, value, "[{!r}]")
    return value


@cache
def _arms(kind: Any) -> dict[type, Any]:
    """What an annotation allows, by the type that JSON has for it."""
    if get_origin(kind) in (Union, UnionType):
        return {form: arm for part in get_args(kind) for form, arm in _arms(part).items()}
    if is_dataclass(kind) or get_origin(kind) in (dict, Mapping):
        return {dict: kind}
    return {list if get_origin(kind) is tuple else kind: kind}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _record(kind: Any, value: dict[str, Any]) -> Any:
    hints = _hints(kind)
    missing = [name for name in hints if name not in value]
    unknown = [name for name in value if name not in hints]
    if missing or unknown:
        found = f"lacks '{missing[0]}'" if missing else f"has an unknown field {shown(unknown[0])}"
        raise MistypedError(f"{found}; its fields are {', '.join(hints)}")
    return kind(**_members(hints, value, ".{}"))


def _members(kinds: Mapping[str, Any], value: Mapping[str, Any], step: str) -> dict[str, Any]:
    found = {}
    for name, kind in kinds.items():
        try:
            found[name] = typed(kind, value[name])
        except MistypedError as error:
            raise error.below(step.format(name[:100])) from None
    return found


def _sequence(kinds: tuple[Any, ...], value: list[Any]) -> tuple[Any, ...]:
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise MistypedError(f"has {len(value)} entries; it takes {len(kinds)}")
    found = []
    for i, (kind, entry) in enumerate(zip(kinds, value, strict=True)):
        try:
            found.append(typed(kind, entry))
        except MistypedError as error:
            raise error.below(f"[{i}]") from None
    return tuple(found)
