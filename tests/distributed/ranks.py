"""Starts the processes of a job over gloo."""

import faulthandler
import os
import socket

import torch
from torch import multiprocessing

from moma.runtime.world import join_world

# Imported once, by a process from which those of all jobs are forked.
multiprocessing.set_forkserver_preload(["moma.train.loop", "moma.plan.memory"])


def in_process(rank: int, ranks: int, port: int, job, *arguments) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_world() as world:
        job(world, *arguments)


def on_ranks(ranks: int, job, *arguments) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (ranks, port, job, *arguments)
    multiprocessing.start_processes(in_process, arguments, nprocs=ranks, start_method="forkserver")
