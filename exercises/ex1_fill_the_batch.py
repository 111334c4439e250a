"""Exercise 1. The batch must be a multiple of something (of the number of GPUs, say), so it is filled up with turns it already has.

Symptom: with 8 turns all is well. With 5 turns on 4 GPUs the log shows returns of 20 in an environment whose only reward is 10.
"""

import torch

from hae import gae


def advantages(rewards, values, trajectory, multiple):
    """Turns -> a batch of M of them, M a multiple of `multiple`, and their advantages (flat GAE; gamma and lambda 1).

    rewards, values: float [N], turns in order of time; trajectory: int [N], whose turn it is.
    -> (index int [M]: which turn each row of the batch is; advantages float [M]).
    """
    n = len(rewards)
    index = torch.arange(n + -n % multiple) % n  # [M] the first turns once more at the end
    rewards, values, trajectory = rewards[index], values[index], trajectory[index]
    adv = torch.zeros(len(index))  # [M]
    for b in trajectory.unique():
        rows = (trajectory == b).nonzero()[:, 0]
        rows = rows[index[rows].argsort(stable=True)]  # in order of time
        adv[rows] = gae(rewards[None, rows], torch.ones(1, len(rows)).bool(), values[None, rows])[
            0
        ][0]
    return index, adv


def test_filling_the_batch_changes_no_advantage():
    rewards, trajectory = (
        torch.tensor([0.0, 0.0, 10.0, 0.0, 10.0]),
        torch.tensor([0, 0, 0, 1, 1]),
    )  # two wins, 3 and 2 turns
    for multiple in (1, 2, 3, 4, 8):
        index, adv = advantages(rewards, torch.zeros(5), trajectory, multiple)
        assert len(index) % multiple == 0 and set(index.tolist()) == set(range(5))
        assert adv.tolist() == [10.0] * len(index), (
            f"filled to a multiple of {multiple}: {adv.tolist()}"
        )
