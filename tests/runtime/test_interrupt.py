"""Signals in this process: which are recorded, and which end it."""

import os
import signal

import pytest
import torch

from moma.errors import SharedStorageError, StoppedError, StorageError
from moma.runtime.interrupt import interruption
from moma.runtime.world import World

WORLD = World(torch.device("cpu"))


def test_sigterm_may_arrive_twice():
    """Slurm sends it to every process, and torchrun forwards it."""
    before = signal.getsignal(signal.SIGTERM)
    with interruption(WORLD) as request:
        assert signal.getsignal(signal.SIGTERM) == before  # nothing to save yet
        request.install_handlers()
        assert request.poll() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.poll() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_ends_the_process():
    before = signal.getsignal(signal.SIGINT)
    with interruption(WORLD) as request:
        request.install_handlers()
        os.kill(os.getpid(), signal.SIGINT)
        assert request.poll() == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), interruption(WORLD) as request:
        request.install_handlers()
        raise KeyError
    assert signal.getsignal(signal.SIGINT) == before


def test_a_stopping_process_ignores_sigterm():
    """It still has to print the message and exit with its code."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError), interruption(WORLD) as request:
        request.install_handlers()
        raise StoppedError
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_a_storage_error_of_one_rank_takes_precedence_over_a_signal():
    with pytest.raises(SharedStorageError, match="full"), interruption(WORLD) as request:
        assert request.poll() is None
        request.receive(signal.SIGTERM)
        request.poll(StorageError("full"))  # takes precedence: nothing can be saved
