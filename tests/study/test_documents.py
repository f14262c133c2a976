"""Runs that were measured on other documents are named."""

from moma.study import documents
from moma.study.documents import documents_fingerprint, warn_of_other_documents


def test_other_documents_have_another_fingerprint(tiny):
    assert documents_fingerprint(tiny.data) == documents_fingerprint(tiny.data.model_copy())
    fewer = tiny.data.model_copy(update={"sources": tiny.data.sources[:1]})
    assert documents_fingerprint(tiny.data) != documents_fingerprint(fewer)


def test_runs_on_other_documents_than_the_baseline_are_named(monkeypatch):
    warned: list[tuple[str, str]] = []
    monkeypatch.setattr(documents.logger, "warning", lambda _, *arguments: warned.append(arguments))
    warn_of_other_documents({})
    warn_of_other_documents({"a-0": "1", "b-0": "1"})
    assert not warned
    warn_of_other_documents({"a-0": "1", "b-0": "1", "b-1": "2"})
    assert warned == [("b-1", "a-0")]
