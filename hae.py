"""Hierarchical Advantage Estimation (HAE): three advantages per turn, one for each decision of a Plan-Execute agent.

Peng et al., "HiPER: Hierarchical Reinforcement Learning with Explicit Credit Assignment for LLM Agents", arXiv:2602.16165.
At turn t the policy decides to KEEP or SWITCH (q_t), writes a subgoal (o_t) and acts (a_t); SWITCH turns cut a trajectory
into segments. The executor's credit stays inside its segment, the planner's runs over segments as macro-steps:

    grad J = E sum_t [ grad log pi(q_t) adv_switch + q_t grad log pi(o_t) adv_subgoal + grad log pi(a_t) adv_action ]   (Thm 4.1)

Glossary
    B, T             trajectories, turns (padded); row b has n_b >= 1 turns, `mask` is True on the first n_b
    switch           q_t, True where the agent wrote SWITCH; turn 0 opens a segment whatever it says
    start, stop      first turn b_k and last turn b_{k+1} - 1 of each segment k
    v_high           V_high(s_t), the planner's value, read before the subgoal is chosen
    v_low            V_low(s_t, o_t), the executor's value under the subgoal it follows
    v_switch         V_switch(s_t, o_{t-1}), the value under the carried subgoal, before q_t (released code)
    p_switch         beta_t = pi(SWITCH | s_t, o_{t-1})
    end_high/end_low value of the state after the last turn: 0 if the episode terminated, a bootstrap if it was truncated
    gamma            discount per turn
    lam_low/lam_high lambda of the executor (per turn) and of the planner (per segment)

Deviations from the paper
    1. `ret_low` and `ret_high` are lambda-returns, advantage + value, as in the released code; the paper regresses on the
       one-step targets, which are what lam_low = lam_high = 0 gives.
    2. Besides the paper's switch advantage (`switch_gain`) there is the released code's: G_t - V_switch, inside `hae`.
Deviations from the released code
    3. The bootstrap of a truncated episode is an argument. The release reuses the last turn's own V_low and the last
       segment's first V_high; pass those to reproduce it.
    4. One log-depth scan replaces its loops over trajectories, segments and turns.
    5. Values off the mask, NaN included, cannot reach a result, and malformed input raises.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad


class HAE(NamedTuple):
    """All [B, T], in the dtype of `rewards`; zero off the mask, and for *_subgoal and ret_high also off the boundaries."""

    adv_action: Tensor  # A_low_t
    adv_subgoal: Tensor  # A_high_k, on the segment's first turn
    adv_switch: Tensor  # G_t - V_switch; zero without v_switch
    ret_low: Tensor  # regression targets of V_low, V_high, V_switch
    ret_high: Tensor
    ret_switch: Tensor


@torch.no_grad()
def hae(
    rewards: Tensor,
    switch: Tensor,
    mask: Tensor,
    v_high: Tensor,
    v_low: Tensor,
    v_switch: Optional[Tensor] = None,
    *,
    gamma: float = 1.0,
    lam_low: float = 1.0,
    lam_high: float = 0.95,
    end_high: Optional[Tensor] = None,
    end_low: Optional[Tensor] = None,
    validate: bool = True,
) -> HAE:
    """Advantages and value targets of a batch of trajectories (HiPER, section "HAE"; unbiased by Thm 4.2).

    rewards, v_high, v_low, v_switch: float [B, T]; switch, mask: bool [B, T]; end_high, end_low: float [B], default 0.
    The executor's last turn bootstraps from end_low, the planner's last segment and the switch's G_t from end_high.
    Without v_switch, adv_switch is zero (use `switch_gain`) and ret_switch is G_t. Half precision is computed in float32.
    Raises ValueError naming the argument; validate=False skips the checks that must read values, hence wait for the device.
    """
    floats = dict(rewards=rewards, v_high=v_high, v_low=v_low, **_given(v_switch=v_switch))
    ends = _given(end_high=end_high, end_low=end_low)
    _check(
        floats,
        dict(switch=switch, mask=mask),
        ends,
        gamma=gamma,
        lam_low=lam_low,
        lam_high=lam_high,
    )
    if validate:
        _check_values(mask, floats, ends)
    r, high, low = (_clean(x, mask) for x in (rewards, v_high, v_low))  # [B, T]
    last = mask & ~_shift(mask)  # [B, T] the row's last turn
    start = mask & (
        switch | (torch.arange(mask.shape[1], device=mask.device) == 0)
    )  # [B, T] t = b_k
    stop = last | _shift(start)  # [B, T] t = b_{k+1} - 1
    next_high = _next(high, last, end_high)  # [B, T] V_high(s_{t+1})
    next_low = _next(low, last, end_low)  # [B, T] V_low(s_{t+1}, o_k)

    v_next = torch.where(stop & ~last, next_high, next_low)  # [B, T] boundary bootstrap
    delta_low = r + gamma * v_next - low  # [B, T] 0 off the mask, as all its terms are
    within = torch.full_like(r, gamma).masked_fill(
        stop, 0
    )  # [B, T] discount that ends with the segment
    a_low = reverse_scan(delta_low, lam_low * within)  # [B, T] A_low_t

    g = reverse_scan(
        r + gamma * next_high * stop, within
    )  # [B, T] G_t; at b_k: R_k + gamma_k V_high(next)
    delta_high = (g - high) * start  # [B, T] delta_high_k
    decay = torch.full_like(r, gamma).masked_fill(
        start, gamma * lam_high
    )  # [B, T] product over segment k: gamma_k lam_high
    a_high = reverse_scan(delta_high, decay) * start  # [B, T] A_high_k

    a_switch = (
        torch.zeros_like(g) if v_switch is None else (g - _clean(v_switch, mask)) * mask
    )  # [B, T] A_switch_t
    return HAE(
        *(
            x.to(rewards.dtype)
            for x in (a_low, a_high, a_switch, a_low + low, a_high + high * start, g)
        )
    )


@torch.no_grad()
def gae(
    rewards: Tensor,
    mask: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    end_value: Optional[Tensor] = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """Flat turn-level GAE, the PPO baseline: (advantages, returns), both [B, T]. Arguments and errors as in `hae`."""
    floats, ends = dict(rewards=rewards, values=values), _given(end_value=end_value)
    _check(floats, dict(mask=mask), ends, gamma=gamma, lam=lam)
    if validate:
        _check_values(mask, floats, ends)
    r, v = _clean(rewards, mask), _clean(values, mask)  # [B, T]
    delta = r + gamma * _next(v, mask & ~_shift(mask), end_value) - v  # [B, T]
    adv = reverse_scan(delta, torch.full_like(r, gamma * lam))  # [B, T]
    return adv.to(rewards.dtype), (adv + v).to(rewards.dtype)


@torch.no_grad()
def switch_gain(switch: Tensor, p_switch: Tensor, v_high: Tensor, v_keep: Tensor) -> Tensor:
    """The paper's A_switch_t = (q_t - beta_t) (V_high(s_t) - V_low(s_t, o_{t-1})); any one shape.

    switch: bool; the others one float dtype. v_keep is V_low(s_t, o_{t-1}): `v_low` itself on KEEP turns, a counterfactual on
    SWITCH turns. With exact critics it is the advantage, without sampling noise. Nothing is decided at turn 0 or off the
    mask, so the result means nothing there: leave both out of `where` in `normalize`.
    """
    _check(dict(p_switch=p_switch, v_high=v_high, v_keep=v_keep), dict(switch=switch), ndim=None)
    q, beta, high, keep = (x.to(_wide(p_switch)) for x in (switch, p_switch, v_high, v_keep))
    return ((q - beta) * (high - keep)).to(p_switch.dtype)


@torch.no_grad()
def normalize(adv: Tensor, where: Tensor, scale: bool = True) -> Tensor:
    """Zero mean and, with `scale`, unit variance over the turns that have the decision, zero elsewhere; any one shape.

    Call it on the whole batch: means of micro-batches do not average to the mean. Equal advantages are only centred.
    """
    _check(dict(adv=adv), dict(where=where), ndim=None)
    x, n = _clean(adv, where), where.sum().clamp(min=1)
    centred = (x - x.sum() / n) * where
    std = (centred.square().sum() / n).sqrt()
    low, high = x.masked_fill(~where, torch.inf).amin(), x.masked_fill(~where, -torch.inf).amax()
    return torch.where(scale & (high > low), centred / (std + 1e-8), centred).to(
        adv.dtype
    )  # not std > 0: rounding lifts it off 0


def reverse_scan(d: Tensor, c: Tensor) -> Tensor:
    """Solve x_t = d_t + c_t x_{t+1}, x_T = 0, for d and c [B, T] in ceil(log2 T) steps (Hillis and Steele's doubling).

    (d_t, c_t) is the map x -> d_t + c_t x; each round composes a run of `step` maps with the run that follows it. Why this form: a loop
    over turns is 5 times slower at T = 1000, cumulative products divide by zero at boundaries, an [T, T] matrix is slower from
    T = 50 on, and torch.compile gains nothing here but compiles every shape anew.
    """
    d, c, step = d.clone(), c[:, :-1], 1
    while step < d.shape[1]:
        d[:, :-step] += c * d[:, step:]  # [B, T - step]; the last `step` turns are done
        c = c[:, :-step] * c[:, step:]  # [B, T - 2 step]
        step *= 2
    return d


def _shift(x: Tensor, step: int = 1) -> Tensor:
    return pad(x[:, step:], (0, step))  # [B, T] x_{t+step}, 0 past the end


def _next(v: Tensor, last: Tensor, end: Optional[Tensor]) -> Tensor:
    """V(s_{t+1}), with `end` [B] after the last turn (0 if None: terminated)."""
    return (
        _shift(v) if end is None else torch.where(last, end.to(v.dtype)[:, None], _shift(v))
    )  # [B, T]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _clean(x: Tensor, mask: Tensor) -> Tensor:
    return x.to(_wide(x)).masked_fill(~mask, 0.0)  # not x * mask: NaN * 0 is NaN


def _given(**arguments: Optional[Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if x is not None}


def _check(
    floats: dict[str, Tensor],
    bools: dict[str, Tensor],
    ends: dict[str, Tensor] = {},
    *,
    ndim: Optional[int] = 2,
    **unit: float,
) -> None:
    """What can be known without reading a value: types, shapes, dtypes, devices, and coefficients in [0, 1]."""
    head, x = next(iter(floats.items()))
    if not (
        isinstance(x, Tensor) and x.is_floating_point() and x.numel() and ndim in (None, x.ndim)
    ):
        raise ValueError(
            f"{head} must be a non-empty floating-point tensor{' [B, T]' if ndim else ''}, got {_what(x)}."
        )
    for group, dtype, shape in (
        (floats, x.dtype, x.shape),
        (bools, torch.bool, x.shape),
        (ends, x.dtype, x.shape[:1]),
    ):
        for name, y in group.items():
            if not isinstance(y, Tensor) or (y.dtype, y.shape, y.device) != (
                dtype,
                shape,
                x.device,
            ):
                want = f"{dtype} {list(shape)} on {x.device}"
                raise ValueError(
                    f"{name} must be {want} to go with {head} {list(x.shape)}, got {_what(y)}."
                )
    for name, value in unit.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")


def _check_values(mask: Tensor, floats: dict[str, Tensor], ends: dict[str, Tensor]) -> None:
    rules = {
        "mask must hold at least the first turn of every row.": mask[:, 0].all(),
        "mask must be a prefix of each row: no turn after a gap.": (
            mask[:, :-1] | ~mask[:, 1:]
        ).all(),
    }
    rules |= {
        f"{name} must be finite on the mask.": (x.isfinite() | ~mask).all()
        for name, x in floats.items()
    }
    rules |= {f"{name} must be finite.": x.isfinite().all() for name, x in ends.items()}
    for rule, holds in zip(
        rules, torch.stack(list(rules.values())).tolist()
    ):  # the only wait for the device
        if not holds:
            raise ValueError(rule)


def _what(x: object) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _demo() -> None:
    """Ten turns, three segments; a turn costs 0.1 and the last one earns 1. The second subgoal leads to a poor state."""
    rewards = torch.tensor([[-0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1, 1.0]])
    switch = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 1, 0, 0]]).bool()
    v_high = torch.tensor([[0.10, 0.10, 0.20, 0.20, 0.60, 0.50, 0.50, 0.30, 0.60, 0.80]])
    v_low = torch.tensor([[0.15, 0.15, 0.35, 0.35, 0.45, 0.40, 0.30, 0.50, 0.70, 0.90]])
    v_switch = torch.tensor([[0.10, 0.20, 0.30, 0.30, 0.50, 0.40, 0.30, 0.30, 0.60, 0.90]])
    mask = torch.ones_like(switch)
    adv = hae(rewards, switch, mask, v_high, v_low, v_switch)
    flat, _ = gae(rewards, mask, v_low)
    print("turn  segment  reward  V_high  V_low | action  subgoal  switch | flat GAE")
    segment = switch.long().cumsum(1)
    for t in range(10):
        subgoal = f"{adv.adv_subgoal[0, t]:+7.2f}" if switch[0, t] else "      ."
        print(
            f"{t:4d}  {segment[0, t]:7d}  {rewards[0, t]:+6.1f}  {v_high[0, t]:6.2f}  {v_low[0, t]:5.2f} | "
            f"{adv.adv_action[0, t]:+6.2f}  {subgoal}  {adv.adv_switch[0, t]:+6.2f} | {flat[0, t]:+8.2f}"
        )
    print(
        "Segment 2 ends where V_high is only 0.30: HAE blames its actions, flat GAE praises them for what segment 3 did."
    )


if __name__ == "__main__":
    _demo()
