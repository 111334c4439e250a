"""Exercise 1. The batch size must be a multiple of a number, such as the number of GPUs.

So the batch is filled up by repeating some of its turns. Symptom: with 8 turns all is well. With 5
turns on 4 GPUs the log shows returns of 20 in an environment whose only reward is 10.
"""

import torch

from hae import gae


def advantages(rewards, values, trajectory, multiple):
    """A batch of M turns, M a multiple of `multiple`, and flat GAE's advantages (gamma, lambda 1).

    rewards, values: float [N], turns in order of time; trajectory: int [N], the trajectory of each
    turn. Returns (index int [M]: which turn each row of the batch is; advantages float [M]).
    """
    n = len(rewards)
    index = torch.arange(n + -n % multiple) % n  # [M] the first turns once more at the end
    rewards = rewards[index]
    values = values[index]
    trajectory = trajectory[index]
    adv = torch.zeros(len(index))  # [M]
    for b in trajectory.unique():
        rows = (trajectory == b).nonzero()[:, 0]
        rows = rows[index[rows].argsort(stable=True)]  # in order of time
        mask = torch.ones(1, len(rows)).bool()
        adv[rows] = gae(rewards[None, rows], mask, values[None, rows])[0][0]
    return index, adv


def test_filling_the_batch_changes_no_advantage():
    """A win that pays 10, in three turns, and one that pays 4, in two."""
    rewards = torch.tensor([0.0, 0.0, 10.0, 0.0, 4.0])
    trajectory = torch.tensor([0, 0, 0, 1, 1])
    for multiple in (1, 2, 3, 4, 8):
        index, adv = advantages(rewards, torch.zeros(5), trajectory, multiple)
        assert len(index) % multiple == 0
        assert set(index.tolist()) == set(range(5))
        message = f"filled to a multiple of {multiple}: {adv.tolist()}"
        assert adv.tolist() == [10.0 if turn < 3 else 4.0 for turn in index], message
