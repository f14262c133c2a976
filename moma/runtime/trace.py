"""A profiler trace of a few steps, for chrome://tracing or Perfetto."""

from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

# Steps that warm up the profiler, and steps that are recorded.
_WARMUP, _STEPS = 1, 3


class Trace:
    """Traces three steps of this process. Close it after use.

    Under FSDP a trace shows the all-gather of the next layer's weights during the computation of
    the current one (`FSDP::all_gather` on a stream of its own).
    """

    def __init__(self, folder: Path, after: int):
        """Create the trace.

        Args:
            folder: where `trace-STEP.json.gz` is written; STEP is the last traced step.
            after: steps of this process before the first traced one; 0 traces none.
        """
        self._folder, self._step = folder, 0
        self._profile = None
        if after:
            when = schedule(wait=max(0, after - _WARMUP), warmup=_WARMUP, active=_STEPS, repeat=1)
            self._profile = profile(
                activities=supported_activities(), schedule=when, on_trace_ready=self._write
            )
            self._profile.start()

    def end_step(self, step: int) -> None:
        """Count a step that was launched."""
        if self._profile is not None:
            self._step = step
            self._profile.step()

    def close(self) -> None:
        """End the trace, also an incomplete one."""
        if self._profile is not None:
            self._profile.stop()

    def _write(self, found: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / f"trace-{self._step:08d}.json.gz"))
