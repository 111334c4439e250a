"""The baselines' advantages, as pure functions: PPO, RLOO, GRPO, GiGPO.

    ppo     turn-level GAE with V(s) read at the last prompt token (Schulman et al. 2017).
            One advantage for all tokens of a turn: what Turn-PPO does (arXiv:2512.17008).
    rloo    return minus the mean return of the group's other episodes (Ahmadian et al. 2024)
    grpo    return minus the group's mean, over its standard deviation (Shao et al. 2024)
    gigpo   grpo, plus the same once more among turns that met an equal state (Feng et al. 2025)

Each gives one advantage per turn, to all tokens of its response. A group is `group_size` episodes
of one drawn task. The group methods have no critic. All methods read the same `rollout.Batch`.

As in their papers, the group methods do not discount an episode's return; GiGPO discounts the
returns that it compares at equal states (0.95).

Deviations: (1) standard deviations are sample ones (n - 1), a group of one has advantage 0;
(2) RLOO's advantages are normalised over the batch as PPO's are.

B episodes, T turns, N turns in all, L response tokens.
"""

import torch
from torch import Tensor

from hae import discounted_reverse_cumsum, gae
from hiper import TokenAdvantages


def group_normalize(x: Tensor, group: Tensor, scale: bool = True) -> Tensor:
    """x [M] minus the mean of its group (int [M]); divided by its standard deviation if `scale`."""
    index = group.unique(return_inverse=True)[1]  # [M] 0 .. K - 1
    wide = x.double()  # equal entries must give exactly 0
    size = _group_sum(torch.ones_like(wide), index)
    centred = wide - _group_sum(wide, index) / size
    if scale:
        variance = _group_sum(centred.square(), index) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-6)
    return centred.to(x.dtype)


def _group_sum(x: Tensor, index: Tensor) -> Tensor:
    """Each entry's group total, [M]."""
    totals = torch.zeros(int(index.max()) + 1, dtype=x.dtype).index_add(0, index, x)
    return totals[index]


def returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """R_t = sum_l gamma^l r_{t+l}; [B, T]."""
    return discounted_reverse_cumsum(rewards * mask, torch.full_like(rewards, gamma)) * mask


def rloo(episode_return: Tensor, group: Tensor) -> Tensor:
    """R_i - mean_{j != i} R_j within a group; both [B].  (RLOO, section 2)"""
    size = (group[:, None] == group).sum(1)  # [B]
    return group_normalize(episode_return, group, scale=False) * size / (size - 1).clamp(min=1)


def grpo(episode_return: Tensor, group: Tensor) -> Tensor:
    """(R_i - mean) / std within a group; both [B].  (DeepSeekMath, section 4.1)"""
    return group_normalize(episode_return, group)


def gigpo(
    episode_return: Tensor,
    rewards: Tensor,
    mask: Tensor,
    group: Tensor,
    state: Tensor,
    *,
    gamma: float = 0.95,
    weight: float = 1.0,
    scale: bool = True,
) -> Tensor:
    """A_episode + weight * A_step; [B, T].  (GiGPO, section 4)

    state: int [B, T], equal numbers for equal observations. A_step compares the discounted return
    from a turn on with those of the group's other turns that met the same state. scale: divide
    by the standard deviation, in both terms.
    """
    episode = group_normalize(episode_return, group, scale)  # [B] A_E
    anchor = (group[:, None] * (int(state.max()) + 1) + state)[mask]  # [N] state within the group
    return_to_go = returns(rewards, mask, gamma)[mask]  # [N] R_t
    step = group_normalize(return_to_go, anchor, scale)  # [N] A_S
    step = torch.zeros_like(rewards).masked_scatter(mask, step)  # [B, T]
    return (episode[:, None] + weight * step) * mask


def baseline_advantages(batch, old, config, normalize, *, end_values=None) -> TokenAdvantages:
    """The advantages of `config.method`; arguments as in `hiper.hiper_advantages`."""
    targets = {}
    if config.method == "ppo":
        end_value = None
        if end_values is not None:
            end_value = end_values.v_high * batch.truncated
        advantages, ret = gae(
            batch.rewards,
            batch.mask,
            batch.to_grid(old.v_high),
            gamma=config.gamma,
            lam=config.gae_lambda,
            end_value=end_value,
        )
        targets["high"] = batch.to_turns(ret), batch.to_turns(batch.mask)
    else:
        advantages = _group_advantages(batch, config)
    scaled = advantages
    if config.method in ("ppo", "rloo"):
        scaled = normalize(advantages, batch.mask)
    response = batch.samples.response_mask()  # [N, L]
    per_token = batch.to_turns(scaled)[:, None] * response
    return TokenAdvantages(per_token, response, targets, {"A": advantages})


def _group_advantages(batch, config) -> Tensor:
    """[B, T] of a group method."""
    total = returns(batch.rewards, batch.mask)[:, 0]  # [B] undiscounted, as in their papers
    if config.method == "gigpo":
        return gigpo(total, batch.rewards, batch.mask, batch.group, batch.state)
    estimator = {"rloo": rloo, "grpo": grpo}[config.method]
    return estimator(total, batch.group)[:, None] * batch.mask
