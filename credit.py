"""Credit: from rewards and old values to an advantage for every token, by one method or another, on the same rollouts.

    hiper   an advantage per decision (hae.py), on that decision's tokens                     HiPER, Theorem 4.1
    ppo     turn-level GAE that runs across turns, V(s) read at the last prompt token         Schulman et al. 2017
    rloo    return less the mean return of the task's other episodes                          Ahmadian et al. 2024
    grpo    return less the mean of the task's episodes, over their standard deviation        Shao et al. 2024
    gigpo   that, and the same once more among the turns that met an equal state              Feng et al. 2025

All but hiper give one advantage per turn, to all tokens of its response, whatever its prompt asked for. The group methods need
no critic. What each takes from `Batch` is the same, so that methods differ by their credit and by nothing else.

Deviations: (1) returns are discounted by `gamma` for every method (the papers: 1), so that all pursue the same objective;
(2) standard deviations are sample ones (n - 1), and a group of one has advantage 0; (3) RLOO's advantages are scaled to unit
variance over the batch as PPO's are, which Adam hardly notices and the KL weight does; (4) HiPER's three are scaled together (`scale`).

B episodes, T turns, N turns in all, L response tokens.
"""

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from hae import gae, hae, reverse_scan, switch_gain
from hiper import Masks, token_advantages

GROUPED = ("rloo", "grpo", "gigpo")
METHODS = ("hiper", "ppo", *GROUPED)
DECISIONS = ("switch", "subgoal", "action")


class Credit(NamedTuple):
    adv: Tensor  # [N, L] each token's advantage
    trained: Tensor  # bool [N, L] the tokens that have one
    targets: dict  # head ("high", "low", "switch") -> (target [N], bool [N] where it has one)
    shown: dict  # name -> [B, T], before normalisation: for people to read


# ---- the group methods' estimators --------------------------------------------------------------------------------------


def relative(x: Tensor, key: Tensor, scale: bool = True) -> Tensor:
    """x [M] less the mean of the entries with the same key (int [M]), over their standard deviation where `scale`."""
    k = key.unique(return_inverse=True)[1]  # [M] 0 .. K - 1
    sums = lambda y: torch.zeros(int(k.max()) + 1, dtype=torch.float64).index_add(0, k, y)[k]  # [M]
    x64 = x.double()  # equal entries must come out as 0, not as rounding
    n = sums(torch.ones_like(x64))
    centred = x64 - sums(x64) / n
    std = (sums(centred.square()) / (n - 1).clamp(min=1)).sqrt()
    return (centred / (std + 1e-6) if scale else centred).to(x.dtype)


def returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """R_t = sum_l gamma^l r_{t+l}; [B, T]."""
    return reverse_scan(rewards * mask, torch.full_like(rewards, gamma)) * mask


def rloo(episode_return: Tensor, group: Tensor) -> Tensor:
    """R_i - mean_{j != i} R_j within a group; both [B].                                         (RLOO, section 2)"""
    n = (group[:, None] == group).sum(1)  # [B]
    return relative(episode_return, group, scale=False) * n / (n - 1).clamp(min=1)


def grpo(episode_return: Tensor, group: Tensor) -> Tensor:
    """(R_i - mean) / std within a group; both [B].                                       (DeepSeekMath, section 4.1)"""
    return relative(episode_return, group)


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
    """A_episode + weight A_step; [B, T].                                                        (GiGPO, section 4)

    state: int [B, T], equal numbers for equal observations. A_step compares the discounted return from a turn on with those
    from the other turns of the group that met the same state. scale: over the standard deviation, in both (GiGPO with
    std), or not (without).
    """
    episode = relative(episode_return, group, scale)  # [B] A_E
    pair = (group[:, None] * (int(state.max()) + 1) + state)[
        mask
    ]  # [N] anchor states, within the group
    ahead = returns(rewards, mask, gamma)[mask]  # [N] R_t
    step = torch.zeros_like(rewards).masked_scatter(
        mask, relative(ahead, pair, scale)
    )  # [B, T] A_S
    return (episode[:, None] + weight * step) * mask


# ---- from a batch to tokens ---------------------------------------------------------------------------------------------


def assign(
    batch, old, config, whiten: Callable, ends=None, v_keep: Optional[Tensor] = None
) -> Credit:
    """The credit of one iteration by `config.method`.

    old, ends: Scores of batch.samples and batch.ends (values only where the method has a critic). whiten(adv, where, scale):
    `normalize` over all processes. v_keep [N]: V_low(s_t, o_{t-1}), where `needs_keep(config)`.
    """
    return (
        hierarchical(batch, old, ends, config, whiten, v_keep)
        if config.method == "hiper"
        else flat(batch, old, ends, config, whiten)
    )


def needs_keep(config) -> bool:
    """Whether the counterfactual value of carrying on, V_low(s_t, o_{t-1}), is asked for."""
    return config.method == "hiper" and (config.switch_advantage == "gain" or config.heads == 2)


def hierarchical(batch, old, ends, config, whiten, v_keep=None) -> Credit:
    """HiPER: three advantages, each on its own tokens."""
    opened, decides = batch.switch & batch.mask, batch.mask.clone()
    decides[:, 0] = False  # at turn 0 there is no switch to decide on,
    decides &= config.segments == "learned"  # nor where segments are imposed
    high, low, third = (batch.grid(v) for v in (old.v_high, old.v_low, old.v_switch))  # [B, T]
    if v_keep is not None:
        said = (
            (old.logp * batch.samples.masks.switch).sum(1).exp()
        )  # [N] probability of the word that was written
        keep, beta = (
            batch.grid(v_keep),
            batch.grid(torch.where(batch.flat(batch.switch), said, 1 - said)),
        )
        if config.heads == 2:
            third = beta * high + (1 - beta) * keep  # V_switch by its definition, without a head
    truncated = batch.truncated & config.bootstrap
    inputs = dict(
        rewards=batch.rewards,
        switch=batch.switch,
        mask=batch.mask,
        v_high=high,
        v_low=low,
        v_switch=third * batch.mask,
        gamma=config.gamma,
        end_high=ends.v_high * truncated,
        end_low=ends.v_low * truncated,
    )
    raw = hae(**inputs, lam_low=config.lam_low, lam_high=config.lam_high)
    target = (
        hae(**inputs, lam_low=0.0, lam_high=0.0) if config.targets == "td0" else raw
    )  # the paper's, the release's
    if config.switch_advantage == "gain":
        raw = raw._replace(adv_switch=switch_gain(batch.switch, beta, high, keep) * decides)
    learns = [name in config.decisions.split(",") for name in DECISIONS]
    masks = Masks(*(m & on for m, on in zip(batch.samples.masks, learns)))
    wheres = [where & on for where, on in zip((decides, opened, batch.mask), learns)]
    scaled = scale((raw.adv_switch, raw.adv_subgoal, raw.adv_action), wheres, whiten, config.whiten)
    adv, trained = token_advantages(masks, batch.flat(opened), *map(batch.flat, scaled))  # [N, L]
    trained &= ~masks.switch | batch.flat(decides)[:, None]
    everywhere = batch.flat(batch.mask)  # [N] all True
    targets = {
        "high": (batch.flat(target.ret_high), batch.flat(opened)),
        "low": (batch.flat(target.ret_low), everywhere),
    }
    if config.heads == 3:
        targets["switch"] = batch.flat(target.ret_switch), everywhere
    return Credit(
        adv,
        trained,
        targets,
        {"A_subgoal": raw.adv_subgoal, "A_action": raw.adv_action, "A_switch": raw.adv_switch},
    )


def scale(advantages, wheres, whiten, how):
    """Advantages [B, T] of several decisions, centred each, at unit variance all together or `each` (the paper).

    Together they keep the proportions that the policy gradient has (Thm 4.1). Each at unit variance, a decision at which nothing is to
    be learnt any more is as loud as one at which everything is.
    """
    if how == "each":
        return [whiten(adv, where) for adv, where in zip(advantages, wheres)]
    centred = [whiten(adv, where, scale=False) for adv, where in zip(advantages, wheres)]
    return whiten(torch.cat(centred, 1), torch.cat(wheres, 1)).split(centred[0].shape[1], 1)


def flat(batch, old, ends, config, whiten) -> Credit:
    """The baselines: one advantage per turn, on all tokens of its response."""
    targets = {}
    if config.method == "ppo":
        raw, ret = gae(
            batch.rewards,
            batch.mask,
            batch.grid(old.v_high),
            gamma=config.gamma,
            lam=config.lam,
            end_value=ends.v_high * (batch.truncated & config.bootstrap),
        )
        targets["high"] = batch.flat(ret), batch.flat(batch.mask)
    else:
        total = returns(batch.rewards, batch.mask, config.gamma)[:, 0]  # [B]
        if config.method == "gigpo":
            raw = gigpo(
                total,
                batch.rewards,
                batch.mask,
                batch.group,
                batch.state,
                gamma=config.gigpo_gamma,
                weight=config.gigpo_weight,
                scale=config.gigpo_scale,
            )
        else:
            raw = {"rloo": rloo, "grpo": grpo}[config.method](total, batch.group)[
                :, None
            ] * batch.mask
    adv = whiten(raw, batch.mask) if config.method in ("ppo", "rloo") else raw
    spoken = (
        torch.arange(batch.samples.masks.action.shape[1]) < batch.samples.lengths[:, None]
    )  # [N, L]
    return Credit(batch.flat(adv)[:, None] * spoken, spoken, targets, {"A": raw})
