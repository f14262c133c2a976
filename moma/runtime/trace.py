"""A profiler trace of a few steps, for chrome://tracing or Perfetto."""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

# Steps that warm up the profiler, and steps that are recorded.
_WARMUP, _STEPS = 1, 3


def start_profiler(folder: Path, after: int, current_step: Callable[[], int]) -> profile | None:
    """Trace three steps of this process; call `step` after each step, and `stop` at the end.

    Under FSDP a trace shows the all-gather of the next layer's weights during the computation of
    the current one (`FSDP::all_gather` on a stream of its own).

    Args:
        folder: where `trace-STEP.json.gz` is written; STEP is the last traced step of the run.
        after: steps of this process before the first traced one; 0 traces none.
        current_step: returns the last finished step of the run.
    """
    if not after:
        return None

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"trace-{current_step():08d}.json.gz"))

    steps = schedule(wait=max(0, after - _WARMUP), warmup=_WARMUP, active=_STEPS, repeat=1)
    profiler = profile(activities=supported_activities(), schedule=steps, on_trace_ready=write)
    profiler.start()
    return profiler
