"""Exercise 3. Flat GAE. Some episodes end because the task is done, some at the step limit.

Symptom: values fall toward the step limit though the state does not contain the time, and late
actions get negative advantages.
"""

import torch


def gae(rewards, mask, values, truncated, end_value, gamma=0.9, lam=0.8):
    """Advantages, float [B, T].

    rewards, values: float [B, T]; mask: bool [B, T], a prefix of each row; truncated: bool [B], the
    episode ended at the step limit; end_value: float [B], the critic's value of the state after the
    last turn, which counts only where the episode was truncated.
    """
    B, T = rewards.shape
    done = mask & ~torch.cat([mask[:, 1:], torch.zeros(B, 1).bool()], 1)  # [B, T] the last turn
    v_next = torch.cat([values[:, 1:], end_value[:, None]], 1) * ~done  # [B, T]
    delta = (rewards + gamma * v_next - values) * mask  # [B, T]
    adv = torch.zeros(B, T)
    carry = torch.zeros(B)
    for t in reversed(range(T)):
        carry = delta[:, t] + gamma * lam * carry
        adv[:, t] = carry
    return adv


def test_out_of_time_is_not_the_end():
    """An agent that waits, in a world that pays 1 a turn for ever: V = 1 / (1 - gamma) = 10.

    If the episode is truncated, every advantage is 0. If it terminates, the last turn loses the
    value of the future: 1 - 10 = -9.
    """
    rewards = torch.ones(2, 4)
    end_value = torch.full((2,), 10.0)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    values = torch.where(mask, 10.0, 0.0)  # 0 is padding, not the value of a state
    adv = gae(rewards, mask, values, torch.tensor([True, True]), end_value)
    assert adv.abs().max() <= 1e-5, f"truncated: {adv.tolist()}"
    adv = gae(rewards, mask, values, torch.tensor([False, False]), end_value)
    last = adv[[0, 1], [3, 1]]
    message = f"terminated: {adv.tolist()}"
    torch.testing.assert_close(last, torch.full((2,), -9.0), msg=message)
