"""Rejected and dropped documents: lines of `rejected.jsonl`, errors if too few are left."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice

from moma.data.documents import Rejected, SourceConfig
from moma.errors import UserError

# Rejected documents whose reasons are compared.
_MAX_COMPARED = 10_000
# What differs between documents that are rejected for the same reason: paths, numbers, quotations.
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\d]\S*")


def rejected_line(source: str, rejected: Rejected) -> bytes:
    """Return a line of `rejected.jsonl`."""
    values = {"source": source, "row": rejected.row, "reason": rejected.reason}
    if rejected.dropped_by:
        values["dropped_by"] = rejected.dropped_by
    return json.dumps(values).encode() + b"\n"


def parse_rejected_line(line: bytes) -> Rejected:
    """Return the rejected document of a line of `rejected.jsonl`."""
    values = json.loads(line)
    return Rejected(values["row"], values["reason"], values.get("dropped_by", ""))


def too_many_rejected(
    source: str, count: int, read: int, limit: float, rejected: Iterable[Rejected], listing: str
) -> UserError:
    """Return the error about too many rejected documents of a source.

    Args:
        count, read: number of rejected documents, and of all that were read.
        limit: `data.max_rejected`; if most documents are rejected, raising it is not advised.
        rejected: the rejected documents, or the first ones.
        listing: where they are listed.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in islice(rejected, _MAX_COMPARED):
        kind = _VARIABLE.sub("…", row.reason.replace(row.row, "…"))
        counts[kind] += 1
        examples.setdefault(kind, row.message)
    ((kind, times),) = counts.most_common(1)
    which = f"the most frequent reason, of {times}" if count > 1 else "the reason"
    advice = "fix the cause, and run the same command again"
    if count <= read / 2:
        advice = "fix them, or raise data.max_rejected"
    return UserError(
        f"source '{source}': {count} of {read} documents were rejected, more than "
        f"data.max_rejected = {limit:g} allows; {which}: {examples[kind]}{listing}; {advice}"
    )


def all_held_out(documents: int) -> UserError:
    """Return the error about documents of which none is left to train on."""
    return UserError(
        f"all {documents:,} documents are held out, so nothing is left for training; lower "
        "data.held_out, or the held_out of a source"
    )


def no_documents(source: SourceConfig, dropped: Mapping[str, int] | None = None) -> UserError:
    """Return the error about a source of which no document is left.

    `dropped` counts those that `clean` drops, by key.
    """
    if dropped:
        counts = ", ".join(f"{count:,} by clean.{key}" for key, count in dropped.items())
        return UserError(
            f"source '{source.name}': no documents are left; dropped: {counts}; change these keys"
        )
    path = getattr(source, "path", None)
    where = "" if path is None else f" in {path}"
    return UserError(f"source '{source.name}': there are no documents{where}; check its keys")
