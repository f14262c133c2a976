"""The results of a study: means and intervals over seeds, and their tables."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from moma.study.documents import warn_of_other_documents
from moma.study.grid import Study, StudyRun
from moma.study.measures import HELD_OUT_SUITES
from moma.study.scaling import MIN_SIZES, Curve, crossings, fit_curve
from moma.study.speedup import AXES, LOSSES, speedups, training_seconds
from moma.study.tables import Table, flattened, runs_table

CONFIDENCE = 0.95
# To how many times the largest FLOPs a law is drawn.
_DRAWN = 3
_LOSSES = tuple(LOSSES.values())


class Estimate(NamedTuple):
    """A figure over seeds.

    Attributes:
        mean: the mean; None if a seed has no value.
        half_width: of the 95% interval of the mean by Student's t; None with one seed.
        values: of each seed.
    """

    mean: float | None
    half_width: float | None
    values: Sequence[float | None]

    def __str__(self) -> str:
        """Such as `0.7342 ± 0.0011`."""
        if self.mean is None:
            reached = sum(value is not None for value in self.values)
            return f"– ({reached} of {len(self.values)})" if reached else "–"
        if not self.half_width:
            return f"{self.mean:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.half_width)))
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and interval of a figure; values over seeds are taken as normally distributed."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Estimate(None, None, values)
    if len(known) == 1:
        return Estimate(known[0], None, values)
    quantile = stdtrit(len(known) - 1, (1 + CONFIDENCE) / 2)  # of Student's t
    half_width = float(quantile) * statistics.stdev(known) / len(known) ** 0.5
    return Estimate(statistics.mean(known), half_width, values)


def summarize(study: Study) -> dict[str, Any]:
    """Estimates of every figure by variant; η is against the baseline's run of the same seed.

    Returns:
        `warning`: of runs that were measured on other documents than the first; empty if there are
        none.
        `variants`: variant → `runs` (folders), `seeds`, `seconds` (of the training of each run),
        `measures` (figures by their names, joined by a slash) and, except for the first, `speedup`
        over `flops` and over `seconds`.
        `scaling`: curve → loss → `exponent` and `offset` of the fitted law with the ends of their
        95% intervals, the `prediction` of the largest size, or null, and what a figure of them
        needs: `points` of all runs, and the `law` with a 95% band, or null, at other FLOPs.
        `crossings`: loss → pair of curves → FLOPs at which they cross: `median`, ends of the
        interval, and the share of samples that do.
    """
    by_variant: dict[str, list[StudyRun]] = {}
    for run in study.runs:
        by_variant.setdefault(run.variant, []).append(run)
    baseline = study.runs[0].variant
    metrics = {run.name: run.read_metrics() for run in study.runs}
    found: dict[str, Any] = {}
    documents: dict[str, str] = {}
    for variant, runs in by_variant.items():
        results = [run.read_result() for run in runs]
        measured = [(run, own) for run, own in zip(runs, results, strict=True) if own]
        documents |= {run.name: own["documents"] for run, own in measured if "documents" in own}
        flat = [dict(flattened(result["measures"], "/")) for result in results if result]
        found[variant] = {
            "runs": [str(run.run.path) for run in runs],
            "seeds": [run.seed for run in runs],
            "seconds": [training_seconds(metrics[run.name]) for run in runs],
            "measures": _estimates(flat),
        }
        if variant == baseline:
            continue
        same = [(metrics.get(f"{baseline}-{run.seed}"), metrics[run.name]) for run in runs]
        pairs = [(of_baseline, own) for of_baseline, own in same if of_baseline is not None]
        if pairs:
            found[variant]["speedup"] = {
                axis: _estimates([speedups(*pair, axis) for pair in pairs]) for axis in AXES
            }
    warning = warn_of_other_documents(documents)
    curves = {key: _curves(study, key) for key in _LOSSES}
    return {
        "warning": warning,
        "variants": found,
        "scaling": {
            name: {key: _describe_curve(each[name]) for key, each in curves.items() if name in each}
            for name in curves[_LOSSES[0]]
        },
        "crossings": {key: _describe_crossings(each) for key, each in curves.items()},
    }


def _curves(study: Study, key: str) -> dict[str, Curve]:
    """The scaling curves of a held-out loss, causally where there are routers."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in study.runs:
        result = run.read_result()
        if run.curve is not None and result is not None:
            held_out = result["measures"]["held_out"]
            by = "threshold" if "threshold" in held_out else next(iter(held_out))
            if held_out[by][key] is not None:
                points.setdefault(run.curve, []).append((result["flops"], held_out[by][key]))
    found = {name: tuple(map(np.array, zip(*each, strict=True))) for name, each in points.items()}
    return {
        name: fit_curve(flops, loss, seed)
        for seed, (name, (flops, loss)) in enumerate(found.items())
        if len(np.unique(flops)) >= MIN_SIZES
    }


def _describe_curve(curve: Curve) -> dict[str, Any]:
    first, *others = curve.laws
    prediction = curve.prediction
    return {
        "exponent": [first.exponent, *_interval([law.exponent for law in others])],
        "offset": [first.offset, *_interval([law.offset for law in others])],
        "prediction": prediction and prediction._asdict() | {"is_inside": prediction.is_inside},
        "points": {"flops": curve.flops.tolist(), "loss": curve.loss.tolist()},
        "law": _describe_law(curve),
    }


def _describe_law(curve: Curve) -> dict[str, list[float] | None]:
    """The fitted law, and quantiles of those of the bootstrap, from the smallest size on."""
    flops = np.geomspace(curve.flops.min(), _DRAWN * curve.flops.max(), 50)
    first, *others = ([*map(float, law(flops))] for law in curve.laws)
    low, high = np.quantile(others, [0.025, 0.975], axis=0).tolist() if others else (None, None)
    return {"flops": flops.tolist(), "loss": first, "low": low, "high": high}


def _describe_crossings(curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {
        " and ".join(pair): {
            "median": float(np.median(at)) if at else None,
            "interval": _interval(at) if at else None,
            "share": len(at) / min(len(curves[name].laws) for name in pair),
        }
        for pair, at in (crossings(curves) if len(curves) > 1 else {}).items()
    }


def _interval(samples: Sequence[float]) -> list[float]:
    return [float(end) for end in np.quantile(samples, [0.025, 0.975])] if samples else []


def _estimates(of_seeds: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for values in of_seeds for name in values)
    return {name: estimate([values.get(name) for values in of_seeds])._asdict() for name in names}


def study_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary that have content."""
    result = summary["variants"]
    baseline = next(iter(result))
    seeds = len(result[baseline]["seeds"])
    interval = f"Means over {seeds} seeds with 95% intervals." if seeds > 1 else "One seed."
    speedup_rows = [
        (name, over, *(_shown(value) for value in by_loss.values()))
        for name, values in result.items()
        for over, by_loss in values.get("speedup", {}).items()
    ]
    made = [
        _loss_table(
            result,
            "held_out",
            "Held-out loss",
            f"Nats per target, on the same documents for all runs, by routing. {interval}",
        ),
        *(_suite_table(result, suite, interval) for suite in HELD_OUT_SUITES),
        Table(
            "Speed-up η",
            f"How many times less than {baseline} a run needs for {baseline}'s final training "
            "loss; a dash: some runs do not reach it (in brackets: how many do).",
            ("variant", "over", "all tokens", "text", "images"),
            speedup_rows,
        ),
        _loss_table(
            result,
            "routing/losses",
            "Held-out loss when part of the routing changes",
            "`choice depth`: expert choice of the depth routers, thresholds of the experts; "
            "`choice experts`: the reverse; `flips`: thresholds, with a share of decisions "
            "inverted.",
        ),
        _agreement_table(result),
        _taken_table(result),
        *_scaling_tables(summary),
        runs_table(
            (name, *of_run)
            for name, values in result.items()
            for of_run in zip(values["runs"], values["seconds"], strict=True)
        ),
    ]
    return [each for each in made if each.rows]


def _shown(value: Mapping[str, Any]) -> str:
    return str(Estimate(**value))


def _rows(
    result: Mapping[str, Any], prefix: str, shown: Callable[[Mapping[str, Any]], str]
) -> dict[tuple[str, str], dict[str, str]]:
    """The figures named `PREFIX/ROW/COLUMN`: by variant and row, then by column."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for variant, values in result.items():
        for name, value in values["measures"].items():
            if name.startswith(f"{prefix}/"):
                row, _, column = name.removeprefix(f"{prefix}/").rpartition("/")
                rows.setdefault((variant, row), {})[column] = shown(value)
    return rows


def _loss_table(result: Mapping[str, Any], prefix: str, title: str, explanation: str) -> Table:
    rows = _rows(result, prefix, _shown)
    cells = [(*names, *(row[key] for key in _LOSSES)) for names, row in rows.items()]
    return Table(title, explanation, ("variant", "routing", "loss", "text", "images"), cells)


def _suite_table(result: Mapping[str, Any], suite: str, interval: str) -> Table:
    rows = _rows(result, suite, _shown)
    columns = next(iter(rows.values()), {})
    return Table(
        f"Suite: {suite}",
        "On all held-out documents, and on those of each source, under causal routing. " + interval,
        ("variant", "source", *columns),
        [(*names, *row.values()) for names, row in rows.items()],
    )


def _agreement_table(result: Mapping[str, Any]) -> Table:
    rows = _rows(result, "routing/agreement", _percent)
    cells = [(*names, row["threshold"], row["auxiliary"]) for names, row in rows.items()]
    return Table(
        "Agreement with expert choice",
        "Share of decisions on eligible tokens that are those of expert choice, for the same "
        "logits, by layer, router and modality of the tokens.",
        ("variant", "router", "thresholds", "auxiliary routers"),
        cells,
    )


def _taken_table(result: Mapping[str, Any]) -> Table:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for (variant, data), by_router in _rows(result, "routing/taken", _percent).items():
        for router, cell in by_router.items():
            rows.setdefault((variant, router), {})[data] = cell
    parts = ("mixed", "text", "image")
    return Table(
        "Experts per token under thresholds",
        "In percent; of a depth router, the tokens that it takes. On held-out documents as they "
        "are, on those without images, and on images without their text.",
        ("variant", "router", *parts),
        [(*names, *(row.get(part, "–") for part in parts)) for names, row in rows.items()],
    )


def _scaling_tables(summary: Mapping[str, Any]) -> list[Table]:
    def span(value: Sequence[float]) -> str:
        return f"{value[0]:.3g}" + (f" ({value[1]:.3g} to {value[2]:.3g})" if value[1:] else "")

    def predicted(value: Mapping[str, Any] | None) -> tuple[str, ...]:
        if value is None:
            return ("–",) * 3
        between = f"{value['low']:.4g} to {value['high']:.4g}"
        return between, f"{value['measured']:.4g}", "yes" if value["is_inside"] else "no"

    fits = Table(
        "Scaling of the held-out loss",
        "offset + scale · FLOPs^(−exponent), with 95% intervals by bootstrap, if there are at "
        "least nine runs; the largest size as predicted from the smaller ones.",
        ("curve", "loss", "exponent", "offset", "predicted", "measured", "inside"),
        [
            (curve, key, span(fit["exponent"]), span(fit["offset"]), *predicted(fit["prediction"]))
            for curve, by_loss in summary["scaling"].items()
            for key, fit in by_loss.items()
        ],
    )
    crossing = Table(
        "Where scaling curves cross",
        "FLOPs of training, extrapolated up to 1,000 times the largest; the share of bootstrap "
        "samples in which the curves cross at all.",
        ("curves", "loss", "median FLOPs", "95% interval", "share"),
        [
            (
                pair,
                key,
                value["median"],
                "–" if value["interval"] is None else "{:.3g} to {:.3g}".format(*value["interval"]),
                f"{value['share']:.0%}",
            )
            for key, by_pair in summary["crossings"].items()
            for pair, value in by_pair.items()
        ],
    )
    return [fits, crossing]


def _percent(value: Mapping[str, Any]) -> str:
    mean = value["mean"]
    return "–" if mean is None else f"{100 * mean:.1f}%"
