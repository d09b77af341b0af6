"""What every test runs under: poisoned fresh memory, one seed, and repeatable random examples."""

import os
from collections import Counter

# Before numpy comes: its matrix product on several threads takes 3 times as long where they share cores with torch's,
# and Triton's interpreter computes with it.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

if torch.cuda.is_available():
    # Before CUDA starts: without it cuBLAS is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Before anybody imports triton: its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Asserts in the helpers explain themselves only if pytest rewrites them too.
pytest.register_assert_rewrite("definition", "kernel_behaviour")

# Repeatable: a red run is red again on the next machine. `pytest --hypothesis-profile=explore` looks further.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("steady")


def pytest_collection_modifyitems(items):
    """Of a test class with `one_in = n`, one in n cases of each test is fast, the others are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        one_in = getattr(getattr(item, "cls", None), "one_in", 1)
        test = item.nodeid.split("[")[0]
        # Parameters often vary fastest with a small period: a prime number of cases apart they all come round.
        if seen[test] % one_in:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so that whoever reads what nobody wrote shows it; and every test has the same seed."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
