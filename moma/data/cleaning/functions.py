"""Functions of other packages that clean documents, found by entry points.

    [project.entry-points."moma.cleaning"]
    boilerplate = "my_package:remove_boilerplate"

`clean.function = "boilerplate"` calls it with every document of a source. It returns the document,
changed or not, or a text: the reason for which the document is dropped.
"""

import hashlib
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from moma.data.documents import Document, ImageRef
from moma.errors import StorageError, UserError, list_names, quote, shorten

_GROUP = "moma.cleaning"

CleaningFunction = Callable[[Document], Document | str]


def load_function(name: str) -> CleaningFunction:
    """Return a registered function, which raises `UserError` if it fails on a document.

    Raises:
        UserError: there is none of this name, or it cannot be imported.
    """
    entry = _find(name)
    function = _import(entry)

    def checked(document: Document) -> Document | str:
        where = f"clean.function {quote(name)} on {document.row or document.name}"
        try:
            result: Any = function(document)
        except StorageError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {shorten(str(error), 300)}"
            raise UserError(f"{where} failed ({reason}); repair {entry.value}") from error
        if problem := _problem_of(result):
            raise UserError(f"{where} returned {problem}; repair {entry.value}")
        return result

    return checked


def _problem_of(result: Any) -> str | None:
    """What is wrong with the result of a function; None if nothing is."""
    if isinstance(result, str):
        return None if result.strip() else "an empty reason"
    if not isinstance(result, Document):
        return f"{type(result).__name__}, not a Document or a reason to drop it"
    if not isinstance(result.name, str):
        return "a Document whose name is not a text"
    if not isinstance(result.segments, tuple):
        return "a Document whose segments are not a tuple"
    if not all(isinstance(part, (str, ImageRef)) for part in result.segments):
        return "a Document with a segment that is neither a text nor an image"
    return None


def function_fingerprint(name: str) -> str:
    """Return what changes with a function's package or the file that it is in.

    Raises:
        UserError: there is none of this name, or it cannot be imported.
    """
    entry = _find(name)
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""
    code = ""
    function = inspect.unwrap(_import(entry))
    # An object that is called has no source file, its class has.
    source = function if inspect.isroutine(function) else type(function)
    if file := inspect.getsourcefile(source):
        code = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return f"{entry.value} {package} {code}"


def _import(entry: EntryPoint) -> Callable[[Document], object]:
    try:
        function: Callable[[Document], object] = entry.load()
    except Exception as error:  # A package may raise anything when it is imported.
        raise UserError(
            f"clean.function: {entry.value} cannot be imported ({type(error).__name__}: "
            f"{shorten(str(error), 300)}); repair its package"
        ) from error
    return function


def _find(name: str) -> EntryPoint:
    found = [*entry_points(group=_GROUP, name=name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"clean.function: several packages register {quote(name)}; uninstall all but one"
        )
    known = list_names(sorted(entry.name for entry in entry_points(group=_GROUP))) or "none"
    raise UserError(
        f"clean.function: no installed package registers {quote(name)} in the entry-point group "
        f"{_GROUP}; registered: {known}"
    )
