"""Hierarchical Advantage Estimation (HAE): one advantage per decision of a plan-execute agent.

Source: Peng et al., "HiPER", arXiv:2602.16165. At turn t the agent decides to KEEP its subgoal or
to SWITCH (q_t), names the subgoal (o_t) and acts (a_t). SWITCH turns cut a trajectory into
segments. The executor's advantage stops at the end of its segment. The planner's advantage treats
each segment as one macro-step. The policy gradient is (Theorem 4.1)

    grad J = E sum_t [ grad log pi(q_t) adv_switch + q_t grad log pi(o_t) adv_subgoal
                       + grad log pi(a_t) adv_action ]

Glossary
    B, T               trajectories, turns (padded); `mask` is True on the first n_b >= 1 of row b
    switch             q_t, True for SWITCH; turn 0 always opens a segment
    start, stop        first turn b_k and last turn b_{k+1} - 1 of each segment k
    v_high             V_high(s_t), the planner's value before it chooses a subgoal
    v_low              V_low(s_t, o_t), the executor's value under its current subgoal
    v_switch           V_switch(s_t, o_{t-1}), the value before q_t is decided (released code)
    p_switch           beta_t = pi(SWITCH | s_t, o_{t-1})
    end_high, end_low  value of the state after the last turn; 0 if the episode terminated
    gamma              discount per turn
    lam_low, lam_high  lambda of the executor (per turn) and of the planner (per segment)

Deviations from the paper
    1. `ret_low`, `ret_high` are lambda-returns as released; lambdas of 0 give the paper's targets.
    2. Besides its switch advantage (`switch_gain`) there is the released code's, G_t - V_switch.
Deviations from the released code
    3. The bootstrap value of a truncated episode is an argument. The release uses V_low of the
       last turn and V_high of the last segment's first turn; pass those to reproduce it.
    4. One scan in log2(T) steps replaces the loops over trajectories, segments and turns.
    5. Values off the mask, NaN included, never change a result. Malformed input raises.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class HAE(NamedTuple):
    """All [B, T], in the dtype of `rewards`, 0 off the mask. *_subgoal, ret_high: 0 off `start`."""

    adv_action: Tensor  # A_low_t
    adv_subgoal: Tensor  # A_high_k, on the segment's first turn
    adv_switch: Tensor  # G_t - V_switch; 0 without v_switch
    ret_low: Tensor  # regression target of V_low
    ret_high: Tensor  # regression target of V_high
    ret_switch: Tensor  # G_t, regression target of V_switch


@torch.no_grad()
def hae(
    rewards: Tensor,
    switch: Tensor,
    mask: Tensor,
    v_high: Tensor,
    v_low: Tensor,
    v_switch: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam_low: float = 1.0,
    lam_high: float = 0.95,
    end_high: Tensor | None = None,
    end_low: Tensor | None = None,
    validate: bool = True,
) -> HAE:
    """Advantages and value targets of B trajectories (HiPER, section "HAE"; Theorem 4.2: unbiased).

    rewards, v_high, v_low, v_switch: float [B, T]; switch, mask: bool [B, T]; end_high, end_low:
    float [B], default 0. After the last turn the executor bootstraps from end_low, the planner and
    G_t from end_high. Without v_switch, adv_switch is 0 (use `switch_gain`) and ret_switch is G_t.
    Half precision is computed in float32. Raises ValueError that names the argument;
    validate=False skips the checks that read values and so wait for the device.
    """
    floats = dict(rewards=rewards, v_high=v_high, v_low=v_low, **_not_none(v_switch=v_switch))
    bools = dict(switch=switch, mask=mask)
    ends = _not_none(end_high=end_high, end_low=end_low)
    _check(floats, bools, ends, gamma=gamma, lam_low=lam_low, lam_high=lam_high)
    if validate:
        _check_values(mask, floats, ends)
    r, high, low = (_mask_fill(x, mask) for x in (rewards, v_high, v_low))  # [B, T], as all below
    last = mask & ~_shift(mask)  # the trajectory's last turn
    start = mask & (switch | (torch.arange(mask.shape[1], device=mask.device) == 0))  # t = b_k
    stop = last | _shift(start)  # t = b_{k+1} - 1
    next_high = _next_value(high, last, end_high)  # V_high(s_{t+1})
    next_low = _next_value(low, last, end_low)  # V_low(s_{t+1}, o_k)

    v_next = torch.where(stop & ~last, next_high, next_low)  # V_next_t, the boundary bootstrap
    delta_low = r + gamma * v_next - low  # delta_low_t
    within = torch.full_like(r, gamma).masked_fill(stop, 0)  # gamma, cut at the segment's end
    a_low = discounted_reverse_cumsum(delta_low, lam_low * within)  # A_low_t

    # G_t; at t = b_k it is R_k + gamma_k V_high(next). The product of `decay` is gamma_k lam_high.
    g = discounted_reverse_cumsum(r + gamma * next_high * stop, within)
    delta_high = (g - high) * start  # delta_high_k
    decay = torch.full_like(r, gamma).masked_fill(start, gamma * lam_high)
    a_high = discounted_reverse_cumsum(delta_high, decay) * start  # A_high_k

    a_switch = torch.zeros_like(g)
    if v_switch is not None:
        a_switch = (g - _mask_fill(v_switch, mask)) * mask  # A_switch_t, released code
    wide = HAE(a_low, a_high, a_switch, a_low + low, a_high + high * start, g)
    return HAE(*(x.to(rewards.dtype) for x in wide))


@torch.no_grad()
def gae(
    rewards: Tensor,
    mask: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    end_value: Tensor | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """Flat turn-level GAE (PPO) -> (advantages, returns), both [B, T]. Arguments as in `hae`."""
    floats = dict(rewards=rewards, values=values)
    ends = _not_none(end_value=end_value)
    _check(floats, dict(mask=mask), ends, gamma=gamma, lam=lam)
    if validate:
        _check_values(mask, floats, ends)
    r, v = (_mask_fill(x, mask) for x in (rewards, values))  # [B, T], as all below
    delta = r + gamma * _next_value(v, mask & ~_shift(mask), end_value) - v  # delta_t
    adv = discounted_reverse_cumsum(delta, torch.full_like(r, gamma * lam))  # A_t
    return adv.to(rewards.dtype), (adv + v).to(rewards.dtype)


@torch.no_grad()
def switch_gain(switch: Tensor, p_switch: Tensor, v_high: Tensor, v_keep: Tensor) -> Tensor:
    """The paper's A_switch_t = (q_t - beta_t) (V_high(s_t) - V_low(s_t, o_{t-1})); any one shape.

    switch: bool; the others one float dtype. v_keep is V_low(s_t, o_{t-1}): on KEEP turns that is
    `v_low`, on SWITCH turns the value had the agent kept its subgoal. With exact critics this is
    the exact advantage. Nothing is decided at turn 0 or off the mask: exclude both in `normalize`.
    """
    floats = dict(p_switch=p_switch, v_high=v_high, v_keep=v_keep)
    _check(floats, dict(switch=switch), {}, ndim=None)
    dtype = _compute_dtype(p_switch)
    q, beta, high, keep = (x.to(dtype) for x in (switch, p_switch, v_high, v_keep))
    return ((q - beta) * (high - keep)).to(p_switch.dtype)


@torch.no_grad()
def normalize(adv: Tensor, where: Tensor, scale: bool = True) -> Tensor:
    """Zero mean and, with `scale`, unit variance over the entries in `where`; 0 elsewhere.

    adv: float; where: bool; any one shape. Equal advantages are centred and not scaled. Call it on
    the whole batch, because means of micro-batches do not average to the mean.
    """
    _check(dict(adv=adv), dict(where=where), {}, ndim=None)
    x = _mask_fill(adv, where)
    n = where.sum().clamp(min=1)
    centred = (x - x.sum() / n) * where
    std = (centred.square().sum() / n).sqrt()
    smallest = x.masked_fill(~where, torch.inf).amin()
    largest = x.masked_fill(~where, -torch.inf).amax()
    differ = largest > smallest  # not std > 0: rounding can make std positive
    return torch.where(scale & differ, centred / (std + 1e-8), centred).to(adv.dtype)


def discounted_reverse_cumsum(d: Tensor, c: Tensor) -> Tensor:
    """Solve x_t = d_t + c_t x_{t+1} with x_T = 0; d and c [B, T]. Takes ceil(log2 T) rounds.

    Hillis and Steele's scan: (d_t, c_t) is the map x -> d_t + c_t x, and each round composes every
    run of `step` maps with the next run. A loop over turns is 5 times slower at T = 1000.
    """
    d = d.clone()
    c = c[:, :-1]
    step = 1
    while step < d.shape[1]:
        d[:, :-step] += c * d[:, step:]  # [B, T - step]; the last `step` turns are done
        c = c[:, :-step] * c[:, step:]  # [B, T - 2 step]
        step *= 2
    return d


def _shift(x: Tensor) -> Tensor:
    return pad(x[:, 1:], (0, 1))  # [B, T] x_{t+1}, 0 past the end


def _next_value(v: Tensor, last: Tensor, end: Tensor | None) -> Tensor:
    """V(s_{t+1}) [B, T]; after the last turn it is `end` [B], or 0 if `end` is None."""
    if end is None:
        return _shift(v)
    return torch.where(last, end.to(v.dtype)[:, None], _shift(v))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _mask_fill(x: Tensor, mask: Tensor) -> Tensor:
    return x.to(_compute_dtype(x)).masked_fill(~mask, 0.0)  # not x * mask: NaN * 0 is NaN


def _not_none(**arguments: Tensor | None) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if x is not None}


def _check(floats, bools, ends, *, ndim=2, **coefficients) -> None:
    """Check types, shapes, dtypes, devices and the range of coefficients. Reads no values."""
    head, x = next(iter(floats.items()))
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    if not is_float or x.numel() == 0 or ndim not in (None, x.ndim):
        shape = " [B, T]" if ndim else ""
        raise ValueError(f"{head} must be a non-empty float tensor{shape}, got {_describe(x)}.")
    groups = (floats, x.dtype, x.shape), (bools, torch.bool, x.shape), (ends, x.dtype, x.shape[:1])
    for group, dtype, shape in groups:
        wanted = f"{dtype} {list(shape)} on {x.device}"
        for name, y in group.items():
            if _describe(y) != wanted:
                raise ValueError(f"{name} must be {wanted} to match {head}, got {_describe(y)}.")
    for name, value in coefficients.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")


def _check_values(mask: Tensor, floats: dict[str, Tensor], ends: dict[str, Tensor]) -> None:
    """The mask is a prefix of each row, and every value in use is finite."""
    rules = [
        ("mask must hold at least the first turn of every row.", mask[:, 0]),
        ("mask must be a prefix of each row: no turn after a gap.", mask[:, :-1] | ~mask[:, 1:]),
    ]
    for name, x in floats.items():
        rules.append((f"{name} must be finite on the mask.", x.isfinite() | ~mask))
    for name, x in ends.items():
        rules.append((f"{name} must be finite.", x.isfinite()))
    holds = torch.stack([rule.all() for _, rule in rules]).tolist()  # the only wait for the device
    for (message, _), ok in zip(rules, holds, strict=True):
        if not ok:
            raise ValueError(message)


def _describe(x: object) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


if __name__ == "__main__":  # ten turns in three segments; the second subgoal leads to a poor state
    rewards = torch.tensor([[-0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1, 1.0]])
    switch = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 1, 0, 0]]).bool()
    v_high = torch.tensor([[0.10, 0.10, 0.20, 0.20, 0.60, 0.50, 0.50, 0.30, 0.60, 0.80]])
    v_low = torch.tensor([[0.15, 0.15, 0.35, 0.35, 0.45, 0.40, 0.30, 0.50, 0.70, 0.90]])
    v_switch = torch.tensor([[0.10, 0.20, 0.30, 0.30, 0.50, 0.40, 0.30, 0.30, 0.60, 0.90]])
    mask = torch.ones_like(switch)
    adv = hae(rewards, switch, mask, v_high, v_low, v_switch)
    flat, _ = gae(rewards, mask, v_low)
    segment = switch.long().cumsum(1)
    print("turn  segment  reward  V_high  V_low | action  subgoal  switch | flat GAE")
    for t in range(10):
        subgoal = f"{adv.adv_subgoal[0, t]:+7.2f}" if switch[0, t] else "      ."
        print(
            f"{t:4d}  {segment[0, t]:7d}  {rewards[0, t]:+6.1f}  "
            f"{v_high[0, t]:6.2f}  {v_low[0, t]:5.2f} | {adv.adv_action[0, t]:+6.2f}  "
            f"{subgoal}  {adv.adv_switch[0, t]:+6.2f} | {flat[0, t]:+8.2f}"
        )
    print(
        "Segment 2 ends in a state with V_high 0.30. HAE gives its actions negative advantages; "
        "flat GAE gives them positive ones, because segment 3 earned a reward."
    )
