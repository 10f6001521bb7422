import pytest
import torch

import mingru


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["mingru"] = mingru
    doctest_namespace["torch"] = torch
