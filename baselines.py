"""The baselines' advantages, as pure functions.

    ppo     turn-level GAE with V(s) read at the last prompt token (Schulman et al. 2017).
            One advantage for all tokens of a turn: what Turn-PPO does (arXiv:2512.17008).
    rloo    return minus the mean return of the group's other episodes (Ahmadian et al. 2024)
    grpo    return minus the group's mean, over its standard deviation (Shao et al. 2024)
    gigpo   grpo, plus the same once more among turns that met an equal state (Feng et al. 2025)
    hgpo    gigpo's second term, averaged over the numbers of earlier observations that the turns
            compared must share too (arXiv:2602.22817)
    gagpo   GAE with V(s) = mean return of the group's turns that met s (arXiv:2605.13217)
    beacon  grpo, plus rewards for the way to each milestone, compared with those of the group's
            turns on the same way (arXiv:2605.06078); needs info["progress"]

Each gives one advantage per turn, to all tokens of its response. A group is `group_size` episodes
of one drawn task. The group methods have no critic. All methods read the same `rollout.Batch`.

As in their papers, the group methods do not discount an episode's return; GiGPO discounts the
returns that it compares at equal states (0.95), and so do HGPO and GAGPO here.

Deviations: (1) standard deviations are sample ones (n - 1), a group of one has advantage 0;
(2) RLOO's and GAGPO's advantages are normalised over the batch as PPO's are; (3) the equations of
HGPO, GAGPO and BEACON follow summaries of their papers, and BEACON its released code; we chose
HGPO's depth and alpha, and a new best of the world's own progress is BEACON's milestone; (4) the
importance ratio is each token's, also for GAGPO.

B episodes, T turns, N turns in all, L response tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from config import SUCCESS_REWARD
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


def gigpo(episode_return, rewards, mask, group, state, *, gamma=0.95, weight=1.0, scale=True):
    """A_episode + weight * A_step; [B, T].  (GiGPO, section 4)

    episode_return: float [B]; rewards: float [B, T]; mask: bool [B, T]; group: int [B]; state: int
    [B, T], equal numbers for equal observations; so in the functions below. A_step compares the
    discounted return from a turn on with those of the group's other turns that met the same state.
    scale: divide by the standard deviation, in both terms.
    """
    episode = group_normalize(episode_return, group, scale)  # [B] A_E
    step = _normalize_turns(returns(rewards, mask, gamma), mask, group, state, scale)  # A_S
    return (episode[:, None] + weight * step) * mask


def _normalize_turns(x, mask, group, key, scale=True):
    """x [B, T] minus its mean over the group's turns with an equal `key` (int [B, T])."""
    alike = group[:, None] * (int(key.max()) + 1) + key
    values = group_normalize(x[mask], alike[mask], scale)
    return torch.zeros_like(x).masked_scatter(mask, values)


def gagpo(rewards, mask, group, state, *, gamma=0.95, lam=0.95):
    """sum_l (gamma lam)^l delta_{t+l} with V(s) = mean G_t at s; [B, T].  (GAGPO)"""
    return_to_go = returns(rewards, mask, gamma)  # G_t
    values = return_to_go - _normalize_turns(return_to_go, mask, group, state, scale=False)
    return gae(rewards, mask, values, gamma=gamma, lam=lam)[0]


def hgpo(rewards, mask, group, state, *, gamma=0.95, depth=2, alpha=1.0):
    """sum_k w_k (G_t - mean_k) / std_k, w_k ~ (k + 1)^alpha, k = 0 .. depth; [B, T].  (HGPO)

    mean_k and std_k are those of the group's turns with the same state and k observations before.
    """
    return_to_go = returns(rewards, mask, gamma)  # G_t
    weights = [(k + 1) ** alpha for k in range(depth + 1)]
    result = torch.zeros_like(rewards)
    key = state
    for k, weight in enumerate(weights):
        result += weight * _normalize_turns(return_to_go, mask, group, key)
        earlier = pad(state + 1, (k + 1, 0))[:, : state.shape[1]]  # 0: before the episode
        key = (key * (int(state.max()) + 2) + earlier).unique(return_inverse=True)[1]
    return result / sum(weights)


def beacon(episode_return, progress, mask, group, *, gamma=0.99):
    """A_episode + A_segment; [B, T].  (BEACON)

    progress: float [B, T] after each turn. A turn that raises it above all before is a milestone.
    The turns up to one earn SUCCESS_REWARD gamma^(turns left to it), those after the last one 0.
    A_segment compares the group's turns that have the same best progress behind them.
    """
    best = (progress * mask).cummax(1).values
    before = pad(best[:, :-1], (1, 0))
    reached = (best > before) & mask
    decay = gamma * (~reached).to(progress.dtype)  # a milestone cuts the segments
    earned = discounted_reverse_cumsum(SUCCESS_REWARD * reached, decay)
    step = _normalize_turns(earned, mask, group, before.unique(return_inverse=True)[1])
    return (grpo(episode_return, group)[:, None] + step) * mask


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
    if config.method in ("ppo", "rloo", "gagpo"):
        scaled = normalize(advantages, batch.mask)
    response = batch.samples.response_mask()  # [N, L]
    per_token = batch.to_turns(scaled)[:, None] * response
    return TokenAdvantages(per_token, response, targets, {"A": advantages})


def _group_advantages(batch, config) -> Tensor:
    """[B, T] of a group method."""
    total = returns(batch.rewards, batch.mask)[:, 0]  # [B] undiscounted, as in their papers
    turns = batch.rewards, batch.mask, batch.group, batch.state
    if config.method == "gigpo":
        return gigpo(total, *turns)
    if config.method == "hgpo":
        return hgpo(*turns)
    if config.method == "gagpo":
        return gagpo(*turns, lam=config.gae_lambda)
    if config.method == "beacon":
        return beacon(total, batch.progress, batch.mask, batch.group)
    estimator = {"rloo": rloo, "grpo": grpo}[config.method]
    return estimator(total, batch.group)[:, None] * batch.mask
