"""A plan-execute MDP so small that every trajectory can be written down: 2 states, 2 subgoals, 2 actions, at most 3 turns.

Expectations over trajectories are then sums, and Theorems 4.1 to 4.3 of HiPER can be held against exact numbers. All float64.

The policy is a table of logits for each of its three decisions, a row for each turn:
    pi(q_t | s_t, o_{t-1}), pi(o_t | s_t), pi(a_t | s_t, o_t).    Turn 0 opens a segment; nothing is decided there.
The world's state is s_t and the turn: rewards and moves depend on (s, a) only, so a subgoal matters through the actions alone.
After an action the episode ends with probability end[s, a], and at the latest after T turns: paths of 1, 2 and 3 turns.

Shapes: B trajectories (1,256), T turns, S states, O subgoals, A actions, P logits (48). Axes of a table: [T, S, O, A] or fewer.
With gamma < 1 the objective is J = E sum_t gamma^t r_t, and turn t's term of its gradient carries gamma^t.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hae import gae, hae, switch_gain

T, S, O, A = 3, 2, 2, 2
SHAPES = {"switch": (T, S, O), "subgoal": (T, S, O), "action": (T, S, O, A)}
SIZES = [torch.Size(shape).numel() for shape in SHAPES.values()]
SLICES = dict(
    zip(SHAPES, (slice(sum(SIZES[:i]), sum(SIZES[: i + 1])) for i in range(3)))
)  # where each group lies in [P]


def walks(t: int = 0, state: int = 0, carried: int = 0):
    """Every way to go on from turn t: lists of turns (state, o_{t-1}, q, o, a)."""
    for q, o in [(1, o) for o in range(O)] + [(0, carried)] * (t > 0):
        for a in range(A):
            yield [(state, carried, q, o, a)]
            for after in range(S) if t + 1 < T else ():
                for rest in walks(t + 1, after, o):
                    yield [(state, carried, q, o, a)] + rest


PATHS = [walk for state in range(S) for walk in walks(state=state)]
LENGTH = torch.tensor([len(path) for path in PATHS])  # [B]
STATE, CARRIED, Q, SUBGOAL, ACTION = torch.tensor(
    [path + [(0,) * 5] * (T - len(path)) for path in PATHS]
).unbind(-1)  # [B, T]
TURN = torch.arange(T).expand_as(STATE)  # [B, T]
MASK, SWITCH = TURN < LENGTH[:, None], Q.bool()  # [B, T]
DECIDES = torch.stack([MASK & (TURN > 0), MASK & SWITCH, MASK])  # [3, B, T] switch, subgoal, action
SEEN = (
    (STATE, CARRIED, Q),
    (STATE, SUBGOAL),
    (STATE, SUBGOAL, ACTION),
)  # what each saw, and what it chose


class World(NamedTuple):
    start: Tensor  # [S]        p(s_0)
    move: Tensor  # [S, A, S]  p(s' | s, a), if the episode goes on
    reward: Tensor  # [S, A]
    end: Tensor  # [S, A]     p(the episode ends | s, a)
    gamma: float


class Values(NamedTuple):
    high: Tensor  # [T, S]        V_high(s)
    low: Tensor  # [T, S, O]     V_low(s, o)
    switch: Tensor  # [T, S, O]     V_switch(s, o_prev), before q
    q_low: Tensor  # [T, S, O, A]  Q_low(s, o, a)


def random_world(seed: int, gamma: float = 1.0) -> tuple[World, Tensor]:
    """A world and its policy's logits [P]."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    world = World(
        normal(S).softmax(0),
        (2 * normal(S, A, S)).softmax(-1),
        normal(S, A),
        0.3 * rand(S, A),
        gamma,
    )
    return world, normal(sum(SIZES))


def tables(logits: Tensor) -> list[Tensor]:
    """[P] -> logits of SWITCH [T, S, O], of subgoals [T, S, O], of actions [T, S, O, A]."""
    return [x.view(shape) for x, shape in zip(logits.split(SIZES), SHAPES.values())]


def solve(world: World, logits: Tensor) -> tuple[Tensor, Values]:
    """Dynamic programming, backwards over turns -> J, differentiable in the logits, and the exact values."""
    switch, subgoal, action = tables(logits)
    later, steps = torch.zeros(S, O, dtype=logits.dtype), []  # V_switch of the next turn, [S, O]
    for t in reversed(range(T)):
        onward = torch.einsum("sax,xo->soa", world.move, later)  # [S, O, A]
        q_low = world.reward[:, None] + world.gamma * (1 - world.end[:, None]) * onward  # [S, O, A]
        low = (action[t].softmax(-1) * q_low).sum(-1)  # [S, O]
        high = (subgoal[t].softmax(-1) * low).sum(-1)  # [S]
        later = low + switch[t].sigmoid() * (high[:, None] - low)  # [S, O]
        steps.insert(0, (high, low, later, q_low))
    values = Values(*map(torch.stack, zip(*steps)))
    return world.start @ values.high[0], values


def log_policy(logits: Tensor) -> Tensor:
    """log pi of each decision on every trajectory: [3, B, T] in the order switch, subgoal, action; 0 where nothing is decided."""
    switch, subgoal, action = tables(logits)
    q = logsigmoid(switch[TURN, STATE, CARRIED] * torch.where(SWITCH, 1, -1))
    o = subgoal.log_softmax(-1)[TURN, STATE, SUBGOAL]
    a = action.log_softmax(-1)[TURN, STATE, SUBGOAL, ACTION]
    return torch.stack([q, o, a]) * DECIDES


def probability(world: World, logits: Tensor) -> Tensor:
    """Probability of each trajectory, [B], differentiable in the logits; the sum is 1."""
    goes_on = TURN < LENGTH[:, None] - 1  # [B, T]
    move = world.move[STATE, ACTION, STATE.roll(-1, 1)] * (1 - world.end[STATE, ACTION])
    stop = torch.where(TURN == T - 1, 1.0, world.end[STATE, ACTION])
    world_says = torch.where(goes_on, move, torch.where(MASK, stop, 1.0)).prod(1)  # [B]
    return world.start[STATE[:, 0]] * world_says * log_policy(logits).sum((0, 2)).exp()


def along(v: Values) -> tuple[Tensor, ...]:
    """V_high(s_t), V_low(s_t, o_t), V_low(s_t, o_{t-1}) and V_switch(s_t, o_{t-1}) on every trajectory, [B, T] each."""
    values = (
        v.high[TURN, STATE],
        v.low[TURN, STATE, SUBGOAL],
        v.low[TURN, STATE, CARRIED],
        v.switch[TURN, STATE, CARRIED],
    )
    return tuple(x * MASK for x in values)


class Enumeration:
    """All trajectories of one world and policy in the layout of `hae.hae`, with exact critics. Nothing here is sampled."""

    def __init__(self, world: World, logits: Tensor):
        self.world, self.logits, self.gamma = world, logits, world.gamma
        self.p, self.rewards = (
            probability(world, logits),
            world.reward[STATE, ACTION] * MASK,
        )  # [B], [B, T]
        self.j, self.values = solve(world, logits)
        self.grad_j = torch.func.grad(lambda x: solve(world, x)[0])(logits)  # [P]
        self.beta = tables(logits)[0].sigmoid()[TURN, STATE, CARRIED]  # [B, T]
        self.v_high, self.v_low, self.v_keep, self.v_switch = along(self.values)  # [B, T] each
        self.returns = torch.stack(
            [self.rewards[:, t:] @ self.gamma ** TURN[0, : T - t].double() for t in range(T)], 1
        )  # [B, T]
        self.v_flat = self.mean(self.returns, STATE)  # [B, T] E[return from t | s_t]
        weight = self.gamma ** TURN.double() * DECIDES  # [3, B, T]
        self.score = (
            torch.func.jacfwd(log_policy)(logits) * weight[..., None]
        )  # [3, B, T, P] gamma^t grad log pi

    def hae(
        self, lam_low: float, lam_high: float, form: str = "gain", values: Values | None = None
    ) -> tuple[Tensor, ...]:
        """HAE's advantages [B, T] of switch (form `gain` or `critic`), subgoal and action; values: other critics than the exact."""
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
        switch = (
            got.adv_switch if form == "critic" else switch_gain(SWITCH, self.beta, v_high, v_keep)
        )
        return switch, got.adv_subgoal, got.adv_action

    def flat(self, lam: float, values: Tensor | None = None) -> Tensor:
        """Flat GAE with V(s_t), or other values: one advantage [B, T] for all decisions of a turn."""
        return gae(
            self.rewards, MASK, self.v_flat if values is None else values, gamma=self.gamma, lam=lam
        )[0]

    def mean(self, x: Tensor, *given: Tensor, where: Tensor = MASK) -> Tensor:
        """E[x_t | given, t] over the turns of `where`, put back at each of them; all [B, T]. Weighted by probability, so exact."""
        group = (
            sum(key * 2**i for i, key in enumerate(given, 2)) + TURN
        )  # [B, T] T <= 4, the others are 0 or 1
        p = (self.p[:, None] * where).flatten()  # [B T]
        add = lambda y: p.new_zeros(2 ** (2 + len(given))).index_add(0, group.flatten(), y)
        return (add(p * x.flatten()) / add(p).clamp(min=1e-300))[group] * where

    def variance(self, x: Tensor, *given: Tensor, where: Tensor = MASK) -> Tensor:
        """Var(x_t | given, t), as `mean`."""
        return self.mean((x - self.mean(x, *given, where=where)) ** 2, *given, where=where)

    def average(self, x: Tensor, where: Tensor = MASK) -> float:
        """Over all turns of `where`, each as often as it is met."""
        return float((self.p[:, None] * where * x).sum() / (self.p[:, None] * where).sum())

    def gradient(self, *advantages: Tensor) -> Tensor:
        """Three advantages [B, T], of switch, subgoal and action -> each trajectory's policy gradient [B, P] (Thm 4.1)."""
        return torch.einsum("kbt,kbtp->bp", torch.stack(advantages), self.score)

    def bias(self, *advantages: Tensor) -> Tensor:
        return self.p @ self.gradient(*advantages) - self.grad_j  # [P]

    def gradient_variance(self, *advantages: Tensor) -> float:
        """Trace of the covariance of one trajectory's gradient."""
        g = self.gradient(*advantages)  # [B, P]
        return float(self.p @ (g - self.p @ g).square().sum(1))
