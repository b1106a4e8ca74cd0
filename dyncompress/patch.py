"""Methods replaced on one instance, for a while."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Patch:
    """One method of one object, replaced until `undo`.

    Whoever inspects it sees the method that it replaces: Lightning reads the signature of ``training_step`` and
    asks whether a hook is overridden. It copies and pickles as that method too, so that a module can be deep-copied
    or saved in mid-training, and the copy is free of patches.

    Args:
        owner: The object.
        name: Name of the method.
        replacement: What is called instead, with the method's arguments.
    """

    def __init__(self, owner: object, name: str, replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, inspect.unwrap(getattr(owner, name)))
        self._owner, self._name = owner, name
        self._original = getattr(owner, name)
        self._hides = name in vars(owner)  # somebody else's patch, to be put back
        self._replacement = replacement
        self._apply()

    @classmethod
    def before(cls, owner: object, name: str, first: Callable[..., Any]) -> Patch:
        """Have ``first`` called before the method, with its arguments."""

        def both(*args: Any, **kwargs: Any) -> Any:
            first(*args, **kwargs)
            return patch.original(*args, **kwargs)

        patch = cls(owner, name, both)
        return patch

    @classmethod
    def after(cls, owner: object, name: str, then: Callable[[], Any]) -> Patch:
        """Have ``then`` called after the method."""

        def both(*args: Any, **kwargs: Any) -> Any:
            result = patch.original(*args, **kwargs)
            then()
            return result

        patch = cls(owner, name, both)
        return patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self._replacement(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._original,)

    @property
    def original(self) -> Callable[..., Any]:
        """The method that is replaced."""
        return self._original  # type: ignore[no-any-return]

    def undo(self) -> None:
        """Put the original back. Where somebody patched over this patch, it only lets calls through from now on."""
        self._replacement = self._original
        self._lift()

    @contextmanager
    def lifted(self) -> Iterator[Callable[..., Any]]:
        """The object without the patch, while the context lasts; gives the original."""
        was_on = self._lift()
        try:
            yield self._original
        finally:
            if was_on:
                self._apply()

    def _apply(self) -> None:
        vars(self._owner)[self._name] = self

    def _lift(self) -> bool:
        on = vars(self._owner).get(self._name) is self
        if on and self._hides:
            vars(self._owner)[self._name] = self._original
        elif on:
            del vars(self._owner)[self._name]
        return on


def _same(value: T) -> T:
    return value
