"""A job of 10,000 parts: the memory of the process that distributes them is bounded."""

import subprocess
import sys

import pytest

# In a process of its own, whose peak of memory is that of the job.
CODE = """
import os, sys
from pathlib import Path
from moma.data.documents import Document, SourceConfig, SourcePart
from moma.data.encode.progress import JobProgress
from moma.data.encode.source import SourceEncoding
from moma.data.encode.worker import Encoded, Task
from moma.data.shards import SPLITS, Counts, PartRecord
from tests.factories import make_vocabulary


class Many(SourceConfig):
    name: str = "many"

    def parts(self, part_bytes):
        return [
            SourcePart(first=n, stop=n + 1, file=f"/data/some/folder/file-{n}.jsonl", size=2**28)
            for n in range(10_000)
        ]


encoding = SourceEncoding(Many(), make_vocabulary(300), 0.0, Path(sys.argv[1]) / "many")
shards = encoding.begin()
assert len(shards.pending) == 10_000
progress = JobProgress(lambda done, note="": None, 10_000, 10_000 * 2**28, PartRecord(), 10_000)
counts = {split: Counts(documents=10, tokens=2**25, images=5) for split in SPLITS}
for number in shards.pending:
    checksums = {
        f"{kind}-{number:05}-{file:05}.arrow": (2**26, f"{number * 3 + file:064x}")
        for file in range(3)
        for kind in SPLITS
    }
    records = [
        PartRecord(
            part=number,
            file=file,
            is_last=file == 2,
            stop=20,
            counts=counts,
            checksums=checksums,
        )
        for file in range(3)
    ]
    task = Task("many", number, shards.plan[number])
    progress.note(Encoded(task, PartRecord()))
    progress.note(Encoded(task, sum(records, PartRecord()), records))
    encoding.add(shards, number, records)
assert not shards.pending
info = shards.finish(encoding.vocabulary)
assert info.whole.total.documents == 10_000 * 3 * 20
# Not `ru_maxrss`, which counts the memory of the process that started this one, too.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
def test_ten_thousand_parts_take_less_than_a_gibibyte(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024
