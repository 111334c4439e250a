"""The exercises are broken as they stand, and whole with the right function in its place."""

import importlib.util
from pathlib import Path

import pytest
import torch

import hae
import hiper

EXERCISES = Path(__file__).parent.parent / "exercises"


def fill_last(rewards, values, trajectory, multiple):
    """Exercise 1: advantages first (which a multiple of 1 leaves as they are), the batch is filled after."""
    adv = load("ex1_fill_the_batch").advantages(rewards, values, trajectory, 1)[1]  # [N]
    index = torch.arange(len(adv) + -len(adv) % multiple) % len(adv)  # [M]
    return index, adv[index]


SOLUTIONS = {
    "ex1_fill_the_batch": ("advantages", fill_last),
    "ex2_masks_from_text": ("decision_masks", hiper.decision_masks),
    "ex3_out_of_time": (
        "gae",
        lambda rewards, mask, values, truncated, end_value: hae.gae(
            rewards, mask, values, gamma=0.9, lam=0.8, end_value=end_value * truncated
        )[0],
    ),
    "ex4_micro_batches": (
        "batch_loss",
        lambda losses, trained, size: (
            sum(
                (loss * where).sum() for loss, where in zip(losses.split(size), trained.split(size))
            )
            / trained.sum()
        ),
    ),
    "ex5_kl": ("kl_k3", hiper.kl_k3),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXERCISES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SOLUTIONS)
def test_exercise(name):
    exercise, (mistake, right) = load(name), SOLUTIONS[name]
    (test,) = [getattr(exercise, word) for word in dir(exercise) if word.startswith("test_")]
    with pytest.raises(AssertionError):
        test()
    setattr(exercise, mistake, right)
    test()


def test_every_exercise_is_here_and_in_its_readme():
    assert {path.stem for path in EXERCISES.glob("*.py")} == set(SOLUTIONS)
    assert all(f"`{name}.py`" in (EXERCISES / "README.md").read_text() for name in SOLUTIONS)
