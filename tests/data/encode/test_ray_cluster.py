"""Encoding on a Ray cluster of two nodes, both on this machine."""

import asyncio
import os
import random
import secrets
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moma.data.documents import SourcePart
from moma.data.encode import prepare, ray_cluster
from moma.data.encode.worker import Encoded, Task
from moma.data.shards import PartRecord
from moma.errors import UserError
from tests.data.encode.preparing import contents, make_recipe, run
from tests.data.encode.test_prepare_kills import wait_somewhere, writers
from tests.factories import write_recipe
from tests.ray_nodes import own_environment, two_nodes


class FakeJob:
    """Its codec returns the sum of an image's values, and records its calls."""

    def __init__(self):
        self.calls: list[int] = []

    def load_codec(self, device):
        def encode(images):
            self.calls.append(len(images))
            if any(image.max() == 255 for image in images):
                raise UserError("bad image")
            return np.array([[int(image.sum())] for image in images])

        return encode


def codec_of(job: Any) -> ray_cluster.BatchingCodec:
    return ray_cluster.BatchingCodec(ray_cluster.Shared(job, os.getcwd(), "name"))


def test_the_images_of_waiting_requests_are_encoded_together():
    job = FakeJob()

    async def requests():
        codec = codec_of(job)
        images = [np.full((count, 1, 1, 3), count, np.uint8) for count in (2, 1, 3)]
        return await asyncio.gather(*map(codec.encode, images))

    first, second, third = asyncio.run(requests())
    assert [first.tolist(), second.tolist(), third.tolist()] == [[[6]] * 2, [[3]], [[9]] * 3]
    assert job.calls == [2, 4]


def test_an_error_of_the_codec_reaches_every_request():
    async def request():
        codec = codec_of(FakeJob())
        bad = codec.encode(np.full((1, 1, 1, 3), 255, np.uint8))
        results = await asyncio.gather(bad, return_exceptions=True)
        return results, await codec.encode(np.ones((1, 1, 1, 3), np.uint8))

    (error,), codes = asyncio.run(request())
    assert isinstance(error, UserError) and codes.tolist() == [[3]]


class GrowingCluster:
    """Of one core, and of four once tasks wait; a task ends when it is waited for."""

    def __init__(self):
        self.cores, self.submitted, self.ended, self.most = 1, [], 0, 0

    def cluster_resources(self):
        return {"CPU": float(self.cores)}

    def put(self, job):
        return job

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=self.submit)

    def submit(self, job, task, actor):
        self.submitted.append(task)
        return len(self.submitted) - 1

    def wait(self, running):
        self.cores, self.most = 4, max(self.most, len(running))
        return running[:1], running[1:]

    def get(self, number):
        self.ended += 1
        return Encoded(self.submitted[number], PartRecord(), [])

    def shutdown(self):
        self.submitted.append("shutdown")


@pytest.mark.parametrize(("processes", "most"), [(None, 8), (3, 3)])
def test_machines_that_join_the_cluster_get_tasks(tmp_path, monkeypatch, processes, most):
    cluster = GrowingCluster()
    monkeypatch.setattr(ray_cluster, "connect_to_ray", lambda address, **options: cluster)
    job: Any = SimpleNamespace(
        image_size=None, sources={"a": SimpleNamespace(unfinished_folder=tmp_path)}
    )
    tasks = [Task("a", number, SourcePart()) for number in range(20)]
    ray_cluster.RayCluster(job, "auto", processes).run(tasks, lambda encoded: None)
    assert cluster.submitted == [*tasks, "shutdown"] and cluster.ended == 20
    assert cluster.most == most


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with two_nodes(tmp_path_factory.mktemp("ray")) as address:
        yield address


def moma(folder, address, **variables):
    command = [sys.executable, "-m", "moma", "prepare", str(folder / "recipe.toml")]
    return subprocess.Popen(
        [*command, "--ray", address, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=own_environment() | variables,
        cwd=folder,
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec_actors", [0, 2])
def test_a_cluster_writes_the_same_bytes(tmp_path, nodes, monkeypatch, codec_actors):
    cut = {"shard_tokens": 150, "part_bytes": 15 * 2**17}
    run(make_recipe(tmp_path, 60, "undisturbed", **cut), processes=1)
    recipe = make_recipe(tmp_path, 60, "data", **cut)
    with_actors = partial(ray_cluster.RayCluster, codec_actors=codec_actors)
    monkeypatch.setattr(prepare, "RayCluster", with_actors)
    run(recipe, ray=nodes)
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path, nodes):
    """Of the driver, and of processes of both nodes."""
    cut = {"shard_tokens": 300, "part_bytes": 10 * 2**17}
    expected = run(make_recipe(tmp_path, 1200, "undisturbed", **cut), processes=1)
    recipe = make_recipe(tmp_path, 1200, "killed", **cut)
    write_recipe(recipe, tmp_path / "recipe.toml")
    draw = random.Random(0)
    process = moma(tmp_path, nodes)
    for _ in range(20):
        wait_somewhere(process, recipe.data.path, draw)
        workers = [pid for pid in writers(recipe.data.path) if pid != process.pid]
        if workers and draw.random() < 0.5:
            os.kill(draw.choice(workers), signal.SIGKILL)
            continue
        process.kill()
        process.communicate()
        process = moma(tmp_path, nodes)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert expected.summary()["documents"]
    assert contents(recipe.data.path) == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_cluster_that_refuses_access_is_reported(tmp_path, nodes):
    write_recipe(make_recipe(tmp_path, 20), tmp_path / "recipe.toml")
    process = moma(tmp_path, nodes, RAY_AUTH_TOKEN=secrets.token_hex(32))
    _, error = process.communicate()
    assert process.returncode == 2
    assert "set RAY_AUTH_MODE=token" in error and "Traceback" not in error
