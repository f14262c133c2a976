"""Processes that train the runs of a study."""

from functools import partial

from moma.study.processes import run_in_processes


def test_a_training_process_prints_messages_as_the_command_line_does():
    job = partial(eval, "__import__('logging').getLogger('moma').propagate")
    assert run_in_processes([job], 1, lambda: None) == [False]
