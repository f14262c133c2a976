"""What is built for others: the site, the notebook and the wheel."""

import os
import re
import subprocess
import sys

import pytest

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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    from nbclient import NotebookClient

    notebook = read_notebook()
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 150", "STEPS = 10")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (answer,) = notebook.cells[-2].outputs[-1:]
    assert "image/png" in answer.data


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
