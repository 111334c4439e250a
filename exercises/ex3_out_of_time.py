"""Exercise 3. Flat GAE. Some episodes are over because the task is done, some because the step limit was reached.

Symptom: values fall toward the step limit though the state does not know the time, and late actions are blamed for it.
"""

import torch


def gae(rewards, mask, values, truncated, end_value, gamma=0.9, lam=0.8):
    """Advantages float [B, T]. rewards, values: float [B, T]; mask: bool [B, T], a prefix of each row; truncated: bool [B];
    end_value: float [B], the critic's value of the state after the last turn (of use only where the episode was truncated)."""
    B, T = rewards.shape
    done = mask & ~torch.cat([mask[:, 1:], torch.zeros(B, 1).bool()], 1)  # [B, T] the last turn
    v_next = torch.cat([values[:, 1:], end_value[:, None]], 1) * ~done  # [B, T]
    delta = (rewards + gamma * v_next - values) * mask  # [B, T]
    adv, carry = torch.zeros(B, T), torch.zeros(B)
    for t in reversed(range(T)):
        carry = delta[:, t] + gamma * lam * carry
        adv[:, t] = carry
    return adv


def test_out_of_time_is_not_the_end():
    """An agent that just waits, in a world that pays 1 a turn for ever: V = 1 / (1 - gamma) = 10 everywhere, so nothing surprises."""
    rewards, values, end = torch.ones(2, 4), torch.full((2, 4), 10.0), torch.full((2,), 10.0)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    adv = gae(rewards, mask, values, torch.tensor([True, True]), end)
    torch.testing.assert_close(
        adv, torch.zeros(2, 4), atol=1e-5, rtol=0, msg=lambda m: f"truncated: {adv.tolist()}"
    )
    adv = gae(
        rewards, mask, values, torch.tensor([False, False]), end
    )  # but a world that ends is a surprise
    torch.testing.assert_close(
        adv[[0, 1], [3, 1]], torch.full((2,), -9.0), msg=lambda m: f"terminated: {adv.tolist()}"
    )
