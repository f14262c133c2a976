"""`moma doctor`: what is there, what is missing, and the exit code."""

import json
from importlib import metadata

import torch

from tests.command_line import moma

INSTALLED = """Metadata-Version: 2.4
Name: moma
Version: 9.8.7
Requires-Dist: numpy>=1
Requires-Dist: no-such-package>=1.5
Requires-Dist: pydantic>=999
Requires-Dist: unneeded; python_version < "3"
Provides-Extra: demo
Requires-Dist: no-such-drawings>=2; extra == "demo"
Requires-Dist: pillow; extra == "demo"
Provides-Extra: serve
Requires-Dist: pillow; extra == "serve"
"""


def test_this_machine_can_run_moma():
    outcome = moma("doctor", "--json")
    found = json.loads(outcome.out)
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory"] > 2**30
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert outcome.code == bool(found["problems"])
    table = moma("doctor")
    assert table.code == outcome.code
    assert metadata.version("torch") in table.out
    assert ("all that moma needs is there" in table.out) == (outcome.code == 0)


def test_what_is_missing_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    folder = tmp_path / "moma-9.8.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = moma("doctor", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert found["machine"]["moma"] == "9.8.7"
    assert found["packages"].keys() == {"numpy", "no-such-package", "pydantic"}
    assert found["packages"]["no-such-package"] is None
    problems = "\n".join(found["problems"])
    assert "pip install 'no-such-package>=1.5'" in problems
    assert "pip install 'pydantic>=999'" in problems and "numpy" not in problems
    assert found["extras"]["demo"]["missing"] == ["no-such-drawings"]
    assert found["extras"]["demo"]["install"] == "pip install 'moma[demo]'"
    assert found["extras"]["serve"]["missing"] == []
    assert [name for name, each in found["extras"].items() if not each["purpose"]] == []
    printed = moma("doctor")
    assert printed.code == 1
    assert "to install an extra: pip install 'moma[demo]'" in printed.out
    assert "problem: no-such-package>=1.5 is needed, nothing is installed" in printed.out
