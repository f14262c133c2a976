"""Whether runs are measured on the same held-out documents, without which losses do not compare."""

import json
import logging
from collections.abc import Mapping

from moma.data.config import DataConfig
from moma.data.shards import read_info
from moma.errors import list_names
from moma.files import fingerprint

logger = logging.getLogger(__name__)


def documents_fingerprint(data: DataConfig) -> str:
    """Return a value that is equal for data folders with the same shards of the same sources."""
    infos = {source.name: read_info(data.folder(source.name)) for source in data.sources}
    found = {name: info and info.model_dump(mode="json") for name, info in infos.items()}
    return fingerprint(json.dumps(found, sort_keys=True).encode())


def warn_of_other_documents(fingerprints: Mapping[str, str]) -> str:
    """Warn if runs were measured on other documents than the first, the baseline.

    Args:
        fingerprints: `documents_fingerprint` by name of the run.

    Returns:
        The warning, which a report repeats; empty if there is none.
    """
    names = list(fingerprints)
    other = [name for name in names if fingerprints[name] != fingerprints[names[0]]]
    if not other:
        return ""
    warning = (
        f"{list_names(other)}: measured on other documents than {names[0]}, as the data differ or "
        "a source was prepared anew between them: their losses, and η, cannot be compared; train "
        "all on the same"
    )
    logger.warning(warning)
    return warning
