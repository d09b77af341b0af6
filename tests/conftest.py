"""What every test runs under: poisoned fresh memory, one seed, and repeatable random examples."""

import pytest
import torch
from hypothesis import settings

# Asserts in the helpers explain themselves only if pytest rewrites them too.
pytest.register_assert_rewrite("definition", "kernel_behaviour")

# Repeatable: a red run is red again on the next machine. `pytest --hypothesis-profile=explore` looks further.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("steady")


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
