"""Signals in this process: which are taken note of, and which end it."""

import os
import signal

import pytest
import torch

from moma.runtime.interrupt import interruption
from moma.runtime.world import World

WORLD = World(torch.device("cpu"))


def test_sigterm_may_come_twice():
    """From Slurm to every process, and from torchrun once more."""
    before = signal.getsignal(signal.SIGTERM)
    with interruption(WORLD) as asked:
        assert asked.agreed() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.agreed() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_ends_at_once():
    with interruption(WORLD) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.agreed() == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), interruption(WORLD):
        raise KeyError
    assert signal.getsignal(signal.SIGINT) == before
