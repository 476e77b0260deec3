"""What every test stands on: where real data may lie, one thread per worker, poisoned memory."""

import os
from pathlib import Path

# Before Triton is imported anywhere: without a GPU its kernels run interpreted.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden outputs beside the checkout (or DASS_SHARED); skips where it is absent."""
    folder = Path(os.environ.get("DASS_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: real data and golden outputs are not part of the repository")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison():
    """torch.empty, also in C++, returns NaN: an output that nobody wrote cannot pass by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
