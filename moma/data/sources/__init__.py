"""Readers of documents, a module for each kind of source.

Each is a section of a recipe and a `Source` at once. Rows are read one by one and images only
when they are needed, so that the size of the data does not matter.
"""

from typing import Annotated

from pydantic import Field

from moma.data.dictionary import DictionaryConfig
from moma.data.sketches import SketchesConfig
from moma.data.sources.captions import CaptionsConfig
from moma.data.sources.dataset import DatasetConfig
from moma.data.sources.folder import FolderConfig
from moma.data.sources.html import HtmlConfig
from moma.data.sources.interleaved import InterleavedConfig
from moma.data.sources.text import TextConfig
from moma.data.sources.webdataset import WebDatasetConfig

__all__ = [
    "AnySource",
    "CaptionsConfig",
    "DatasetConfig",
    "DictionaryConfig",
    "FolderConfig",
    "HtmlConfig",
    "InterleavedConfig",
    "SketchesConfig",
    "TextConfig",
    "WebDatasetConfig",
]

AnySource = Annotated[
    CaptionsConfig
    | FolderConfig
    | TextConfig
    | InterleavedConfig
    | WebDatasetConfig
    | DatasetConfig
    | HtmlConfig
    | SketchesConfig
    | DictionaryConfig,
    Field(discriminator="kind"),
]
