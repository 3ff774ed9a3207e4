"""One lab for all tests of a session: its server takes seconds to start and a trial a fraction of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from breaking import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab
