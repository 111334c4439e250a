"""What all tests share: one thread, no network, settings, a tiny tokenizer and a tiny model."""

import dataclasses
import os
import shutil
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # an unknown model name fails at once; before transformers

import pytest  # noqa: E402
import torch  # noqa: E402

import envs  # noqa: E402
import hiper  # noqa: E402
from support import cloning  # noqa: E402
from support.arguments import read_config  # noqa: E402

torch.set_num_threads(1)


def tiny_config(**changes):
    """The tiny agent's settings (configs/tiny.yaml) with these changes -> Config.

    Use it as `from conftest import tiny_config`.
    """
    return dataclasses.replace(read_config([]), **changes)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer that training from scratch makes of a few demonstrations. Do not change it."""
    with envs.EnvPool("household", "train", workers=1) as pool:
        examples = cloning.demonstrations(
            pool, range(6), tiny_config(), random_subgoals=0.5, action_noise=0.1
        )
    return cloning.train_tokenizer([text for *texts, _ in examples for text in texts])


@pytest.fixture
def tiny_actor(tiny_tokenizer):
    """A fresh random Qwen2, the same one every time."""
    torch.manual_seed(0)
    return cloning.tiny_model(tiny_tokenizer, hidden=32, layers=1).eval()


@pytest.fixture
def tiny_policy(tiny_actor):
    """The actor with a critic of its own, value heads not zero."""
    policy = hiper.ActorCritic(tiny_actor, "separate")
    torch.nn.init.normal_(policy.value_heads.weight, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A whole run of train.py: .home, .out (its folder), .said (what it printed). Do not change it:
    copy it."""
    from script_tools import flags, script

    home = tmp_path_factory.mktemp("trained")
    done = script("train.py", *flags("run"), cwd=home)
    assert done.code == 0, done.err
    return SimpleNamespace(home=home, out=home / "run", said=done.out + done.err)


@pytest.fixture
def stopped(trained, tmp_path):
    """A run of the same flags that was stopped after the cloning -> its folder."""
    out = tmp_path / "run"
    shutil.copytree(trained.out / "start", out / "start")
    shutil.copy(trained.out / "config.json", out)
    return out


@pytest.fixture
def on_the_cpu(monkeypatch):
    """float32 on the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A working directory with an unfinished run, a folder that is none, and configurations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    shutil.copy(trained.out / "config.json", tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years of work")
    (tmp_path / "typo.yaml").write_text("learning_rate: 1e-4\n")
    (tmp_path / "broken.yaml").write_text("lr: [1\n")
    (tmp_path / "number.yaml").write_text("5\n")
    return tmp_path
