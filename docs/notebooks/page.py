"""A hook of MkDocs that makes a page of the notebook: its texts and code, as they stand."""

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

NOTEBOOK = Path(__file__).with_name("method.ipynb")
NOTE = "*This page is the notebook `docs/notebooks/method.ipynb`; run it to see what it prints.*"


def on_files(files: Any, config: Any) -> None:
    """Add the page after the notebook was found."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    parts = [part(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    text = "\n\n".join([parts[0], NOTE, *parts[1:]])
    files.append(File.generated(config, "notebooks/method.md", content=text))


def part(kind: str, source: str) -> str:
    """A cell as Markdown."""
    return f"```python\n{source}\n```" if kind == "code" else source
