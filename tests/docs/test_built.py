"""What is built for others: the site, the notebook and the wheel."""

import os
import re
import subprocess
import sys

import pytest

from tests.demo.test_run import SMALL
from tests.docs.pages import DOCS, ROOT

NOTEBOOK = DOCS / "notebooks" / "method.ipynb"


def call(*command, **environment):
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_other_host(tmp_path):
    call(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="?(\w+:)?//|<link[^>]* href="?https?://')
    assert not [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))]


def read_notebook():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_notebook_is_valid_and_has_no_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert len(cells) > 5 and not [cell for cell in cells if cell.outputs or cell.execution_count]


def execute(notebook, folder):
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.slow
def test_the_notebook_makes_a_demo_and_walks_through_it(tmp_path):
    notebook = read_notebook()
    opening = notebook.cells[1]
    changed = opening.source.replace('["pretrain.steps=300"]', repr(SMALL))
    opening.source = changed.replace("STEPS = 200", "STEPS = 2")
    outputs = execute(notebook, tmp_path)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    wanted = (
        "64 image tokens;",
        "by choice:",
        "by causal:",
        "described as",
        "η: {",
        "layer 0 proc",
    )
    assert not [text for text in wanted if text not in printed], printed
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert kinds.count("image/png") == 2 + 3
    assert kinds.count("text/html") == 2
    # From a folder inside, the demo is opened: another one in its place would be refused.
    (tmp_path / "notebooks").mkdir()
    again = read_notebook()
    again.cells = again.cells[:4]
    outputs = execute(again, tmp_path / "notebooks")
    assert "image/png" in outputs[-1].data and not [*(tmp_path / "notebooks").iterdir()]


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_files_that_verbs_need(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    call(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ".")
    (wheel,) = tmp_path.glob("moma-*.whl")
    call(*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel)
    verb = "import os, sys; os.chdir(sys.argv.pop(1)); import moma.cli; moma.cli.main()"
    arguments = ["plan", "configs/paper/90m_dense.toml", "--json"]
    installed = str(tmp_path / "installed")
    assert '"parameters"' in call(
        sys.executable, "-P", "-c", verb, tmp_path, *arguments, PYTHONPATH=installed
    )
    assert (tmp_path / "installed" / "moma" / "study" / "page.css").is_file()
    assert (tmp_path / "installed" / "moma" / "py.typed").is_file()
