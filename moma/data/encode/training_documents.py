"""The documents that tokenizer and codec are trained on, and what is remembered of them."""

import json
import sys
import time
from collections.abc import Iterator

from moma.data.config import DataConfig
from moma.data.documents import ImageRef, Source, held_out_share
from moma.data.encode.chunks import CHUNK_DOCUMENTS
from moma.data.encode.corpus import Corpus
from moma.data.encode.parts import copy_rejected, rejected_line
from moma.data.encode.source import source_fingerprint
from moma.data.shards import REJECTED_FILE
from moma.errors import UserError
from moma.files import atomic_open, atomic_write
from moma.recipe import Config, check

# Rows are counted for so long, that the time left can be told.
SECONDS_TO_COUNT = 30.0
_TRAINED_ON_FILE = "trained_on.json"


class _TrainedOn(Config):
    """A source as it was when tokenizer and codec were trained.

    Attributes:
        digest: of its settings and files.
        rows: how many there were, if it was read to its end.
    """

    digest: str
    rows: int | None = None


class TrainingDocuments:
    """The sources of a recipe, and what is known of them from reading them before."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self._file = data.path / _TRAINED_ON_FILE
        self._rows: dict[str, int] = {}
        self._digests: dict[str, str] = {}

    def held_out(self, source: Source) -> float:
        """Share of a source's documents that is kept from training."""
        return held_out_share(source, self.data.held_out)

    def texts(self, documents: int) -> Iterator[str]:
        """The texts of the first so many training documents of each source.

        Raises:
            UserError: too many rows of a source cannot be used; `rejected.jsonl` names them.
        """
        for corpus in self._read(documents):
            yield from corpus.texts()

    def images(self, documents: int, held_out: bool) -> list[ImageRef]:
        """The images of the first so many documents of each source, held out or not.

        Raises:
            UserError: as `texts`.
        """
        return [one for corpus in self._read(documents) for one in corpus.images(held_out)]

    def _read(self, documents: int) -> Iterator[Corpus]:
        """A source after the other, judged once it was read: here, not when the codec is made."""
        for source in self.data.sources:
            corpus = Corpus([source], self.data.held_out, documents, with_images=True)
            yield corpus
            self._rows |= corpus.rows  # what is learned while reading stays known
            # More than may be rejected of the first rows need not be of all; encoding, too, judges
            # after so many.
            if corpus.rows or corpus.read >= CHUNK_DOCUMENTS:
                self._judge(source, corpus)

    def _judge(self, source: Source, corpus: Corpus) -> None:
        """Refuse a source of which too many rows cannot be used, and leave their names."""
        named, rejected = len(corpus.rejected_rows), corpus.rejected
        which = "all" if named == rejected else f"the first {named:,}"
        others = f" ({REJECTED_FILE} in the data folder names {which})"
        try:
            corpus.check_rejected(self.data.max_rejected, others)
        except UserError:
            with atomic_open(self.data.path / REJECTED_FILE) as file:
                for other in self.data.sources:
                    if other.name != source.name:
                        copy_rejected(self.data.folder(other.name), file)
                file.writelines(rejected_line(source.name, row) for row in corpus.rejected_rows)
            raise

    def save(self) -> None:
        """Note which documents the tokenizers are trained on: those of the first call stay."""
        before = self._trained_on()
        now = {source.name: _TrainedOn(digest=self._digest(source)) for source in self.data.sources}
        values = {
            name: one.model_copy(update={"rows": self._rows.get(name, one.rows)}).model_dump()
            if now.get(name) == one.model_copy(update={"rows": None})
            else one.model_dump()
            for name, one in (before or now).items()
        }
        atomic_write(self._file, json.dumps(values, indent=2) + "\n")

    def total(self, source: Source) -> int | None:
        """Rows of a source, where they are known or soon counted."""
        if source.name in self._rows:
            return self._rows[source.name]
        before = self._trained_on().get(source.name)
        if before and before.rows and before.digest == self._digest(source):
            return before.rows
        # A stream would be fetched twice; shards that are there need no time that could be told.
        if getattr(source, "streaming", False) or self.data.folder(source.name).exists():
            return None
        return self._count(source)

    def _count(self, source: Source) -> int | None:
        """Rows of a source; None if counting takes long. Reading a row opens no image."""
        number, end = 0, time.monotonic() + SECONDS_TO_COUNT
        for number, _ in enumerate(source.documents(), 1):  # noqa: B007
            if time.monotonic() > end:
                return None
        self._rows[source.name] = number
        return number

    def warn_changes(self) -> None:
        """Say which sources tokenizer and codec do not know as they are now."""
        before = self._trained_on()
        now = {source.name: self._digest(source) for source in self.data.sources}
        changed = [
            name
            for name, digest in now.items()
            if name not in before or before[name].digest != digest
        ]
        if before and changed:
            print(
                f"note: added or changed since tokenizer and codec in {self.data.path} were "
                f"trained: {', '.join(changed)}; both are kept, as is right where only some rows "
                "were mended; to train them anew, choose another data.path",
                file=sys.stderr,
            )

    def _digest(self, source: Source) -> str:
        # Once: it may have to look at every file of the source.
        if source.name not in self._digests:
            self._digests[source.name] = source_fingerprint(source, self.held_out(source))
        return self._digests[source.name]

    def _trained_on(self) -> dict[str, _TrainedOn]:
        if not self._file.exists():
            return {}
        try:
            values = dict(json.loads(self._file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._file}: damaged ({error}); delete it: it is only there to tell which "
                "sources changed"
            ) from error
        return {name: check(_TrainedOn, value, str(self._file)) for name, value in values.items()}
