import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

from tests import tiny


torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny.model(tokenizer)
