"""What every test may count on: the slow lane's gate, and where real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples everywhere, and no deadline: machines are shared.
settings.register_profile("wsitk", deadline=None, derandomize=True)
settings.load_profile("wsitk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave tests marked `slow` to those who ask for them."""
    if os.environ.get("WSITK_TEST_SLOW") == "1":
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; set WSITK_TEST_SLOW=1"))


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder with the real data (`data/`) and the golden vectors (`golden/`)."""
    folder = os.environ.get("WSITK_TEST_DATA")
    if not folder:
        pytest.skip("needs real data; set WSITK_TEST_DATA to the folder that holds data/ and golden/")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"WSITK_TEST_DATA names {folder}, which is no folder")
    return path
