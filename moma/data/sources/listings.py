"""Listing the files of a source once, however many of its parts are read.

A part is a range of its source's files, so whoever reads it needs the list of all of them.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Self, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_entered: list["Listings"] = []


class Listings:
    """Lists of files; while it is entered, each is made once. Files added later are not seen."""

    def __init__(self) -> None:
        self.lists: dict[Hashable, Any] = {}

    def __enter__(self) -> Self:
        _entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _entered.remove(self)


def listed_once(function: Function) -> Function:
    """Decorate a function of hashable arguments that lists files; nobody may modify its result."""

    @wraps(function)
    def listed(*args: Hashable) -> Any:
        if not _entered:
            return function(*args)
        lists, key = _entered[-1].lists, (function, args)
        if key not in lists:
            lists[key] = function(*args)
        return lists[key]

    return listed  # type: ignore[return-value]
