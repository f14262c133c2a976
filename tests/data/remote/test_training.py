"""Prepared at an address, and trained on from there: the same as from a folder."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
import torch

from moma.data.batches.iterator import Batches
from moma.data.encode.prepare import prepare
from moma.data.encode.upload import SourceUpload
from moma.data.inspect import inspect
from moma.data.remote.fetching import provide_data
from moma.data.shards import PartRecord
from moma.errors import UserError
from moma.runs import Run
from moma.runtime.world import World
from moma.train.changes import write_run_folder
from moma.train.loop import train
from moma.train.replay import replay
from moma.train.restore import provide_training_data, require_training_data, trained_shards
from moma.vocabulary import Vocabulary
from tests.train.test_fault import exploding
from tests.train.test_loop import WORLD, KilledError, assert_same_run, kill_after

CPU = torch.device("cpu")
ADDRESS = "ram://bucket/corpus"


def memory():
    """Objects by path."""
    return fsspec.filesystem("ram").store


@pytest.fixture(autouse=True)
def _empty_memory():
    memory().clear()
    fsspec.filesystem("ram").pseudo_dirs[:] = [""]


def with_data(recipe, **changes):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def at(recipe, path, address=ADDRESS, **changes):
    """The recipe with another folder, an address, and small files."""
    changes = {"shard_tokens": 300, "part_bytes": 2000, **changes}
    return with_data(recipe, path=path, remote=address, **changes)


def batches_of(recipe, number=5):
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    with closing(Batches(recipe.data, vocabulary, 0)) as batches:
        return [next(batches).tokens_BS.tolist() for _ in range(number)]


def arrow_files(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*.arrow"))


@pytest.fixture(scope="module")
def prepared_once(tiny, tmp_path_factory):
    """A recipe that is prepared at the address, the objects there, and what training reads."""
    memory().clear()
    recipe = at(tiny, tmp_path_factory.mktemp("prepared") / "first", tokenizers=tiny.data.path)
    prepare(recipe, CPU, quiet=True)
    objects = {name: file.getvalue() for name, file in memory().items()}
    return recipe, objects, batches_of(recipe)


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """A copy of it that a test may change."""
    recipe, objects, _ = prepared_once
    memory().clear()
    for name, content in objects.items():
        fsspec.filesystem("ram").pipe_file(name, content)
    shutil.copytree(recipe.data.path, tmp_path / "first")
    return with_data(recipe, path=tmp_path / "first")


@pytest.fixture
def expected(prepared_once):
    return prepared_once[2]


def test_training_reads_from_the_address_what_it_reads_from_a_folder(
    tiny, prepared, tmp_path, expected
):
    local = with_data(prepared, path=tmp_path / "local", remote=None)
    prepare(local, CPU, quiet=True)
    assert len(arrow_files(tmp_path / "local")) > 6
    other_machine = at(tiny, tmp_path / "second")
    run = train(other_machine.model_copy(update={"run": tmp_path / "run"}), World(CPU), quiet=True)
    assert run.exists
    assert batches_of(other_machine) == batches_of(local) == batches_of(prepared) == expected
    assert not arrow_files(tmp_path / "second/shards")
    for path in tmp_path.glob("second/cache/shards/*/*/*.arrow"):
        name = path.stem.rpartition("-")[0] + ".arrow"
        source = path.parent.parent.name
        assert path.read_bytes() == (tmp_path / "local/shards" / source / name).read_bytes()


def test_another_machine_continues_what_was_interrupted(
    prepared, tiny, tmp_path, monkeypatch, expected
):
    memory().clear()
    calls: list[str] = []
    upload = SourceUpload.upload

    def upload_some(self, folder, record):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(record.name)
        upload(self, folder, record)

    third, fourth = (
        at(tiny, tmp_path / name, tokenizers=tiny.data.path) for name in ("third", "fourth")
    )
    monkeypatch.setattr(SourceUpload, "upload", upload_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(third, CPU, quiet=True)
    unfinished = inspect(third.data.path, "captions", tmp_path / "figures")
    assert 0 < unfinished["documents"] == sum(unfinished["lengths"]["documents"])
    with pytest.raises(UserError, match=r"ram://.*no complete shards of the source 'captions'"):
        provide_data(at(tiny, tmp_path / "early").data)
    parts: list[str] = []

    def upload_rest(self, folder, record):
        parts.append(record.name)
        upload(self, folder, record)

    monkeypatch.setattr(SourceUpload, "upload", upload_rest)
    prepare(fourth, CPU, quiet=True)
    assert not set(parts[: len(calls)]) & set(calls) and parts
    assert batches_of(fourth) == expected
    # The first machine finds its own and the other one's parts.
    parts.clear()
    prepare(third, CPU, quiet=True)
    assert not parts
    assert batches_of(third) == expected


def test_two_machines_at_once_lose_nothing(tiny, prepared, tmp_path, monkeypatch, expected):
    memory().clear()
    uploaded: list[PartRecord] = []
    upload = SourceUpload.upload
    first, second = (
        at(tiny, tmp_path / name, tokenizers=tiny.data.path) for name in ("one", "two")
    )

    def upload_and_let_the_other_run(self, folder, record):
        upload(self, folder, record)
        uploaded.append(record)
        if len(uploaded) == 3:
            prepare(second, CPU, quiet=True)

    monkeypatch.setattr(SourceUpload, "upload", upload_and_let_the_other_run)
    prepare(first, CPU, quiet=True)
    assert len(uploaded) > 6
    assert batches_of(first) == batches_of(second) == expected
    assert batches_of(prepared_copy(tiny, tmp_path / "reader")) == expected


def prepared_copy(tiny, path):
    recipe = at(tiny, path)
    provide_data(recipe.data)
    return recipe


def test_other_tokenizers_are_refused_before_anything_is_encoded(tiny, prepared, tmp_path):
    recipe = at(tiny, tmp_path / "other").model_copy(update={"seed": 5})
    prepare(with_data(recipe, remote=None), CPU, quiet=True)
    before = set(memory())
    named = rf"{tmp_path}/other: has other tokenizers than {ADDRESS} \(codec/model.safetensors"
    with pytest.raises(UserError, match=named):
        provide_data(recipe.data)
    with pytest.raises(UserError, match=named):
        prepare(recipe, CPU, quiet=True)
    # Those of another machine that was first, while these were made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moma.data.encode.prepare.fetch_prepared", lambda data: None)
        with pytest.raises(UserError, match=named):
            prepare(recipe, CPU, quiet=True)
    assert set(memory()) == before


def test_new_shards_do_not_disturb_those_that_read_the_old_ones(tiny, prepared, tmp_path, expected):
    reader = prepared_copy(tiny, tmp_path / "reader")
    vocabulary = Vocabulary.load(reader.data.path / "vocabulary.json")
    with closing(Batches(reader.data, vocabulary, 0)) as batches:
        before = set(memory())
        changed = with_data(prepared, held_out=0.5)
        prepare(changed, CPU, quiet=True)
        kept = {name for name in before if "/sources/" not in name}
        assert kept <= set(memory()) and len(set(memory())) > len(before)
        assert [next(batches).tokens_BS.tolist() for _ in range(5)] == expected
    # A run that begins trains on the new ones, which another folder gets.
    with pytest.raises(UserError, match=r"has other shards .* another data\.path"):
        provide_data(reader.data, refresh=True)
    assert batches_of(reader) == expected
    reader = with_data(reader, path=tmp_path / "new")
    provide_data(reader.data, refresh=True)
    assert batches_of(reader) == batches_of(changed) != expected


def test_a_folder_that_was_prepared_before_is_uploaded(tiny, tmp_path, expected):
    local = with_data(at(tiny, tmp_path / "local", tokenizers=tiny.data.path), remote=None)
    prepare(local, CPU, quiet=True)
    files = arrow_files(tmp_path / "local")
    with_remote = with_data(local, remote=ADDRESS)
    with pytest.raises(UserError, match="has no tokenizers yet; run `moma prepare`"):
        provide_data(with_remote.data)
    prepare(with_remote, CPU, quiet=True)
    assert arrow_files(tmp_path / "local") == files
    assert batches_of(prepared_copy(tiny, tmp_path / "reader")) == expected


def test_shards_are_published_only_if_everything_is_there(tiny, prepared, tmp_path):
    recipe = with_data(prepared, held_out=0.4)
    lost: list[str] = []

    def lose(self, folder, record):
        upload(self, folder, record)
        if not lost:
            (name,) = [
                name
                for name in memory()
                if "held_out" not in name
                and record.name in name
                and name.endswith(".arrow")
                and name not in before
            ]
            memory().pop(name)
            lost.append(name)

    upload, before = SourceUpload.upload, set(memory())
    manifests = {name: memory()[name].getvalue() for name in before if "/sources/" in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceUpload, "upload", lose)
        with pytest.raises(UserError, match=r"ram://bucket/corpus/shards/.*arrow: missing"):
            prepare(recipe, CPU, quiet=True)
    source = lost[0].split("/shards/")[1].split("/")[0]
    (name,) = [name for name in manifests if name.endswith(f"{source}.json")]
    assert memory()[name].getvalue() == manifests[name]
    prepare(recipe, CPU, quiet=True, verify=True)
    assert batches_of(recipe) == batches_of(prepared_copy(tiny, tmp_path / "reader"))


def test_a_damaged_object_is_refused_and_made_again(tiny, prepared, tmp_path, expected):
    for name in [name for name in memory() if name.endswith(".arrow")]:
        content = bytearray(memory()[name].getvalue())
        content[len(content) // 2] ^= 1
        fsspec.filesystem("ram").pipe_file(name, bytes(content))
    reader = prepared_copy(tiny, tmp_path / "reader")
    with pytest.raises(UserError, match=r"corpus/shards/.*arrow: damaged: .*--verify"):
        batches_of(reader)
    assert not arrow_files(tmp_path / "reader")
    assert not [*tmp_path.glob("reader/**/*.writing")]
    prepare(prepared, CPU, quiet=True, verify=True)
    assert batches_of(reader) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"folder": "/etc"}, "'folder': .*absolute"),
        ({"folder": "shards/../../x"}, "'folder': .*no relative name"),
        ({"folder": "shards\\x"}, "'folder': .*backslash"),
        ({"files": {"../../x": [1, "0" * 64]}}, "'files.*no relative name"),
        ({"files": {"sub/shard.json": [1, "0" * 64]}}, "'files': .*no file of shards"),
        ({"files": {"shard.json": [1, "0" * 63]}}, "'files.*64 hexadecimal"),
        ({"files": {"shard.json": [1, "../" + "0" * 61]}}, "'files.*64 hexadecimal"),
        ({"files": {}}, "'files': names no shard.json"),
        ({"kind": "other"}, "'kind'"),
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused(tiny, prepared, tmp_path, change, named):
    (name,) = [name for name in memory() if name.endswith("/sources/text.json")]
    manifest = json.loads(memory()[name].getvalue()) | change
    fsspec.filesystem("ram").pipe_file(name, json.dumps(manifest).encode())
    with pytest.raises(UserError, match=rf"ram://bucket/corpus/sources/text\.json: .*{named}"):
        prepared_copy(tiny, tmp_path / "reader")
    assert not (tmp_path / "reader/shards/text").exists()


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("../x.arrow", "'checksums.*no relative name"),
        ("plan.json", "names files of others"),
        ("sub/train-00000-00000.arrow", "names files of others"),
    ],
)
def test_records_that_lead_elsewhere_are_refused(tiny, prepared, tmp_path, file, named):
    name = min(name for name in memory() if "/part-" in name)
    record = json.loads(memory()[name].getvalue())
    record["checksums"] = {file: [1, "0" * 64]}
    fsspec.filesystem("ram").pipe_file(name, json.dumps(record).encode())
    for manifest in [name for name in memory() if "/sources/" in name]:
        memory().pop(manifest)
    recipe = at(tiny, tmp_path / "other", tokenizers=tiny.data.path)
    with pytest.raises(UserError, match=rf"corpus/shards/.*part-.*{named}"):
        prepare(recipe, CPU, quiet=True)


def test_the_cache_is_bounded_while_training_reads(tiny, prepared, tmp_path, expected):
    total = sum(len(memory()[name].getvalue()) for name in memory() if name.endswith(".arrow"))
    small = at(tiny, tmp_path / "reader", cache_bytes=total // 2)
    provide_data(small.data)
    assert batches_of(small) == expected
    files = [path.stat().st_size for path in tmp_path.glob("reader/cache/**/*.arrow")]
    assert 0 < sum(files) <= total // 2


def test_a_run_resumes_anywhere_with_the_shards_that_it_began_with(
    tiny, prepared, tmp_path, monkeypatch
):
    changes = {"steps": 2, "checkpoint_every": 1, "log_every": 1}
    recipe = at(tiny, tmp_path / "second").model_copy(
        update={"pretrain": tiny.pretrain.model_copy(update=changes), "run": tmp_path / "run"}
    )
    expected = train(recipe.model_copy(update={"run": tmp_path / "expected"}), WORLD, quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, 1)
        train(recipe, WORLD, quiet=True)
    prepare(with_data(prepared, held_out=0.5), CPU, quiet=True)
    moved = with_data(recipe, path=tmp_path / "third")
    assert_same_run(expected, train(moved, WORLD, quiet=True))
    require_training_data(expected, with_data(recipe, path=tmp_path / "fourth"))
    with pytest.raises(UserError, match=r"has other shards .* another data\.path"):
        require_training_data(expected, with_data(recipe, path=prepared.data.path))


def test_a_run_that_continues_another_has_the_shards_of_that_run(tiny, prepared, tmp_path):
    """Of new shards, it would hold out documents that the other was trained on."""
    few = {"steps": 2, "checkpoint_every": 2}
    stages = {
        name: getattr(tiny, like).model_copy(update=few)
        for name, like in (
            ("pretrain", "pretrain"),
            ("upcycle", "pretrain"),
            ("aux_router", "aux_router"),
        )
    }
    model = tiny.model.model_copy(update={"groups": "moe_1t1i"})
    recipe = at(tiny, tmp_path / "second").model_copy(update={**stages, "run": tmp_path / "run"})
    source = train(recipe.model_copy(update={"model": model}), WORLD, quiet=True)
    prepare(with_data(prepared, held_out=0.5), CPU, quiet=True)
    begun = with_data(recipe, path=tmp_path / "begun").model_copy(update={"from_": source.path})
    assert provide_training_data(Run(tmp_path / "new"), begun, WORLD) != trained_shards(source)
    newest = source
    for stage in ("upcycle", "aux_router"):
        changes = {"stage": stage, "from_": newest.path, "run": tmp_path / stage}
        fresh = with_data(recipe, path=tmp_path / f"data-{stage}").model_copy(update=changes)
        newest = train(fresh, WORLD, quiet=True)
        assert trained_shards(newest) == trained_shards(source)
        require_training_data(newest, fresh)
    # Of a version that began with the newest shards.
    values = json.loads(newest.manifest.read_text())
    values["shards"]["text"] |= {"folder": "shards/text/other"}
    newest.manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"router: was trained on other documents than \S+/upcyc"):
        require_training_data(newest, fresh)


def test_a_replay_reads_the_shards_of_the_run(tiny, prepared, tmp_path):
    recipe = exploding(at(tiny, tmp_path / "second"), tmp_path / "run")
    with pytest.raises(UserError, match="explodes"):
        train(recipe, WORLD, quiet=True)
    prepare(with_data(prepared, held_out=0.5), CPU, quiet=True)
    shutil.rmtree(recipe.data.path)
    assert replay(Run(recipe.run), WORLD, quiet=True)["same_batches"]


def test_data_prepared_while_a_run_starts_is_refused(tiny, prepared, tmp_path):
    run = Run(tmp_path / "run")
    shards = provide_training_data(run, prepared, WORLD)
    prepare(with_data(prepared, held_out=0.5), CPU, quiet=True)
    with pytest.raises(UserError, match=r"first: was prepared anew while the run started"):
        write_run_folder(run, prepared, shards)
    assert not run.path.exists()


def test_shards_of_a_run_that_lead_elsewhere_are_refused(tiny_run, tmp_path):
    values = json.loads(tiny_run.manifest.read_text()) | {"shards": {"text": {"folder": "/etc"}}}
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"run\.json: .*shards\.text\.folder.*absolute"):
        trained_shards(Run(tmp_path))
