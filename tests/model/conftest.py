"""What the tests of `dass` share: the folder of data and golden files, which lies outside the repository."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared():
    """shared("golden", "weights.py") is that path in ../shared beside the checkout, or in DASS_SHARED; else skips."""
    folder = Path(os.environ.get("DASS_SHARED") or CHECKOUT.parent / "shared")

    def find(*parts: str) -> Path:
        path = folder.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"needs {path}, which is not in the repository (another place: DASS_SHARED)")
        return path

    return find
