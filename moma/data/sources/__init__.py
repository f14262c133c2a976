"""Readers of documents, a module for each kind of source.

Each is a section of a recipe and a `Source` at once. Rows are read one by one and images only
when they are needed, so that the size of the data does not matter.
"""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from moma.data.documents import SourceConfig
from moma.data.sources.registry import source_kinds

if TYPE_CHECKING:
    AnySource = SourceConfig
else:
    AnySource = Annotated[Union[tuple(source_kinds().values())], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["AnySource"]
