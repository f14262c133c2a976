"""The ids that a grammar allows."""

from moma.generate.grammar import Grammar


def allowed_ids(grammar: Grammar) -> set[int]:
    """Return the ids that may come next, if the number of further tokens is not limited."""
    vocabulary, allowed = grammar.vocabulary, grammar.allowed()
    if allowed.codes:
        return set(vocabulary.image_codes)
    if allowed.forced is not None:
        return {allowed.forced}
    never = {vocabulary.beginning, vocabulary.padding, vocabulary.end_image}
    if not allowed.begin_image:
        never.add(vocabulary.begin_image)
    return set(range(vocabulary.size)) - never - set(vocabulary.image_codes)
