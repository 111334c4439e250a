"""Which credit is right? `python benchmarks/referee.py OUT`, ten minutes for the tiny agent.

The agent of a run plays training tasks, eight episodes each. Then the true advantages are measured
at random turns of these episodes: the world is set back to that turn and the rest is played K times
with a growing part of the turn kept as it was written.

    Q0   nothing kept: the value of the state
    Q1   the switch kept                       switch:  A = Q1 - Q0
    Q2   switch and subgoal kept               subgoal: A = Q2 - Q1
    Q3   the whole turn kept                   action:  A = Q3 - Q2

Every estimator sees the ordinary batch of these episodes and the run's critic. The table has the
correlation of what it puts on a decision's tokens with that decision's true advantage.

    noise    the truth is a mean over K episodes: two halves of them correlate less than 1. The
             correlations are divided by the square root of the truth's reliability
    error    mean squared error over the true advantage's mean square, both without the noise of
             the truth; 1 is what an estimate of 0 has. Only for estimates in the return's units
    [a, b]   95 % interval, bootstrapped over tasks, without draws whose truth is only noise

The truth counts nothing after the step limit, so the estimators do not bootstrap there. Only for
worlds whose environments can be copied. `--start` judges before training.
"""

import argparse
import copy
import json
import os
import random
import shutil
import sys
import tempfile
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import torch
from accelerate.utils import set_seed
from tqdm import tqdm

import envs
import hiper
from benchmarks.alignment import GROUP, advantages_of, hiper_settings
from benchmarks.variance import restore
from config import DECISIONS, ConfigError
from rollout import AgentState, build_prompts, make_batch, respond
from support.distributed import fail, make_accelerator
from support.loading import load_run
from support.scoring import micro_batches, score
from support.tokens import response_text

ESTIMATORS = {
    "HAE 0.9 0.7": hiper_settings(0.9, 0.7),
    "HAE 0.9 0.7, closed form": hiper_settings(0.9, 0.7, switch_advantage="closed_form"),
    "HAE 1.0 0.95": hiper_settings(1.0, 0.95),
    "HAE 0.5 0.5": hiper_settings(0.5, 0.5),
    "flat GAE 0.95": dict(method="ppo", gae_lambda=0.95),
    "flat GAE 0.65": dict(method="ppo", gae_lambda=0.65),
    "RLOO": dict(method="rloo"),
    "GRPO": dict(method="grpo"),
    "GiGPO": dict(method="gigpo"),
    "HGPO": dict(method="hgpo"),
    "GAGPO 0.65": dict(method="gagpo", gae_lambda=0.65),
    "BEACON": dict(method="beacon"),
}
# These divide by standard deviations of returns, so their advantages are in other units.
OTHER_UNITS = ("GRPO", "GiGPO", "HGPO", "BEACON")


# ---- playing from any state --------------------------------------------------------------------


@dataclass
class Player:
    """One running episode: its environment, and what the agent remembers."""

    env: object
    state: AgentState
    limit: int | None  # of steps, where the world has none of its own

    def copy(self):
        state = replace(self.state, turns=list(self.state.turns), past=deque(self.state.past))
        return Player(copy.deepcopy(self.env), state, self.limit)

    def act(self, prompt, response, decision):
        *outcome, truncated, info = self.env.step(decision.action)
        truncated = truncated or len(self.state.turns) + 1 == self.limit
        self.state.record_turn(prompt, response, decision, (*outcome, truncated, info))


@torch.no_grad()
def play(run, players, begun, watch=None):
    """Play all to their ends, in place. begun: what each first response begins with.

    watch(n, player): called before each turn of player n.
    """
    live = list(range(len(players)))
    while live:
        prompts = build_prompts([players[n].state for n in live], run.tokenizer)
        prefixes = [begun[n] for n in live]
        begun = [""] * len(players)
        responses = respond(run.model.actor, run.tokenizer, prompts, prefixes, 1.0, run.config)
        for n, prompt, response in zip(live, prompts, responses, strict=True):
            if watch:
                watch(n, players[n])
            decision = hiper.parse(response_text(response, run.tokenizer))
            players[n].act(prompt, response, decision)
        live = [n for n in live if not players[n].state.ended]


def new_player(run, index, **options):
    env = envs.make(run.config.env, run.pool.split, index, **options)
    limit, _ = envs.step_limit(envs.world(run.config.env), options)
    return Player(env, AgentState(run.config, index, *env.reset()), limit)


def play_batch(run, tasks):
    """GROUP episodes of each task -> (players at their ends, {(episode, turn): Player then})."""
    options = envs.world_options(run.config)
    players = [new_player(run, task, **options) for task in tasks for _ in range(GROUP)]
    before = {}
    play(
        run,
        players,
        [""] * len(players),
        lambda n, player: before.update({(n, len(player.state.turns)): player.copy()}),
    )
    return players, before


# ---- the truth ---------------------------------------------------------------------------------


def alternatives(player, turn, text):
    """The four starts of a turn -> [(Player, what its first response begins with)] for Q0 .. Q3."""
    done = player.copy()
    done.act(turn.prompt, turn.response, turn.decision)
    return [
        (player, ""),
        (player, text[: text.index("</switch>") + len("</switch>")]),
        (player, text[: text.index("</subgoal>") + len("</subgoal>")]),
        (done, ""),
    ]


def measure(run, player, turn, rollouts):
    """-> [4, K] returns from this turn on, for Q0 .. Q3."""
    first = len(player.state.turns)
    text = response_text(turn.response, run.tokenizer)
    starts = [pair for pair in alternatives(player, turn, text) for _ in range(rollouts)]
    players = [start.copy() for start, _ in starts]
    open_ones = [n for n, p in enumerate(players) if not p.state.ended]
    play(run, [players[n] for n in open_ones], [starts[n][1] for n in open_ones])
    gamma = run.config.gamma
    returns = [
        sum(gamma**k * later.reward for k, later in enumerate(p.state.turns[first:]))
        for p in players
    ]
    return torch.tensor(returns).view(4, rollouts)


def decisions_of(turn, t):
    """The decisions that were the agent's to take at turn t."""
    return {"switch": t > 0, "subgoal": turn.is_segment_start, "action": True}


# ---- the estimators ----------------------------------------------------------------------------


def estimate(run, batch):
    """{estimator: {decision: advantages [B, T], not normalised}}"""
    config = run.config
    with_v_keep = replace(run, config=replace(config, switch_advantage="closed_form"))
    batches = micro_batches(batch.samples.total_lengths(), config.micro_batch_tokens)
    old, _, end_values, v_keep = score(with_v_keep, batch, batches)
    result = {}
    for name, changes in ESTIMATORS.items():
        raw = advantages_of(batch, old, end_values, v_keep, replace(config, **changes)).raw
        result[name] = {kind: raw.get(f"A_{kind}", raw.get("A")) for kind in DECISIONS}
    return result


# ---- the comparison ----------------------------------------------------------------------------


def correlation(x, y):
    """Pearson's, of two [M]."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12))


def reliability(halves):
    """Of the mean of two measurements [M, 2]: 2 r / (1 + r), r their correlation."""
    r = correlation(halves[:, 0], halves[:, 1])
    return 2 * r / (1 + r) if r > 0 else 0.0


def relative_error(estimates, halves):
    """Mean squared error over the truth's mean square, both without the noise of the truth.

    NaN where the truth is nothing but noise.
    """
    if reliability(halves) <= 0:
        return float("nan")
    truth = halves.mean(1)
    noise = (halves[:, 0] - halves[:, 1]).square().mean() / 4  # of the mean of two
    error = (estimates - truth).square().mean() - noise
    return float(error / (truth.square().mean() - noise))


def corrected_correlation(estimates, halves):
    """Correlation with the truth, corrected for its noise; NaN where the truth is only noise."""
    trust = reliability(halves)
    if trust <= 0:
        return float("nan")
    return correlation(estimates, halves.mean(1)) / trust**0.5


def with_interval(statistic, estimates, halves, tasks, draws=1000):
    """-> (statistic(estimates, halves), and the low and high end of its 95 % interval).

    estimates: [M]; halves: [M, 2], two independent measurements of the truth; tasks: [M] ints, the
    units of the bootstrap.
    """
    rng = random.Random(0)
    rows_of = {task: (tasks == task).nonzero()[:, 0] for task in tasks.unique().tolist()}
    found = []
    for _ in range(draws):
        drawn = rng.choices(list(rows_of), k=len(rows_of))
        rows = torch.cat([rows_of[task] for task in drawn])
        found.append(statistic(estimates[rows], halves[rows]))
    low, high = torch.tensor(found).nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return statistic(estimates, halves), low, high


def judge(run, args):
    """Play, measure and compare -> a dictionary for people and JSON."""
    set_seed(run.config.seed)
    rng = random.Random(run.config.seed)
    tasks = rng.sample(range(envs.size(run.config.env, run.pool.split)), args.tasks)
    players, before = play_batch(run, tasks)
    episodes = [p.state.to_episode(p.state.turns[-1].prompt) for p in players]
    batch = make_batch(episodes, run.tokenizer, GROUP)
    estimated = estimate(run, batch)
    places = [
        (b, t)
        for b, episode in enumerate(episodes)
        for t, turn in enumerate(episode.turns)
        if turn.decision.valid
    ]
    rows = {kind: [] for kind in DECISIONS}  # (b, t, half, half)
    for b, t in tqdm(rng.sample(places, min(args.turns, len(places))), unit="turn", disable=None):
        turn = episodes[b].turns[t]
        q = measure(run, before[b, t], turn, args.rollouts)  # [4, K]
        halves = q.view(4, 2, -1).mean(2).diff(dim=0)  # [3, 2]
        for kind, pair in zip(DECISIONS, halves.tolist(), strict=True):
            if decisions_of(turn, t)[kind]:
                rows[kind].append((b, t, *pair))
    if min(map(len, rows.values())) < 3:
        raise ConfigError("too few valid turns were measured to compare: raise --turns or --tasks")
    result = {
        "success": sum(episode.success for episode in episodes) / len(episodes),
        "episodes": len(episodes),
        "rollouts": args.rollouts,
        "turns": {kind: len(found) for kind, found in rows.items()},
        "reliability": {},
        "spread": {},
        "correlation": {name: {} for name in ESTIMATORS},
        "error": {name: {} for name in ESTIMATORS if name not in OTHER_UNITS},
        "measured": {},
    }
    for kind, found in rows.items():
        table = torch.tensor(found)  # [M, 4]
        b, t = table[:, 0].long(), table[:, 1].long()
        halves = table[:, 2:]
        result["reliability"][kind] = reliability(halves)
        result["spread"][kind] = float(halves.mean(1).std())
        columns = {"task": [tasks[n] for n in (b // GROUP).tolist()]}
        columns.update({"episode": b.tolist(), "turn": t.tolist(), "halves": halves.tolist()})
        result["measured"][kind] = columns
        for name, advantages in estimated.items():
            found = advantages[kind][b, t]
            columns[name] = [round(x, 4) for x in found.tolist()]
            judged = found, halves, b // GROUP
            result["correlation"][name][kind] = with_interval(corrected_correlation, *judged)
            if name in result["error"]:
                result["error"][name][kind] = with_interval(relative_error, *judged)
    return result


def show(result):
    print(
        f"{result['episodes']} episodes, {result['success']:.0%} with success; the truth from "
        f"{result['rollouts']} episodes per alternative"
    )
    print(f"{'':34s}" + "".join(f"{kind:>22s}" for kind in DECISIONS))
    rows = {
        "turns": {k: f"{n}" for k, n in result["turns"].items()},
        "std of the true advantage": {k: f"{x:.2f}" for k, x in result["spread"].items()},
        "reliability of the truth": {k: f"{x:.2f}" for k, x in result["reliability"].items()},
    }
    judged = dict(result["correlation"])
    judged.update({f"error of {name}": by_kind for name, by_kind in result["error"].items()})
    for name, by_kind in judged.items():
        rows[name] = {k: "{:.2f} [{:.2f}, {:.2f}]".format(*found) for k, found in by_kind.items()}
    for name, cells in rows.items():
        print(f"{name:34s}" + "".join(f"{cells[kind]:>22s}" for kind in DECISIONS))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("out", type=Path, help="the --out folder of a training run")
    parser.add_argument("--start", action="store_true", help="before training: the start model")
    parser.add_argument("--tasks", type=int, default=32, help=f"with {GROUP} episodes each")
    parser.add_argument("--turns", type=int, default=200, help="at which the truth is measured")
    parser.add_argument("--rollouts", type=int, default=32, help="episodes per alternative, even")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    args = parser.parse_args(argv)
    if args.rollouts < 2 or args.rollouts % 2:
        sys.exit(fail("--rollouts must be even: the noise of the truth is measured by two halves"))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            config, _, _ = load_run(args.out)
            config = replace(config, method="hiper", kl_coef=0.0, untrained_kl_coef=0.0)
            config = replace(config, bootstrap=False)  # the truth counts nothing after the end
            folder = args.out
            if args.start:  # a run without a checkpoint begins with the start model
                folder = Path(scratch)
                shutil.copytree(args.out / "start", folder / "start")
            with envs.EnvPool(config.env, **envs.world_options(config)) as pool:
                run, iteration = restore(config, folder, pool, make_accelerator())
                result = judge(run, args)
        except (ConfigError, OSError, ValueError, RuntimeError) as error:
            sys.exit(fail(error))
    print(f"{args.out} after {iteration} iterations")
    show(result)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps({"run": str(args.out), "iteration": iteration, **result}) + "\n")
    ours = result["correlation"]["HAE 0.9 0.7"]["subgoal"][0]
    flat = result["correlation"]["flat GAE 0.65"]["subgoal"][0]
    print("the subgoal's credit: correlation of HAE with the truth over that of flat GAE")
    print(f"referee: {ours / flat:.1f}x" if flat > 0 else "referee: flat GAE has no correlation")


if __name__ == "__main__":
    main()
