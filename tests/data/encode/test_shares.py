"""Machines that each encode a share of a job at an address: the same data as from one."""

import os
from collections import Counter
from itertools import product

import pytest

from moma.data.documents import SourcePart
from moma.data.encode import prepare as prepare_module
from moma.data.encode import shares
from moma.data.encode.prepare import prepare
from moma.data.encode.shares import Share
from moma.data.encode.upload import SourceUpload
from moma.data.provenance import DataFolder
from moma.data.sources.text import TextConfig
from moma.errors import UserError
from tests.command_line import refuses, succeeds
from tests.data.encode.preparing import make_recipe
from tests.data.remote.test_training import (
    CPU,
    arrow_files,
    at,
    batches_of,
    memory,
    prepared_copy,
    with_data,
)
from tests.factories import write_recipe


@pytest.fixture
def uploaded(monkeypatch):
    """How often each record was uploaded, by its folder and name; at an empty address."""
    memory().clear()
    upload, counts = SourceUpload.upload, Counter[tuple[str, str]]()

    def count(self, folder, record):
        upload(self, folder, record)
        counts[self._folder, record.name] += 1

    monkeypatch.setattr(SourceUpload, "upload", count)
    return counts


def machine(tiny, tmp_path, name):
    return at(tiny, tmp_path / name, tokenizers=tiny.data.path)


def prepare_share(recipe, text):
    return prepare(recipe, CPU, quiet=True, processes=1, share=Share.parse(text))


def test_the_last_of_three_machines_completes_the_data(tiny, tmp_path, uploaded):
    local = with_data(machine(tiny, tmp_path, "local"), remote=None)
    prepare(local, CPU, quiet=True)
    third, first = (machine(tiny, tmp_path, name) for name in ("third", "first"))
    seen = prepare_share(third, "3/3")
    assert (
        0
        < seen.summary()["documents"]
        == sum(info.whole.total.documents for info in seen.sources.values())
    )
    assert not [name for name in memory() if "/sources/" in name]
    # The second machine is lost, and another one takes its place.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SourceUpload, "upload", interrupt_at(2, SourceUpload.upload))
        prepare_share(machine(tiny, tmp_path, "lost"), "2/3")
    missing = prepare_share(first, "1/3").missing
    index_of = {source.name: index for index, source in enumerate(first.data.sources)}
    assert {(part + index_of[name]) % 3 for name in missing for part in missing[name]} == {1}
    done = prepare_share(machine(tiny, tmp_path, "second"), "2/3")
    assert not done.missing and done.summary() == prepare(local, CPU, quiet=True).summary()
    assert set(uploaded.values()) == {1}
    reader = prepared_copy(tiny, tmp_path / "reader")
    assert batches_of(reader) == batches_of(local)
    # A machine that finished sooner has the data too, when it is asked again.
    assert not prepare_share(third, "3/3").missing
    assert batches_of(third) == batches_of(local)
    assert set(uploaded.values()) == {1}


def interrupt_at(number, upload):
    calls: list[str] = []

    def upload_some(self, folder, record):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(record.name)
        upload(self, folder, record)

    return upload_some


def test_without_a_share_the_rest_is_made(tiny, tmp_path, uploaded):
    recipe = tmp_path / "recipe.toml"
    write_recipe(machine(tiny, tmp_path, "one"), recipe)
    # Exit code 0: a job that depends on a whole array of shares starts when all are complete.
    shown = succeeds("prepare", recipe, "--share", "2/2", "--processes", "1")
    assert "share 2/2 is complete; missing parts of other shares: 1/2 (" in " ".join(shown.split())
    assert not prepare(machine(tiny, tmp_path, "two"), CPU, quiet=True).missing
    assert set(uploaded.values()) == {1}
    assert arrow_files(tmp_path / "two/cache")


def test_other_machines_wait_for_the_tokenizers(tmp_path, uploaded, monkeypatch, capsys):
    recipe = make_recipe(tmp_path, 20, part_bytes=500, remote="ram://bucket/waiting")
    first, second = (with_data(recipe, path=tmp_path / name) for name in ("one", "two"))
    waited: list[float] = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            assert prepare_share(first, "1/2").missing

    monkeypatch.setattr(shares.time, "sleep", sleep)
    monkeypatch.setattr(shares, "SECONDS_BETWEEN_WARNINGS", 20)
    assert not prepare_share(second, "2/2").missing
    assert len(waited) == 3
    shown = capsys.readouterr().err
    assert shown.count("minutes); share 1/2 trains them: start it with this data.remote") == 2
    for name in ("tokenizer.json", "codec/model.safetensors", "provenance.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_tokenizers_that_the_folder_has_are_not_waited_for(tmp_path, uploaded, monkeypatch):
    recipe = make_recipe(tmp_path, 20, part_bytes=500)
    prepare(recipe, CPU, quiet=True, processes=1)

    def fail(seconds):
        pytest.fail("waits")

    monkeypatch.setattr(shares.time, "sleep", fail)
    prepare_share(with_data(recipe, remote="ram://bucket/own"), "2/2")
    assert [name for name in memory() if name.endswith("own/tokenizers.json")]


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_machine_with_other_keys_of_tokenizers_is_refused(tmp_path, uploaded, is_begun):
    recipe = make_recipe(tmp_path, 20, part_bytes=500, remote="ram://bucket/keys")
    prepare_share(with_data(recipe, path=tmp_path / "one"), "1/2")
    other = with_data(recipe, path=tmp_path / "two").model_copy(update={"seed": 7})
    if is_begun:  # by a process that was killed before it had made tokenizers
        other.data.path.mkdir()
        DataFolder(other.data)
    with pytest.raises(UserError, match="its tokenizers were made with another configuration"):
        prepare_share(other, "2/2")


def test_another_machine_s_rejected_rows_are_not_made_again(tiny, tmp_path, uploaded):
    recipe = make_recipe(tmp_path, 60, part_bytes=800, max_rejected=0.05)
    recipe = with_data(recipe, tokenizers=tiny.data.path, remote="ram://bucket/some")
    prepare_share(with_data(recipe, path=tmp_path / "one"), "2/2")
    # Of what exists now, more than this is rejected, but not of all.
    before = set(memory())
    later = with_data(recipe, path=tmp_path / "two", max_rejected=0.001)
    with pytest.raises(UserError, match="rejected"):
        prepare_share(later, "1/2")
    assert before <= set(memory())


def test_sources_with_other_modification_times_are_warned_of(tiny, tmp_path, uploaded, capsys):
    recipe = make_recipe(tmp_path, 8, part_bytes=2**18, max_rejected=0.2)
    recipe = with_data(recipe, tokenizers=tiny.data.path, remote="ram://bucket/times")
    one, two = (with_data(recipe, path=tmp_path / name) for name in ("one", "two"))
    assert prepare_share(one, "1/2").missing
    assert "other keys or files" not in capsys.readouterr().err
    os.utime(tmp_path / "images/captions.jsonl", ns=(10**18, 10**18))
    assert prepare_share(two, "2/2").missing
    # Before anything is encoded, and at the end.
    assert capsys.readouterr().err.count("parts made from other keys or files in shards/cap") == 2


def test_sources_that_are_not_cut_are_named(tiny, tmp_path, uploaded, monkeypatch, capsys):
    monkeypatch.setattr(TextConfig, "parts", lambda self, part_bytes: [SourcePart()])
    for number in (1, 2):
        recipe = machine(tiny, tmp_path, str(number))
        prepare(recipe, CPU, processes=1, share=Share(number, 2))
        shown = capsys.readouterr().err
        assert ("text: can only be read from the beginning" in shown) == (number == 2)
        assert "captions: can only" not in shown


@pytest.mark.parametrize(("processes", "is_named"), [(None, True), (2, True), (1, False)])
def test_a_source_that_is_not_cut_is_named_where_it_leaves_processes_without_work(
    tiny, tmp_path, monkeypatch, capsys, processes, is_named
):
    monkeypatch.setattr(TextConfig, "parts", lambda self, part_bytes: [SourcePart()])
    monkeypatch.setattr(prepare_module, "spare_cores", lambda: 1)
    local = with_data(machine(tiny, tmp_path, "local"), remote=None, image_share=0)
    (text,) = (source for source in local.data.sources if source.name == "text")
    prepare(with_data(local, sources=(text,)), CPU, processes=processes)
    assert ("text: can only be read from the beginning" in capsys.readouterr().err) == is_named


def test_every_part_belongs_to_one_share():
    for of, source, part in product((1, 2, 7), range(3), range(20)):
        assert sum(Share(number, of).has(source, part) for number in range(1, of + 1)) == 1
    assert Share.parse("1/3").has(0, 0) and Share.parse("2/3").has(1, 0)


def test_missing_parts_are_described_by_share():
    text = Share(1, 3).describe_missing(["a", "b"], {"a": [1, 2, 4], "b": [0]})
    assert "missing parts of other shares: 2/3 (3), 3/3 (1)" in text


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/2/3", "-1/2", "1/0", "1/9999999"])
def test_other_shares_are_refused(text):
    with pytest.raises(UserError, match=r"--share .*such as 3/16"):
        Share.parse(text)


def test_a_share_needs_an_address(trained):
    recipe = trained / "recipe.toml"
    assert "--share 1/2: needs data.remote" in refuses("prepare", recipe, "--share", "1/2")
    message = refuses("prepare", recipe, "--share", "1/2", "--ray", "auto")
    assert "--ray: no effect with --share" in message
