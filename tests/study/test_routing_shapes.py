"""Names and colors of experts in drawings of a routing."""

import numpy as np
import pytest

from moma.evaluate.token_routing import GroupRouting
from moma.study.routing_shapes import experts_of


def group(experts, *modalities):
    taken_LSE = np.ones((1, 1, experts), bool)
    return GroupRouting(modalities, taken_LSE, taken_LSE.astype(np.float32))


@pytest.mark.parametrize("count", [2, 8, 16])
def test_experts_that_share_a_modality_have_distinct_names_and_colors(count):
    groups = [group(count, "text", "image"), group(2, "text"), group(2, "image")]
    both, text, image = (experts_of(each, groups) for each in groups)
    for others in (text, image):
        names, colors = zip(*both, *others, strict=True)
        assert len(set(names)) == len(set(colors)) == count + 2
        assert all(len(color) == 7 and color.startswith("#") for color in colors)
