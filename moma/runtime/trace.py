"""A trace of a few steps: what host and device did when, for chrome://tracing or Perfetto."""

from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

# One step to warm the profiler up, then those that are written.
_WARMUP, _STEPS = 1, 3


class Trace:
    """Traces three steps of this process, to be closed.

    Under FSDP a trace shows the weights of the next part being gathered while one computes
    (`FSDP::all_gather` beside the products, on a stream of its own).
    """

    def __init__(self, folder: Path, after: int):
        """Set up.

        Args:
            folder: where `trace-STEP.json.gz` is written; STEP is the last one in it.
            after: steps of this process before the first one traced; 0 traces none.
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
        """Tell that a step was launched."""
        if self._profile is not None:
            self._step = step
            self._profile.step()

    def close(self) -> None:
        """End a trace that is not whole, too."""
        if self._profile is not None:
            self._profile.stop()

    def _write(self, found: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / f"trace-{self._step:08d}.json.gz"))
