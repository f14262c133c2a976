"""The messages that `docs/troubleshooting.md` explains are those of the program."""

import ast
import re

from tests.docs.pages import DOCS, ROOT


def texts(file):
    """The texts of a module, with … for what is inserted."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        constants = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
        if isinstance(node, ast.JoinedStr) or isinstance(constants[0], str):
            yield "".join(map(str, constants))


def test_documented_messages_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    program = "\n".join(text for file in (ROOT / "moma").rglob("*.py") for text in texts(file))

    def is_there(message):
        fragments = [re.escape(part) for part in message.split("…")]
        return re.search("[^\n]*".join(fragments), program)

    assert len(messages) > 30
    assert not [message for message in messages if not is_there(message)]
    assert not is_there("cannot read the receipt…")
