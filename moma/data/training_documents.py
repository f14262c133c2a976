"""What tokenizer and codec are trained on: the first training documents of every source."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice

from torch import Tensor

from moma.data.batches import DataConfig
from moma.data.documents import (
    Document,
    Picture,
    Rejected,
    Source,
    held_out_share,
    is_held_out,
)
from moma.data.encoding import source_digest
from moma.data.shards import write_whole
from moma.data.tokens import refusal
from moma.errors import UserError
from moma.recipe import Config, check
from moma.tokenizers.image import preprocess

_TRAINED_ON_FILE = "trained_on.json"


class PictureTensors(Sequence[Tensor]):
    """Pictures as the codec reads them, each decoded when it is asked for: float [3, H, W].

    In place of a picture that cannot be read stands the next one that can.
    """

    def __init__(self, pictures: Sequence[Picture], size: int):
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        for place in range(index, index + len(self.pictures)):
            try:
                picture = self.pictures[place % len(self.pictures)].read()
            except UserError as error:
                unreadable = error
            else:
                return preprocess(picture, self.size)
        raise unreadable


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
        """The texts of the first so many training documents of each source."""
        for source in self.data.sources:
            for document in islice(self._documents(source, held_out=False), documents):
                yield from (segment for segment in document.segments if isinstance(segment, str))

    def pictures(self, documents: int, held_out: bool) -> list[Picture]:
        """The pictures of the first so many training (or held-out) documents of each source."""
        return [
            segment
            for source in self.data.sources
            for document in islice(self._documents(source, held_out), documents)
            for segment in document.segments
            if isinstance(segment, Picture)
        ]

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
        write_whole(self._file, json.dumps(values, indent=2) + "\n")

    def total(self, source: Source) -> int | None:
        """Rows of a source, if it has not changed since it was read to its end."""
        if source.name in self._rows:
            return self._rows[source.name]
        before = self._trained_on().get(source.name)
        return before.rows if before and before.digest == self._digest(source) else None

    def tell_changes(self) -> None:
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
                f"note: tokenizer and codec in {self.data.path} were trained before these sources "
                f"were added or changed, and are kept: {', '.join(changed)}; choose another "
                "data.path to train them anew",
                file=sys.stderr,
            )

    def _documents(self, source: Source, held_out: bool) -> Iterator[Document]:
        """Documents of one split that the tokenizers can hold."""
        share, row = self.held_out(source), 0
        for row, document in enumerate(source.documents(), 1):  # noqa: B007
            if isinstance(document, Rejected) or refusal(document):
                continue
            if is_held_out(document, share) == held_out:
                yield document
        self._rows[source.name] = row

    def _digest(self, source: Source) -> str:
        # Once: it may have to look at every file of the source.
        if source.name not in self._digests:
            self._digests[source.name] = source_digest(source, self.held_out(source))
        return self._digests[source.name]

    def _trained_on(self) -> dict[str, _TrainedOn]:
        if not self._file.exists():
            return {}
        values = json.loads(self._file.read_text())
        return {name: check(_TrainedOn, value, str(self._file)) for name, value in values.items()}
