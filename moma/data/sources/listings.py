"""Listing the files of a source once, however many of its parts are read.

A part is a range of its source's files, so whoever reads it needs the list of all of them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import wraps
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
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

    def inside(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items; it is entered only while one is made."""
        iterator = iter(items)
        while True:
            with self:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def listed_once(function: Function) -> Function:
    """Decorate a function of hashable arguments that lists files; nobody may modify its result."""

    @wraps(function)
    def listed(*args: Hashable, **kwargs: Hashable) -> Any:
        if not _entered:
            return function(*args, **kwargs)
        lists, key = _entered[-1].lists, (function, args, *sorted(kwargs.items()))
        if key not in lists:
            lists[key] = function(*args, **kwargs)
        return lists[key]

    return listed  # type: ignore[return-value]
