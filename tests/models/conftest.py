import pytest


@pytest.fixture(autouse=True)
def _always_one_thread(_one_thread):
    """Use one thread, because the models are small."""
