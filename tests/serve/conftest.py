"""Models that the tests of the server share."""

import pytest

from tests.serve.models import make_mixed, make_never_ending


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    return make_mixed(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def never_ending(tmp_path_factory):
    return make_never_ending(tmp_path_factory.mktemp("long"))
