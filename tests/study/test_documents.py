"""Runs that were measured on other documents are named."""

from moma.study.compare import compare
from moma.study.documents import documents_fingerprint, warn_of_other_documents
from moma.train.loop import train
from tests.train.test_loop import WORLD


def test_other_documents_have_another_fingerprint(tiny):
    assert documents_fingerprint(tiny.data) == documents_fingerprint(tiny.data.model_copy())
    fewer = tiny.data.model_copy(update={"sources": tiny.data.sources[:1]})
    assert documents_fingerprint(tiny.data) != documents_fingerprint(fewer)


def test_runs_on_other_documents_than_the_baseline_are_named(capsys):
    assert not warn_of_other_documents({})
    assert not warn_of_other_documents({"a-0": "1", "b-0": "1"})
    assert not capsys.readouterr().err
    warning = warn_of_other_documents({"a-0": "1", "b-0": "1", "b-1": "2"})
    assert warning.startswith("b-1: measured on other documents than a-0, as the data differ")
    assert warning in capsys.readouterr().err


def test_a_comparison_states_that_runs_have_other_documents(tiny, tiny_run, tmp_path, undrawn):
    data = tiny.data.model_copy(update={"sources": tiny.data.sources[1:], "image_share": 0.0})
    model = tiny.model.model_copy(update={"groups": "dense"})
    stage = tiny.pretrain.model_copy(update={"steps": 2})
    changes = {"data": data, "model": model, "pretrain": stage, "run": tmp_path / "text"}
    run = train(tiny.model_copy(update=changes), WORLD, quiet=True)
    page = tmp_path / "report.html"
    warning = compare([tiny_run, run], page, quiet=True)["warning"]
    assert warning.startswith(f"text: measured on other documents than {tiny_run.path.name},")
    assert f"<p>{warning}.</p>" in page.read_text()
