"""What all tests share: one thread, no network, and a tokenizer and a model that are ready in no time."""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # an unknown model name fails at once; before transformers is imported
)

import pytest
import torch

import envs
import hiper
from support import cloning as scratch
from rollout import Style

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer that training from scratch makes: some demonstrations' words, any other text in bytes. Not to be changed."""
    with envs.Runner("household", "train", 1) as runner:
        shown = scratch.demonstrations(
            runner, range(6), plan_noise=0.5, slips=0.1, style=Style(brief=True), seed=0
        )
    return scratch.train_tokenizer([text for *texts, _ in shown for text in texts])


@pytest.fixture
def tiny_actor(tiny_tokenizer):
    """A fresh random Qwen2, the same one every time."""
    torch.manual_seed(0)
    return scratch.tiny_model(tiny_tokenizer, hidden=32, layers=1).eval()


@pytest.fixture
def tiny_policy(tiny_actor):
    """The actor with a critic of its own, value heads not zero."""
    policy = hiper.ActorCritic(tiny_actor, "separate")
    torch.nn.init.normal_(policy.heads.weight, generator=torch.Generator().manual_seed(1))
    return policy
