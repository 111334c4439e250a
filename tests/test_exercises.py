"""Each exercise fails as it stands, and passes with the right function in its place."""

import importlib.util
from pathlib import Path

import pytest
import torch

import hae
import hiper

EXERCISES = Path(__file__).parent.parent / "exercises"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXERCISES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill_last(rewards, values, trajectory, multiple):
    """Exercise 1: compute the advantages first, then fill the batch."""
    unfilled = 1  # every number is a multiple of 1, so the exercise's own function adds nothing
    _, adv = load("ex1_fill_the_batch").advantages(rewards, values, trajectory, unfilled)  # [N]
    index = torch.arange(len(adv) + -len(adv) % multiple) % len(adv)  # [M]
    return index, adv[index]


def bootstrap_where_truncated(rewards, mask, values, truncated, end_value):
    """Exercise 3: the end value counts where the episode was truncated, at its last turn."""
    adv, _ = hae.gae(rewards, mask, values, gamma=0.9, lam=0.8, end_value=end_value * truncated)
    return adv


def global_token_mean(losses, trained, size):
    """Exercise 4: divide by the trained tokens of the whole batch."""
    total = 0.0
    for loss, where in zip(losses.split(size), trained.split(size), strict=True):
        total = total + (loss * where).sum()
    return total / trained.sum()


# exercise -> (its wrong function, a right one)
SOLUTIONS = {
    "ex1_fill_the_batch": ("advantages", fill_last),
    "ex2_masks_from_text": ("decision_masks", hiper.decision_masks),
    "ex3_out_of_time": ("gae", bootstrap_where_truncated),
    "ex4_micro_batches": ("batch_loss", global_token_mean),
    "ex5_kl": ("kl_k3", hiper.kl_k3),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_exercise(name):
    exercise = load(name)
    mistake, right = SOLUTIONS[name]
    (test,) = [getattr(exercise, word) for word in dir(exercise) if word.startswith("test_")]
    with pytest.raises(AssertionError):
        test()
    setattr(exercise, mistake, right)
    test()


def test_every_exercise_is_here_and_in_its_readme():
    assert {path.stem for path in EXERCISES.glob("*.py")} == set(SOLUTIONS)
    readme = (EXERCISES / "README.md").read_text()
    assert all(f"`{name}.py`" in readme for name in SOLUTIONS)
