import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Use one thread, because the models are small and threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
