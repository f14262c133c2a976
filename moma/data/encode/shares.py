"""Shares of the work of a job, for machines that know each other only through an address."""

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moma.data.config import DataConfig
from moma.data.remote.fetching import fetch_tokenizers, has_tokenizers
from moma.data.remote.storage import open_storage
from moma.errors import UserError, list_names, shorten

# Between checks for the tokenizers of another machine, and between warnings that it waits.
SECONDS_BETWEEN_CHECKS = 10
SECONDS_BETWEEN_WARNINGS = 600
_LIMIT = 100_000
logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """Every `of`-th part: share `number`, from 1 on, of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Return the share that a text such as `3/16` names.

        Raises:
            UserError: it names none.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        share = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= share.number <= share.of <= _LIMIT:
            raise UserError(
                f"--share {shorten(text, 60)}: should be a number from 1 on and how many there "
                f"are, such as 3/16; at most {_LIMIT:,}"
            )
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, source: int, part: int) -> bool:
        """Return whether a part belongs to it, whatever else is complete.

        Args:
            source: number of the source in the recipe, so that short sources do not all begin with
                the same share.
        """
        return self._of_part(source, part) == self.number

    def describe_missing(self, sources: Sequence[str], missing: Mapping[str, Sequence[int]]) -> str:
        """Describe the parts that are not complete, and which shares have them."""
        shares = Counter(
            self._of_part(index, part)
            for index, name in enumerate(sources)
            for part in missing.get(name, ())
        )
        listed = list_names(f"{number}/{self.of} ({shares[number]:,})" for number in sorted(shares))
        return (
            f"share {self} is complete; missing parts of other shares: {listed}; the last share to "
            "finish publishes the data; if a machine was lost, run `moma prepare` without --share"
        )

    def _of_part(self, source: int, part: int) -> int:
        return (source + part) % self.of + 1


def await_tokenizers(data: DataConfig, share: Share) -> None:
    """Fetch the tokenizers that the machine with the first share trains; wait until they exist.

    A folder that has tokenizers publishes its own.
    """
    if share.number == 1 or data.tokenizers is not None or data.remote is None:
        return
    if has_tokenizers(data.path):
        return
    storage, seconds = open_storage(data.remote), 0
    while not fetch_tokenizers(storage, data.path):
        if seconds % SECONDS_BETWEEN_WARNINGS == 0:
            logger.warning(
                "%s: has no tokenizers yet (waited %s minutes); share 1/%s trains them: start it "
                "with this data.remote, or set data.tokenizers",
                data.remote,
                seconds // 60,
                share.of,
            )
        time.sleep(SECONDS_BETWEEN_CHECKS)
        seconds += SECONDS_BETWEEN_CHECKS


def warn_of_other_parts(address: str, folders: Sequence[str]) -> None:
    """Warn of parts at an address that do not count, since they were made from something else.

    Args:
        folders: where they are; see `PartialShards.unpublished_folders`.
    """
    if folders:
        logger.warning(
            "%s: has parts made from other keys or files in %s, which do not count here; on all "
            "machines, the recipe and the paths, sizes and modification times of the sources must "
            "be equal (copy them by rsync -a or tar); if the parts are of an older version, delete "
            "the folder",
            address,
            list_names(folders),
        )


def require_address(share: Share, data: DataConfig) -> None:
    """Raise `UserError` if the machines could not find each other's parts."""
    if data.remote is None:
        raise UserError(
            f"--share {share}: needs data.remote, where the machines find each other's parts; if "
            "they share a folder, use data.remote=file:///FOLDER with another data.path on each"
        )
