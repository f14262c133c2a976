"""The folder of the page's files, which Gradio must know before it is imported."""

import os
from tempfile import TemporaryDirectory

# Removed when the process ends.
_FOLDER = TemporaryDirectory(prefix="moma-page-")
FOLDER = _FOLDER.name
os.environ["GRADIO_TEMP_DIR"] = FOLDER
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
