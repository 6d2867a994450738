"""One toy model and its data for all runs of the room."""

import pytest
import toy_run


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("toys"))
