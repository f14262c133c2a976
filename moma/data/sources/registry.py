"""Which kinds of source there are: every package can add its own.

A package names its reader's configuration in the entry-point group `moma.sources`:

    [project.entry-points."moma.sources"]
    sketches = "moma.demo.sketches:SketchesConfig"
"""

from functools import cache
from importlib.metadata import entry_points

from moma.data.documents import SourceConfig

GROUP = "moma.sources"


@cache
def source_kinds() -> dict[str, type[SourceConfig]]:
    """The configuration class of every kind, by what a recipe's `kind` says."""
    return {entry.name: entry.load() for entry in sorted(entry_points(group=GROUP))}
