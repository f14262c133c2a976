"""Resources of a training job: memory of a GPU, time, cost and communication.

Nothing is allocated or run: memory follows from shapes (`memory.py`, `activations.py`), time from
the number of operations (`model/flops.py`) and an assumed utilization.
"""

from typing import Any

import torch
from pydantic import Field

from moma.errors import UserError
from moma.model.transformer import Transformer
from moma.plan.activations import activation_bytes
from moma.plan.counts import plan
from moma.plan.memory import (
    accumulated_bytes,
    gathered_bytes,
    held_bytes,
    meta_model,
    unit_elements,
)
from moma.recipe import Config
from moma.runtime.peak import datasheet_peak
from moma.train.recipe import Recipe

_GPU = torch.device("cuda")
_GPUS_PER_NODE = 8


class Machine(Config):
    """GPUs and assumptions about them; the defaults are those of a rented H100 SXM.

    Attributes:
        gpus: number of GPUs.
        mfu: model FLOPs utilization, including the time spent waiting for communication.
        peak: peak operations per second of one GPU in the recipe's precision; by default that of
            the data sheet.
        link: bytes per second that a GPU can send while receiving at the same rate.
        memory: memory of one GPU in bytes.
        price: price of one GPU per hour.
    """

    gpus: int = Field(ge=1)
    mfu: float = Field(0.4, gt=0, le=1)
    peak: float | None = Field(None, gt=0)
    link: float = Field(50e9, gt=0)
    memory: float = Field(80 * 2**30, gt=0)
    price: float = Field(2.5, ge=0)

    @property
    def nodes(self) -> int:
        """Number of machines, of eight GPUs each."""
        return -(-self.gpus // _GPUS_PER_NODE)


def plan_job(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Plan the stage `pretrain` of a recipe on a machine.

    Returns:
        `memory`, `time`, `communication` and `machine`, as in `docs/plan.md`.

    Raises:
        UserError: the number of GPUs is not a multiple of `engine.replicate`.
    """
    copies = recipe.engine.replicate
    if machine.gpus % copies:
        raise UserError(
            f"engine.replicate: {machine.gpus} GPUs cannot be divided among {copies} copies; "
            "choose a divisor of the number of GPUs"
        )
    if machine.peak is None:
        dtype = recipe.engine.compute_dtype(_GPU)
        machine = machine.model_copy(update={"peak": datasheet_peak("H100", dtype)})
    assert machine.peak is not None
    model, ranks = meta_model(recipe), machine.gpus // copies
    memory = _memory(model, recipe, ranks, machine)
    time = _time(recipe, machine, machine.peak)
    sent = _communication(model, recipe, ranks, machine.nodes)
    seconds = sum(sent.values()) / machine.link
    part = {"seconds": seconds, "part_of_step": seconds / time["step_seconds"]}
    return {
        "memory": memory,
        "time": time,
        "communication": sent | part,
        "machine": machine.model_dump(),
    }


def _memory(model: Transformer, recipe: Recipe, ranks: int, machine: Machine) -> dict[str, Any]:
    """Bytes by part on the rank that holds the most, and which ranks hold the most and least."""
    held = held_bytes(model, ranks, recipe.pretrain.optimizer)
    totals = [sum(parts.values()) for parts in held]
    largest = totals.index(max(totals))
    parts = held[largest] | {
        "accumulated_gradients": accumulated_bytes(model, recipe, ranks),
        "gathered_units": gathered_bytes(model, recipe, ranks, _GPU, machine.nodes),
        "activations": activation_bytes(recipe, _GPU),
    }
    total = sum(parts.values())
    return {
        **parts,
        "total": total,
        "fits": total <= machine.memory,
        "largest_rank": largest,
        "smallest_rank": totals.index(min(totals)),
        "held_by_largest": max(totals),
        "held_by_smallest": min(totals),
    }


def _time(recipe: Recipe, machine: Machine, peak: float) -> dict[str, float]:
    counts, settings = plan(recipe), recipe.pretrain
    step_tokens = counts["tokens_per_step"] * machine.gpus
    flops = counts["flops_per_token"] * step_tokens
    step_seconds = flops / (machine.gpus * peak * machine.mfu)
    hours = settings.steps * step_seconds / 3600
    return {
        "tokens_per_step": step_tokens,
        "tokens": step_tokens * settings.steps,
        "flops": flops * settings.steps,
        "step_seconds": step_seconds,
        "tokens_per_second": step_tokens / step_seconds,
        "days": hours / 24,
        "gpu_hours": hours * machine.gpus,
        "cost": hours * machine.gpus * machine.price,
    }


def _communication(model: Transformer, recipe: Recipe, ranks: int, nodes: int) -> dict[str, float]:
    """Bytes that a GPU sends per step.

    Units are all-gathered for the forward and again for the backward pass, the root unit once;
    gradients are reduce-scattered. With ring algorithms over R ranks, a GPU sends (R − 1) / R of
    the data. Between replicas, gradients are all-reduced, which sends twice as much.
    """
    engine, times = recipe.engine, recipe.pretrain.gradient_accumulation_steps
    reductions = 1 if engine.reduce_once else times
    size, sent = engine.compute_dtype(_GPU).itemsize, engine.reduce_dtype(nodes).itemsize
    root, units = unit_elements(model)
    trained = held_bytes(model, 1, recipe.pretrain.optimizer)[0]["gradients"] / 4
    ring = (ranks - 1) / ranks
    between_copies = 2 * (engine.replicate - 1) / engine.replicate / ranks
    return {
        "gathered": times * ring * size * (root + 2 * sum(units)),
        "reduced": reductions * sent * trained * (ring + between_copies),
    }
