"""A suite on two ranks equals that on one."""

import json
from pathlib import Path

import torch

from moma.errors import UserError
from moma.evaluate.suite import run_suite
from moma.runtime.world import World
from tests.evaluate.reference import mixed_of
from tests.processes import on_ranks


def measure(world: World, tiny, folder: Path, out: Path) -> None:
    mixed = mixed_of(tiny)
    results = [run_suite("perplexity", mixed, tiny.data, world, quiet=True)]
    file = folder / "questions.jsonl"
    results.append(run_suite("multiple_choice", mixed, tiny.data, world, file, quiet=True))
    try:
        run_suite("perplexity", mixed, tiny.data, world, folder / "missing.jsonl", quiet=True)
    except UserError as error:
        results.append({"error": type(error).__name__})
    (out / f"{world.rank}.json").write_text(json.dumps(results))


def test_two_ranks_measure_what_one_does(tiny, tmp_path):
    rows = [{"question": f"the {n}", "choices": ["red", "blue"], "answer": n % 2} for n in range(5)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "one").mkdir()
    measure(World(torch.device("cpu")), tiny, tmp_path, tmp_path / "one")
    on_ranks(2, measure, tiny, tmp_path, tmp_path)
    one = json.loads((tmp_path / "one" / "0.json").read_text())
    for rank in range(2):
        two = json.loads((tmp_path / f"{rank}.json").read_text())
        assert two[1] == one[1] and two[2] == {"error": "SharedError"}
        for source, row in one[0]["sources"].items():
            found = two[0]["sources"][source]
            assert found["documents"] == row["documents"]
            for key in ("perplexity", "bits_per_byte"):
                for bound, value in row[key].items():
                    assert abs(found[key][bound] / value - 1) < 1e-5
