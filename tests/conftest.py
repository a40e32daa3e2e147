"""Settings of all tests."""

from collections.abc import Iterator

import pytest
import torch

# the models are tiny: a second thread would cost more than it gives, and the more where others use the cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the caches of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
