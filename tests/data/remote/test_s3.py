"""From preparing to resuming with a real S3 server on this machine."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import datasets
import pytest
from fsspec import filesystem

from moma.data.batches.iterator import Batches
from moma.data.encode.existing import fetch_existing
from moma.data.encode.prepare import prepare
from moma.data.inspect import inspect
from moma.data.remote.fetching import provide_data
from moma.data.remote.storage import open_storage
from moma.data.shards import open_sources
from moma.errors import StorageError, UserError
from moma.runs import Run
from moma.train.loop import train
from moma.vocabulary import Vocabulary
from tests.data.encode.preparing import make_recipe
from tests.data.remote.test_training import CPU, arrow_files, at, with_data
from tests.factories import write_recipe
from tests.ray_nodes import own_environment
from tests.train.test_loop import WORLD, KilledError, assert_same_run, kill_after

pytestmark = pytest.mark.slow
ADDRESS = "s3://corpora/tiny"


@pytest.fixture(scope="module")
def s3():
    """A server with the bucket `corpora`; clients find it by the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        yield client
        forget_connections()
        server.stop()


def forget_connections():
    filesystem("s3").clear_instance_cache()
    open_storage.cache_clear()


def names_in(client):
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="corpora")
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def vocabulary_of(recipe):
    return Vocabulary.load(recipe.data.path / "vocabulary.json")


def batches_of(recipe):
    with closing(Batches(recipe.data, vocabulary_of(recipe), 0)) as batches:
        return [next(batches).tokens_BS.tolist() for _ in range(4)]


def with_run(recipe, path):
    stage = recipe.pretrain.model_copy(update={"steps": 4, "checkpoint_every": 2, "log_every": 1})
    return recipe.model_copy(update={"run": path, "pretrain": stage})


def test_prepare_train_and_resume_from_s3(tiny, tmp_path, s3, monkeypatch):
    local = with_data(at(tiny, tmp_path / "local", tokenizers=tiny.data.path), remote=None)
    prepare(local, CPU, quiet=True)
    recipe = at(tiny, tmp_path / "data", ADDRESS, tokenizers=tiny.data.path)
    prepare(recipe, CPU, quiet=True, processes=2)
    objects = [name for name in names_in(s3) if name.endswith(".arrow")]
    assert len(objects) == len(arrow_files(local.data.path))
    fetch_existing(ADDRESS, tmp_path / "seen", None, decodes=False)
    seen = inspect(tmp_path / "seen", None, tmp_path)
    assert seen["sources"] == inspect(local.data.path, None, tmp_path)["sources"]
    reader = at(tiny, tmp_path / "reader", ADDRESS)
    provide_data(reader.data)
    assert batches_of(reader) == batches_of(local)

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    files = f"{ADDRESS}/shards/text/*/train-*.arrow"
    rows = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "datasets")
    )
    opened = open_sources(local.data.path, ["text"], vocabulary_of(local))["text"]
    encoded = opened.splits["train"]
    assert sorted(rows["name"]) == sorted(encoded.name(row) for row in range(len(encoded)))

    # Two steps from the bucket, then two more on another machine: as four from the folder.
    expected = train(with_run(local, tmp_path / "expected"), WORLD, quiet=True)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(KilledError):
            train(with_run(reader, tmp_path / "run"), WORLD, quiet=True)
    shutil.rmtree(tmp_path / "reader")
    moved = with_run(with_data(reader, path=tmp_path / "other"), tmp_path / "run")
    assert_same_run(expected, train(moved, WORLD, quiet=True))
    assert arrow_files(tmp_path / "other/cache") and not arrow_files(tmp_path / "other/shards")


class Machine:
    """A folder of its own, and processes that know those of others only by the address."""

    def __init__(self, recipe, folder):
        folder.mkdir()
        self.folder, self.data, self.run = folder, folder / "data", Run(folder / "run")
        recipe = with_run(with_data(recipe, path=self.data), self.run.path)
        write_recipe(recipe, folder / "my.toml")

    def start(self, verb, *options):
        return subprocess.Popen(
            [sys.executable, "-m", "moma", verb, "my.toml", *options],
            cwd=self.folder,
            env=own_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def made(self, share, of):
        """How many files of captions are made that belong to a share."""
        records = self.data.glob("shards/captions.partial/part-*.json")
        return sum(int(path.stem.split("-")[1]) % of + 1 == share for path in records)


def end(process):
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


def test_two_machines_share_the_work_and_one_is_killed(tiny, tmp_path, s3):
    local = make_recipe(tmp_path, 400, "local", shard_tokens=300, part_bytes=10 * 2**17)
    local = local.model_copy(update={"model": tiny.model, "pretrain": tiny.pretrain})
    prepare(local, CPU, quiet=True)
    recipe = with_data(local, remote="s3://corpora/shares")
    first, second, third = (Machine(recipe, tmp_path / name) for name in ("one", "two", "three"))
    working = first.start("prepare", "--share", "1/2", "--json")
    killed = second.start("prepare", "--share", "2/2", "--json")
    while second.made(2, 2) < 5 and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    again = second.start("prepare", "--share", "2/2", "--json")
    assert 0 in [json.loads(end(process))["missing_parts"] for process in (working, again)]
    files: dict[str, str] = {}
    for name in names_in(s3):
        if found := re.fullmatch(r"shares/shards/(\w+)/\w+/(.*)-\w{16}\.arrow", name):
            assert files.setdefault("/".join(found.groups()), name) == name
    folder = local.data.path / "shards"
    assert files.keys() == {str(path.with_suffix("")) for path in arrow_files(folder)}
    for file, name in files.items():
        content = s3.get_object(Bucket="corpora", Key=name)["Body"].read()
        assert content == (folder / f"{file}.arrow").read_bytes()
    end(third.start("train"))
    expected = train(with_run(local, tmp_path / "expected"), WORLD, quiet=True)
    assert_same_run(expected, third.run)


def test_failures_name_the_address_and_the_remedy(tiny, tmp_path, s3):
    missing = at(tiny, tmp_path / "data", "s3://missing/tiny", tokenizers=tiny.data.path)
    with pytest.raises(UserError, match=r"s3://missing/tiny/.*: not found; .*create the bucket"):
        prepare(missing, CPU, quiet=True)
    with pytest.raises(UserError, match=r"s3://corpora/nothing: has no tokenizers yet; run `moma"):
        provide_data(at(tiny, tmp_path / "reader", "s3://corpora/nothing").data)
    with pytest.raises(UserError, match=r"s3://missing/tiny: has no tokenizers yet; run `moma"):
        fetch_existing("s3://missing/tiny", tmp_path / "seen", None, decodes=False)


def test_a_server_that_cannot_be_reached(tiny, tmp_path, s3, monkeypatch):
    forget_connections()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://corpora/tiny/.*check the network and the endp"):
        provide_data(at(tiny, tmp_path / "reader", ADDRESS).data)
    forget_connections()


def test_an_object_is_created_once(s3, monkeypatch):
    storage = open_storage(ADDRESS)
    assert storage.create("once", b"1")
    # As if another machine wrote it between the question and the answer.
    monkeypatch.setattr(storage, "size", lambda name: None)
    assert not storage.create("once", b"2")
    assert storage.read("once") == b"1"
