"""The report of a study: a page that loads nothing, its tables as Markdown, and all as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moma.data.outputs import write_output
from moma.study import figures
from moma.study.grid import Study
from moma.study.page import Page, panels, paragraph
from moma.study.results import study_tables
from moma.study.speedup import AXES
from moma.study.tables import markdown

FILES = ("result.json", "report.html", "report.md")


def write_report(study: Study, result: Mapping[str, Any]) -> Path:
    """Write `result.json`, `report.md` and `report.html` into the study's folder."""
    tables = study_tables(result)
    page = Page(
        f"Study: {study.path.name}",
        f"{study.runs[0].variant} is the baseline. Figures and tables are of the runs listed last.",
    )
    warnings = [f"{result['warning']}."] if result["warning"] else []
    for warning in warnings:
        page.add(paragraph(warning))
    _add_figures(page, study, result)
    for each in tables:
        page.add_table(each)
    page.write(study.path / "report.html")
    parts = [f"# Study: {study.path.name}", *warnings]
    for each in tables:
        parts += [f"## {each.title}", each.explanation, markdown(each)]
    write_output(study.path / "report.md", ("\n\n".join(parts) + "\n").encode())
    content = json.dumps(result, indent=2) + "\n"
    write_output(study.path / "result.json", content.encode())
    return study.path / "report.html"


def _add_figures(page: Page, study: Study, result: Mapping[str, Any]) -> None:
    by_variant: dict[str, list[list[dict[str, Any]]]] = {}
    for run in study.runs:
        by_variant.setdefault(run.variant, []).append(run.read_metrics())
    for axis, title in AXES.items():
        page.section(
            f"Training loss over {title}",
            paragraph(
                "Means over seeds of smoothed losses, where all of them have records; bands: from "
                "the lowest to the highest."
            ),
            panels(figures.loss_curves(by_variant, axis)),
        )
    if result["scaling"]:
        page.section(
            "Held-out loss over training FLOPs",
            paragraph(
                "Points: runs. Lines: power laws with an offset, with 95% bands by bootstrap. "
                "Bars: the largest size as predicted from the smaller ones."
            ),
            panels(figures.scaling_laws(result["scaling"])),
        )
    if maps := score_maps(result["variants"]):
        page.section(
            "Scores of routers",
            paragraph(
                "Mean score that an expert, or a depth router, gives to the tokens of a modality, "
                "by layer. Of one seed, since experts of different runs have no common order."
            ),
            panels(maps),
        )


def score_maps(variants: Mapping[str, Any]) -> list[Figure]:
    """A map for each variant whose routers' scores were measured, of its first seed."""
    maps = []
    for variant, values in variants.items():
        scores: dict[str, dict[str, float]] = {}
        for name, value in values["measures"].items():
            if name.startswith("scores/"):
                _, router, expert = name.split("/")
                scores.setdefault(router, {})[expert] = value["values"][0]
        if scores:
            maps.append(figures.score_map(scores, f"{variant}, seed {values['seeds'][0]}"))
    return maps
