"""Checks of the options of methods: what is wrong with a value, and what to give instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from dyncompress.errors import DynCompressError, shown

__all__ = ["check_choice", "check_count", "check_flag", "check_part", "is_number"]


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless an option is one of some words.

    Raises:
        DynCompressError: If it is anything else.

    Example:
        >>> check_choice("router", "stage", ("block", "layer"))
        Traceback (most recent call last):
        dyncompress.errors.DynCompressError: router 'stage' is unknown: choose 'block' or 'layer'
    """
    if not isinstance(value, str) or value not in choices:
        raise DynCompressError(f"{option} {shown(value)} is unknown: choose {' or '.join(map(repr, choices))}")


def check_count(option: str, value: object, of: str, least: int, most: int, advice: str) -> None:
    """Raise unless an option is an integer of a range.

    Args:
        option: Its name.
        value: What was given.
        of: What it counts.
        least: The smallest allowed value.
        most: The largest one; what is above is a slip of the pen.
        advice: What to give, in words.

    Raises:
        DynCompressError: If it is anything else.

    Example:
        >>> check_count("g", 0, "kernels", 1, 1024, "1 to 1024")
        Traceback (most recent call last):
        dyncompress.errors.DynCompressError: g 0 is no number of kernels: give 1 to 1024
    """
    if type(value) is not int or not least <= value <= most:
        raise DynCompressError(f"{option} {shown(value)} is no number of {of}: give {advice}")


def check_flag(option: str, value: object, of: str) -> None:
    """Raise unless an option is True or False.

    Args:
        option: Its name.
        value: What was given.
        of: What it decides, in words.

    Raises:
        DynCompressError: If it is anything else; 0 and 1 are.

    Example:
        >>> check_flag("linear", 1, "whether linear layers are wanted")
        Traceback (most recent call last):
        dyncompress.errors.DynCompressError: linear 1 is neither True nor False: say whether linear layers are wanted
    """
    if type(value) is not bool:
        raise DynCompressError(f"{option} {shown(value)} is neither True nor False: say {of}")


def check_part(option: str, value: object, of: str, advice: str) -> None:
    """Raise unless an option is a number from 0 to 1.

    Raises:
        DynCompressError: If it is anything else.

    Example:
        >>> check_part("warmup", 1.5, "a training", "0 to 1, such as 0.1")
        Traceback (most recent call last):
        dyncompress.errors.DynCompressError: warmup 1.5 is no part of a training: give 0 to 1, such as 0.1
    """
    if not is_number(value) or not 0 <= value <= 1:
        raise DynCompressError(f"{option} {shown(value)} is no part of {of}: give {advice}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an integer or a float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
