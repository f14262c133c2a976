"""Definitions of the dictionary and its source."""

import pytest

from moma.demo.dictionary import DictionaryConfig, clean, definitions, package_folder
from moma.errors import UserError


def test_notes_are_removed():
    assert clean("A  wretch. [Obs.]  Also{1} a knave. 1913 Webster]") == "A wretch. Also a knave."


def test_definitions_exclude_the_etymology():
    nouns = definitions("apple", "n.")
    assert nouns[0].startswith("The fleshy pome or fruit")
    assert set(nouns) < set(definitions("apple"))
    assert not any("Icel." in text for text in definitions("apple"))
    assert definitions("no such word") == ()


def test_a_smaller_sample_is_the_start_of_a_larger_one():
    small, large = (list(DictionaryConfig(entries=count).documents()) for count in (100, 300))
    assert len(small) == 100
    assert small == large[:100]
    assert len({document.name[0] for document in large}) > 15
    assert all(
        str(document.segments[0]).startswith(f"{document.name}: ") and len(document.segments) == 1
        for document in large
    )


def test_the_message_for_a_missing_package_explains_how_to_install_it():
    with pytest.raises(UserError, match=r"'no-such-dist' is missing.*pip install 'moma\[demo\]'"):
        package_folder("no_such_module", "no-such-dist")
