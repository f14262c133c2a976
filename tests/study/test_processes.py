"""Processes that train the runs of a study."""

from moma.study.processes import training_processes


def test_a_training_process_prints_messages_as_the_command_line_does():
    with training_processes(1) as pool:
        propagates = pool.submit(eval, "__import__('logging').getLogger('moma').propagate")
        assert propagates.result() is False
