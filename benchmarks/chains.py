"""Whose gradient is better in longer episodes? `python benchmarks/chains.py`, a minute, no LLM.

Small random worlds: N tasks must be done one after the other within 5 N turns, and only that is
rewarded, at the end. A task has two phases. Three actions may move it on or finish it; a subgoal
(of three) matters through the actions that the policy takes under it. One table of logits serves
all tasks and turns, as one LLM does.

Values and the true gradient come from dynamic programming, so critics can be exact, or wrong by a
random error of which the size is chosen. Episodes are sampled. The table has

    variance   trace of the covariance of one episode's gradient, over |grad J|^2, exact critics,
               lambdas (HAE's low and high) of 1
    error      squared bias and a 64th of the variance, over |grad J|^2: that of a batch of 64
               episodes with wrong critics, at the estimator's best lambdas for each world

as geometric means over worlds with their 95 % bootstrap interval. `trajectory` gives every turn the
return minus its mean, as GRPO and RLOO do in a large group. Flat GAE has two critics: V(s), as in
the paper's comparison, and V(s, o_prev), which knows the subgoal that the agent carries; the critic
of `--method ppo` reads it in the prompt. The last line has the error of flat GAE with the latter
over that of HAE with the value head, in the longest chain.
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from hae import gae, hae, switch_gain

PHASES, SUBGOALS, ACTIONS = 2, 3, 3
SIZES = (PHASES * SUBGOALS, PHASES * SUBGOALS, PHASES * SUBGOALS * ACTIONS)
TURNS = 5  # per task
CHAINS = (1, 2, 4)  # in longer ones success is too rare to be sampled
LAMBDAS = (0.0, 0.5, 0.8, 1.0)
PAIRS = list(itertools.product(LAMBDAS, LAMBDAS))
ERROR = 0.3  # of the critics, over the spread of the values
BATCH = 64
FLAT = ("flat GAE, V(s)", "flat GAE, V(s, o_prev)")
HIERARCHICAL = ("HAE, closed form", "HAE, value head")
KINDS = ("trajectory", *FLAT, *HIERARCHICAL)


class World(NamedTuple):
    chain: int
    done: torch.Tensor  # [S, A] p(the task is done)
    move: torch.Tensor  # [S, A, S] p(next phase | not done)
    logits: torch.Tensor  # [P]


class Values(NamedTuple):
    high: torch.Tensor  # [T, N, S] V_high
    low: torch.Tensor  # [T, N, S, O] V_low(s, o)
    switch: torch.Tensor  # [T, N, S, O] V_switch(s, o_prev), before q
    flat: torch.Tensor  # [T, N, S] V(s): the mean of V_switch over the subgoals carried there


class Episodes(NamedTuple):
    """B sampled episodes, [B, T] each."""

    task: torch.Tensor
    phase: torch.Tensor
    carried: torch.Tensor  # o_{t-1}
    subgoal: torch.Tensor  # o_t
    switch: torch.Tensor  # q_t
    action: torch.Tensor
    mask: torch.Tensor
    reward: torch.Tensor


def random_world(seed, chain):
    g = dict(generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    done = (2 * torch.randn(PHASES, ACTIONS, **g) - 1).sigmoid()
    move = (2 * torch.randn(PHASES, ACTIONS, PHASES, **g)).softmax(-1)
    return World(chain, done, move, torch.randn(sum(SIZES), **g))


def tables(logits):
    """[P] -> p(SWITCH) [S, O], p(subgoal) [S, O], p(action) [S, O, A]."""
    switch, subgoal, action = logits.split(SIZES)
    return (
        switch.view(PHASES, SUBGOALS).sigmoid(),
        subgoal.view(PHASES, SUBGOALS).softmax(-1),
        action.view(PHASES, SUBGOALS, ACTIONS).softmax(-1),
    )


def solve(world, logits):
    """Dynamic programming -> (J, differentiable in the logits; Values)."""
    switch, subgoal, action = tables(logits)
    later = torch.zeros(world.chain, PHASES, SUBGOALS, dtype=logits.dtype)  # V_switch, next turn
    finished = torch.ones(1, SUBGOALS, dtype=logits.dtype)  # the reward
    done = world.done[:, None]  # [S, 1, A]
    steps = []
    for _ in range(TURNS * world.chain):
        onward = torch.einsum("sax,nxo->nsoa", world.move, later)
        next_task = torch.cat([later[1:, 0], finished])  # [N, O] it begins in phase 0
        q_low = done * next_task[:, None, :, None] + (1 - done) * onward  # [N, S, O, A]
        low = (action * q_low).sum(-1)
        high = (subgoal * low).sum(-1)
        later = low + switch * (high[..., None] - low)
        steps.insert(0, (high, low, later))
    high, low, before = (torch.stack(values) for values in zip(*steps, strict=True))
    flat = torch.stack([high[0], *flat_values(world, before)[1:]])  # turn 0 opens a segment
    return high[0, 0, 0], Values(high, low, before, flat)


@torch.no_grad()
def flat_values(world, before):
    """[N, S] of each turn: the mean of `before` over the subgoals that the agent may carry."""
    switch, subgoal, action = tables(world.logits)
    there = torch.zeros_like(before[0])  # [N, S, O] how probable it is now
    there[0, 0, 0] = 1.0
    result = []
    for t, values in enumerate(before):
        weight = there.sum(-1)
        result.append((there * values).sum(-1) / weight.clamp(min=1e-300))
        opens = there * switch if t else there
        chosen = there - opens + opens.sum(-1, keepdim=True) * subgoal  # [N, S, O]
        acts = chosen[..., None] * action  # [N, S, O, A]
        moved = torch.einsum("nsoa,sa,sax->nxo", acts, 1 - world.done, world.move)
        finished = torch.einsum("nsoa,sa->no", acts, world.done)
        moved[1:, 0] += finished[:-1]
        there = moved
    return result


def sample(world, episodes, generator):
    switch, subgoal, action = tables(world.logits)

    def draw(p):
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    def coin(p):
        return torch.rand(episodes, generator=generator, dtype=p.dtype) < p

    task = torch.zeros(episodes, dtype=torch.long)
    phase, carried = torch.zeros_like(task), torch.zeros_like(task)
    turns = []
    for t in range(TURNS * world.chain):
        live = task < world.chain
        q = coin(switch[phase, carried]) | (t == 0)
        chosen = torch.where(q, draw(subgoal[phase]), carried)
        act = draw(action[phase, chosen])
        done = coin(world.done[phase, act])
        reward = (live & done & (task == world.chain - 1)).double()
        here = task.clamp(max=world.chain - 1)
        turns.append(Episodes(here, phase, carried, chosen, q, act, live, reward))
        phase = torch.where(done, 0, draw(world.move[phase, act]))
        task = task + (live & done)
        carried = chosen
    return Episodes(*(torch.stack(column, 1) for column in zip(*turns, strict=True)))


def scores(world, x):
    """[3, B, T, P] grad log pi of switch, subgoal and action; 0 where nothing is decided."""
    switch, subgoal, action = tables(world.logits)
    result = torch.zeros(3, *x.task.shape, sum(SIZES), dtype=torch.float64)
    row = x.phase * SUBGOALS + x.carried
    result[0].scatter_(
        2, row[..., None], (x.switch.double() - switch[x.phase, x.carried])[..., None]
    )
    rows = SIZES[0] + x.phase[..., None] * SUBGOALS + torch.arange(SUBGOALS)
    written = torch.nn.functional.one_hot(x.subgoal, SUBGOALS)
    result[1].scatter_(2, rows, written - subgoal[x.phase])
    first = SIZES[0] + SIZES[1] + (x.phase * SUBGOALS + x.subgoal) * ACTIONS
    written = torch.nn.functional.one_hot(x.action, ACTIONS)
    result[2].scatter_(
        2, first[..., None] + torch.arange(ACTIONS), written - action[x.phase, x.subgoal]
    )
    later = x.mask & (torch.arange(x.mask.shape[1]) > 0)
    decides = torch.stack([later, x.mask & x.switch, x.mask])
    return result * decides[..., None]


def advantages(world, x, values, kind, lambdas):
    """[3, B, T] or [1, B, T] of one estimator; lambdas: one, or HAE's low and high."""
    turn = torch.arange(x.task.shape[1]).expand_as(x.task)
    state = turn, x.task, x.phase
    if kind == "trajectory":
        total = x.reward.sum(1, keepdim=True)
        return (total - total.mean()).expand_as(x.reward)[None]
    v_carried = values.switch[(*state, x.carried)]
    if kind in FLAT:
        v = values.flat[state] if kind == FLAT[0] else v_carried
        return gae(x.reward, x.mask, v, lam=lambdas)[0][None]
    v_high = values.high[state]
    got = hae(
        x.reward,
        x.switch & x.mask,
        x.mask,
        v_high,
        values.low[(*state, x.subgoal)],
        v_carried,
        gamma=1.0,
        lam_low=lambdas[0],
        lam_high=lambdas[1],
    )
    switch = got.adv_switch
    if kind == "HAE, closed form":
        p_switch = tables(world.logits)[0][x.phase, x.carried]
        switch = switch_gain(x.switch, p_switch, v_high, values.low[(*state, x.carried)])
    return torch.stack([switch, got.adv_subgoal, got.adv_action])


def moments(score, advantage, truth):
    """-> (variance of one episode's gradient, squared bias), over |grad J|^2."""
    g = torch.einsum("kbt,kbtp->bp", advantage.expand(3, -1, -1), score)
    variance = float(g.var(0).sum())
    bias = float((g.mean(0) - truth).square().sum()) - variance / len(g)  # without its own noise
    size = float(truth.square().sum())
    return variance / size, bias / size


def measure(seed, chain, episodes=1000):
    """One world -> {estimator: (variance with exact critics, error with wrong ones)}."""
    world = random_world(seed, chain)
    truth = torch.func.grad(lambda logits: solve(world, logits)[0])(world.logits)
    exact = solve(world, world.logits)[1]
    generator = torch.Generator().manual_seed(seed)
    wrong = Values(
        *(
            v + ERROR * v.std() * torch.randn(v.shape, generator=generator, dtype=v.dtype)
            for v in exact
        )
    )
    x = sample(world, episodes, generator)
    score = scores(world, x)

    def found(kind, values, lambdas):
        return moments(score, advantages(world, x, values, kind, lambdas), truth)

    result = {}
    for kind in KINDS:
        choices = [None] if kind == "trajectory" else LAMBDAS if kind in FLAT else PAIRS
        variance, _ = found(kind, exact, choices[-1])
        errors = [
            bias + spread / BATCH for spread, bias in (found(kind, wrong, c) for c in choices)
        ]
        result[kind] = variance, min(errors)
    return result


def summary(values, draws=2000):
    """Geometric mean and its 95 % bootstrap interval."""
    logs = torch.tensor(values).clamp(min=1e-9).log()
    rng = random.Random(0)
    means = [logs[rng.choices(range(len(logs)), k=len(logs))].mean() for _ in range(draws)]
    low, high = torch.stack(means).exp().quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(logs.mean().exp()), low, high


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--worlds", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=1000, help="sampled in each world")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    print(f"{'chain':>5s}  {'estimator':22s}  {'variance':24s}  error")
    for chain in CHAINS:
        worlds = [measure(seed, chain, args.episodes) for seed in range(args.worlds)]
        for kind in KINDS:
            variance, error = (
                summary(list(v)) for v in zip(*(w[kind] for w in worlds), strict=True)
            )
            shown = ["{:.3g} [{:.3g}, {:.3g}]".format(*numbers) for numbers in (variance, error)]
            print(f"{chain:5d}  {kind:22s}  {shown[0]:24s}  {shown[1]}", flush=True)
            rows.append({"chain": chain, "estimator": kind, "variance": variance, "error": error})
        for flat, kind in itertools.product(FLAT, HIERARCHICAL):
            found = [summary([w[flat][n] / w[kind][n] for w in worlds]) for n in range(2)]
            row = {"chain": chain, "estimator": f"{flat} over {kind}"}
            rows.append(row | {"variance": found[0], "error": found[1]})
            shown = ["{:.2f} [{:.2f}, {:.2f}]".format(*numbers) for numbers in found]
            print(f"{'':7s}{row['estimator']}: variance {shown[0]}, error {shown[1]}", flush=True)
    if args.json:
        lines = [json.dumps({"worlds": args.worlds, "episodes": args.episodes, **r}) for r in rows]
        args.json.write_text("\n".join(lines) + "\n")
    print(f"chains: {rows[-1]['error'][0]:.2f}x")


if __name__ == "__main__":
    main()
