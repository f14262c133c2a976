"""What is held out."""

from moma.data.documents import (
    Document,
    SourceConfig,
    held_out_share,
    is_held_out,
    which_held_out,
)


def test_a_source_s_own_share_goes_before_the_recipe_s():
    assert held_out_share(SourceConfig(held_out=0.3), 0.1) == 0.3
    assert held_out_share(SourceConfig(held_out=0), 0.1) == 0
    assert held_out_share(SourceConfig(), 0.1) == 0.1


def test_a_document_s_own_word_goes_before_any_share():
    assert is_held_out(Document("a", (), held_out=True), 0)
    assert not is_held_out(Document("a", (), held_out=False), 1)


def test_about_the_share_is_held_out_and_more_of_a_larger_share():
    documents = [Document(f"d{number}", ()) for number in range(4000)]
    small, large = ({d.name for d in documents if is_held_out(d, share)} for share in (0.1, 0.3))
    assert 0.08 < len(small) / 4000 < 0.12 and 0.27 < len(large) / 4000 < 0.33
    assert small < large


def test_documents_of_one_origin_are_held_out_together():
    for origin in map(str, range(100)):
        alone = is_held_out(Document(origin, ()), 0.5)
        pieces = [Document(f"{origin}#{n}", (), held_out_with=origin) for n in range(5)]
        assert {is_held_out(piece, 0.5) for piece in pieces} == {alone}


def test_many_documents_are_told_apart_as_one_is():
    told = [None, True, False]
    documents = [
        Document(f"dö{n}", (), held_out=told[n % 3], held_out_with="x" * (n % 5))
        for n in range(300)
    ]
    for share in (0.0, 0.3, 1.0):
        expected = [is_held_out(document, share) for document in documents]
        assert which_held_out(documents, share).tolist() == expected
    assert which_held_out([], 0.5).tolist() == []
