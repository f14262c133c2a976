"""The ids that a grammar allows."""

from moma.generate.grammar import Grammar


def allowed_ids(grammar: Grammar) -> set[int]:
    """Return the ids that may come next, if the number of further tokens is not limited."""
    vocabulary, legal = grammar.vocabulary, grammar.legal()
    if legal.codes:
        return set(vocabulary.image_codes)
    if legal.forced is not None:
        return {legal.forced}
    never = {vocabulary.beginning, vocabulary.padding, vocabulary.end_image}
    if not legal.begin_image:
        never.add(vocabulary.begin_image)
    return set(range(vocabulary.size)) - never - set(vocabulary.image_codes)
