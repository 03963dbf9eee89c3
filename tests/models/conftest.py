"""An index of two thousand items, built once for the tests of search, lists and calibration."""

import pytest
from small_indexes import build_index, clustered

from vlm4rec_spark.models.index.searcher import Searcher


@pytest.fixture(scope="session")
def searcher(tmp_path_factory) -> Searcher:
    return build_index(tmp_path_factory.mktemp("scann") / "v1", clustered(2_000, seed=1))
