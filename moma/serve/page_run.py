"""What the page shows of a run: its curves and sheets of images, as they grow."""

import json
import threading
from pathlib import Path
from typing import Any

from moma.serve import page_folder  # isort: skip  # noqa: F401
import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from moma.files import open_regular
from moma.runs import Run

_LOSSES = {"loss": "all tokens", "loss_text": "text", "loss_image": "images"}
# More points than a curve has pixels are averaged.
_MAX_POINTS = 400
_MAX_SHEETS = 12


class RunView:
    """Follows the log of a run; several people may look at it."""

    def __init__(self, run: Run):
        self.name = run.path.resolve().name
        self._run, self._lock = run, threading.Lock()
        self._offset, self._records = 0, list[dict[str, Any]]()

    def update(self, shown: Any) -> list[Any]:
        """Return what is new since `shown`, a value that this method returned.

        Returns:
            Status, curves and sheets, each unchanged if there is nothing new, and the next `shown`.
        """
        records, sheets = self._read(), self._sheets()
        now = [len(records), records[-1]["step"] if records else 0, [str(each) for each in sheets]]
        if now == shown:
            return [gr.skip()] * 3 + [shown]
        images = gr.skip()
        if shown is None or now[2] != shown[2]:
            images = [(_read_sheet(path), path.stem) for path in sheets]
        return [_status(records), _curves(records), images, now]

    def _read(self) -> list[dict[str, Any]]:
        """The log's records so far: only what was appended is read."""
        with self._lock:
            try:
                with open_regular(self._run.metrics) as file:
                    if file.seek(0, 2) < self._offset:  # rewritten after a restart
                        self._offset, self._records = 0, []
                    file.seek(self._offset)
                    added = file.read()
            except OSError:
                return list(self._records)
            complete = added[: added.rfind(b"\n") + 1]
            self._offset += len(complete)
            for line in complete.splitlines():
                record = json.loads(line)
                self._records.append({key: record.get(key) for key in ("step", *_LOSSES)})
            return list(self._records)

    def _sheets(self) -> list[Path]:
        """The newest sheets of images, newest first."""
        found = sorted((self._run.path / "validation").glob("step-*.png"), reverse=True)
        return found[:_MAX_SHEETS]


def _read_sheet(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _status(records: list[dict[str, Any]]) -> str:
    if not records:
        return "The run has no log record yet."
    last = records[-1]
    losses = (f"{name} {last[key]:.4f}" for key, name in _LOSSES.items() if last[key] is not None)
    return f"Step {last['step']:,}. Training loss: {', '.join(losses)}."


def _curves(records: list[dict[str, Any]]) -> pd.DataFrame:
    """The training losses over steps; groups of records are averaged."""
    parts = []
    for key, name in _LOSSES.items():
        points = np.array([(r["step"], r[key]) for r in records if r[key] is not None])
        if not len(points):
            continue
        groups = np.array_split(points, min(_MAX_POINTS, len(points)))
        step, loss = np.array([group.mean(0) for group in groups]).T
        parts.append(pd.DataFrame({"step": step.round(), "loss": loss, "loss of": name}))
    return pd.concat(parts) if parts else pd.DataFrame({"step": [], "loss": [], "loss of": []})
