"""A plan-execute MDP small enough to enumerate: 2 states, 2 subgoals, 2 actions, at most 3 turns.

Expectations over trajectories are sums, so Theorems 4.1 to 4.3 of HiPER can be compared with exact
numbers. Everything is float64.

The policy is a table of logits for each of its three decisions, with a row for each turn:
    pi(q_t | s_t, o_{t-1}), pi(o_t | s_t), pi(a_t | s_t, o_t).
Turn 0 opens a segment, so no switch is decided there. The world's state is s_t and the turn.
Rewards and moves depend on (s, a) only: a subgoal matters only through the actions. After an action
the episode ends with probability end[s, a], and always after T turns.

Shapes: B trajectories (1,256), T turns, S states, O subgoals, A actions, P logits (48). A table has
the axes [T, S, O, A] or fewer. The objective is J = E sum_t gamma^t r_t, so turn t's term of the
gradient carries gamma^t.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hae import gae, hae, switch_gain

T = 3
N_STATES = 2
N_SUBGOALS = 2
N_ACTIONS = 2
SHAPES = {
    "switch": (T, N_STATES, N_SUBGOALS),
    "subgoal": (T, N_STATES, N_SUBGOALS),
    "action": (T, N_STATES, N_SUBGOALS, N_ACTIONS),
}
SIZES = [torch.Size(shape).numel() for shape in SHAPES.values()]
# Where each decision's logits lie in [P].
SLICES = {name: slice(sum(SIZES[:i]), sum(SIZES[: i + 1])) for i, name in enumerate(SHAPES)}


def walks(t: int = 0, state: int = 0, carried: int = 0):
    """Every way to continue from turn t: lists of turns (state, o_{t-1}, q, o, a)."""
    plans = [(1, subgoal) for subgoal in range(N_SUBGOALS)]
    if t > 0:
        plans.append((0, carried))
    for q, subgoal in plans:
        for action in range(N_ACTIONS):
            turn = (state, carried, q, subgoal, action)
            yield [turn]
            if t + 1 == T:
                continue
            for next_state in range(N_STATES):
                for rest in walks(t + 1, next_state, subgoal):
                    yield [turn] + rest


PATHS = [walk for state in range(N_STATES) for walk in walks(state=state)]
PADDED = [path + [(0,) * 5] * (T - len(path)) for path in PATHS]
LENGTH = torch.tensor([len(path) for path in PATHS])  # [B]
STATE, CARRIED, Q, SUBGOAL, ACTION = torch.tensor(PADDED).unbind(-1)  # [B, T] each
TURN = torch.arange(T).expand_as(STATE)  # [B, T]
MASK = TURN < LENGTH[:, None]  # [B, T]
SWITCH = Q.bool()  # [B, T]
# [3, B, T] the turns at which switch, subgoal and action are decided
DECIDES = torch.stack([MASK & (TURN > 0), MASK & SWITCH, MASK])
# What each decision saw, and what it chose.
SEEN = ((STATE, CARRIED, Q), (STATE, SUBGOAL), (STATE, SUBGOAL, ACTION))


class World(NamedTuple):
    start: Tensor  # [S] p(s_0)
    move: Tensor  # [S, A, S] p(s' | s, a), if the episode continues
    reward: Tensor  # [S, A]
    end: Tensor  # [S, A] p(the episode ends | s, a)
    gamma: float


class Values(NamedTuple):
    high: Tensor  # [T, S] V_high(s)
    low: Tensor  # [T, S, O] V_low(s, o)
    switch: Tensor  # [T, S, O] V_switch(s, o_prev), before q
    q_low: Tensor  # [T, S, O, A] Q_low(s, o, a)


class Advantages(NamedTuple):
    switch: Tensor  # [B, T], as the others
    subgoal: Tensor
    action: Tensor


def random_world(seed: int, gamma: float = 1.0) -> tuple[World, Tensor]:
    """A world and its policy's logits [P]."""
    random = dict(generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    world = World(
        start=torch.randn(N_STATES, **random).softmax(0),
        move=(2 * torch.randn(N_STATES, N_ACTIONS, N_STATES, **random)).softmax(-1),
        reward=torch.randn(N_STATES, N_ACTIONS, **random),
        end=0.3 * torch.rand(N_STATES, N_ACTIONS, **random),
        gamma=gamma,
    )
    return world, torch.randn(sum(SIZES), **random)


def tables(logits: Tensor) -> list[Tensor]:
    """[P] -> logits of SWITCH [T, S, O], of subgoals [T, S, O], of actions [T, S, O, A]."""
    parts = logits.split(SIZES)
    return [part.view(shape) for part, shape in zip(parts, SHAPES.values(), strict=True)]


def solve(world: World, logits: Tensor) -> tuple[Tensor, Values]:
    """Dynamic programming backwards over turns -> (J, differentiable; the exact values)."""
    switch, subgoal, action = tables(logits)
    later = torch.zeros(N_STATES, N_SUBGOALS, dtype=logits.dtype)  # V_switch of the next turn
    steps = []
    for t in reversed(range(T)):
        onward = torch.einsum("sax,xo->soa", world.move, later)  # [S, O, A]
        q_low = world.reward[:, None] + world.gamma * (1 - world.end[:, None]) * onward  # [S, O, A]
        low = (action[t].softmax(-1) * q_low).sum(-1)  # [S, O]
        high = (subgoal[t].softmax(-1) * low).sum(-1)  # [S]
        later = low + switch[t].sigmoid() * (high[:, None] - low)  # [S, O]
        steps.insert(0, (high, low, later, q_low))
    values = Values(*(torch.stack(table) for table in zip(*steps, strict=True)))
    return world.start @ values.high[0], values


def log_policy(logits: Tensor) -> Tensor:
    """log pi of each decision on every trajectory, [3, B, T]; 0 where nothing is decided.

    Order: switch, subgoal, action.
    """
    switch, subgoal, action = tables(logits)
    q = logsigmoid(switch[TURN, STATE, CARRIED] * torch.where(SWITCH, 1, -1))
    o = subgoal.log_softmax(-1)[TURN, STATE, SUBGOAL]
    a = action.log_softmax(-1)[TURN, STATE, SUBGOAL, ACTION]
    return torch.stack([q, o, a]) * DECIDES


def probability(world: World, logits: Tensor) -> Tensor:
    """Probability of each trajectory, [B], differentiable in the logits. The sum is 1."""
    continues = TURN < LENGTH[:, None] - 1  # [B, T]
    end = world.end[STATE, ACTION]  # [B, T]
    move = world.move[STATE, ACTION, STATE.roll(-1, 1)] * (1 - end)
    stop = torch.where(TURN == T - 1, 1.0, end)
    of_world = torch.where(continues, move, torch.where(MASK, stop, 1.0)).prod(1)  # [B]
    return world.start[STATE[:, 0]] * of_world * log_policy(logits).sum((0, 2)).exp()


def along(v: Values) -> tuple[Tensor, ...]:
    """Values on every trajectory, [B, T] each.

    V_high(s_t), V_low(s_t, o_t), V_low(s_t, o_{t-1}) and V_switch(s_t, o_{t-1}).
    """
    values = (
        v.high[TURN, STATE],
        v.low[TURN, STATE, SUBGOAL],
        v.low[TURN, STATE, CARRIED],
        v.switch[TURN, STATE, CARRIED],
    )
    return tuple(x * MASK for x in values)


class Enumeration:
    """All trajectories of one world and policy, laid out as for `hae.hae`, with exact critics.

    Nothing is sampled. Attributes without a comment are [B, T].
    """

    def __init__(self, world: World, logits: Tensor):
        self.world = world
        self.logits = logits
        self.gamma = world.gamma
        self.p = probability(world, logits)  # [B]
        self.rewards = world.reward[STATE, ACTION] * MASK
        self.j, self.values = solve(world, logits)
        self.grad_j = torch.func.grad(lambda x: solve(world, x)[0])(logits)  # [P]
        self.beta = tables(logits)[0].sigmoid()[TURN, STATE, CARRIED]
        self.v_high, self.v_low, self.v_keep, self.v_switch = along(self.values)
        discounts = self.gamma ** TURN[0].double()  # [T]
        returns = [self.rewards[:, t:] @ discounts[: T - t] for t in range(T)]
        self.returns = torch.stack(returns, 1)
        self.v_flat = self.mean(self.returns, STATE)  # E[return from t | s_t]
        weight = self.gamma ** TURN.double() * DECIDES  # [3, B, T]
        # [3, B, T, P] gamma^t grad log pi
        self.score = torch.func.jacfwd(log_policy)(logits) * weight[..., None]

    def hae(
        self,
        lam_low: float,
        lam_high: float,
        form: str = "closed_form",
        values: Values | None = None,
    ) -> Advantages:
        """HAE's advantages.

        form: the switch advantage, "closed_form" (paper) or "value_head" (released code).
        values: critics to use in place of the exact ones.
        """
        v_high, v_low, v_keep, v_switch = along(values or self.values)
        got = hae(
            self.rewards,
            SWITCH,
            MASK,
            v_high,
            v_low,
            v_switch,
            gamma=self.gamma,
            lam_low=lam_low,
            lam_high=lam_high,
        )
        switch = got.adv_switch
        if form == "closed_form":
            switch = switch_gain(SWITCH, self.beta, v_high, v_keep)
        return Advantages(switch, got.adv_subgoal, got.adv_action)

    def flat(self, lam: float, values: Tensor | None = None) -> Tensor:
        """Flat GAE: one advantage [B, T] for all decisions of a turn. Default critic: V(s_t)."""
        if values is None:
            values = self.v_flat
        return gae(self.rewards, MASK, values, gamma=self.gamma, lam=lam)[0]

    def mean(self, x: Tensor, *given: Tensor, where: Tensor = MASK) -> Tensor:
        """E[x_t | given, t] over the turns of `where`, written at each of them; all [B, T].

        Weighted by probability, so exact.
        """
        # TURN needs two bits of the key, each variable in `given` one.
        key = sum(value * 2**bit for bit, value in enumerate(given, 2)) + TURN  # [B, T]
        p = (self.p[:, None] * where).flatten()  # [B T]
        empty = p.new_zeros(2 ** (2 + len(given)))
        total = empty.index_add(0, key.flatten(), p * x.flatten())
        weight = empty.index_add(0, key.flatten(), p)
        return (total / weight.clamp(min=1e-300))[key] * where

    def variance(self, x: Tensor, *given: Tensor, where: Tensor = MASK) -> Tensor:
        """Var(x_t | given, t), as `mean`."""
        return self.mean((x - self.mean(x, *given, where=where)) ** 2, *given, where=where)

    def average(self, x: Tensor, where: Tensor = MASK) -> float:
        """Mean of x over the turns of `where`, weighted by their probability."""
        p = self.p[:, None] * where
        return float((p * x).sum() / p.sum())

    def gradient(self, *advantages: Tensor) -> Tensor:
        """Advantages [B, T] of switch, subgoal, action -> each trajectory's gradient [B, P].

        Source: Theorem 4.1.
        """
        return torch.einsum("kbt,kbtp->bp", torch.stack(advantages), self.score)

    def bias(self, *advantages: Tensor) -> Tensor:
        """Expected gradient of these advantages minus grad J, [P]."""
        return self.p @ self.gradient(*advantages) - self.grad_j

    def gradient_variance(self, *advantages: Tensor) -> float:
        """Trace of the covariance of one trajectory's gradient."""
        g = self.gradient(*advantages)  # [B, P]
        return float(self.p @ (g - self.p @ g).square().sum(1))
