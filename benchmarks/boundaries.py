"""Do the agent's segments begin where the demonstrator's plan changes?
`python benchmarks/boundaries.py RUN [RUN/start ...] [--tasks 100]`, a minute each.

The agent plays unseen tasks. Then each episode is played again, the same actions, with the world's
demonstrator beside it: at each turn it is asked which subgoal it would choose now, whatever the
agent carries. Its boundary is a turn at which that subgoal is another than a turn before.

    precision   share of the agent's boundaries at which the demonstrator has one
    recall      share of the demonstrator's boundaries at which the agent has one
    kappa       agreement of the two beyond chance (Cohen's): 0 is chance, 1 is the same
    same        share of turns at which both are after the same subgoal, in the same words

Turn 0 begins a segment for both and is left out. `--segments single every-turn` imposes segments
on an agent that was not trained with them: what is lost? RUN is a run's folder. RUN/start is its
model before training, RUN/best the one before the best save.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import torch
from transformers.utils import logging

import envs
from config import EVAL_TEMPERATURE, ConfigError
from eval import choose_tasks
from rollout import collect
from support.check_config import check
from support.distributed import fail
from support.loading import load_actor, load_run, load_tokenizer
from support.metrics import wilson_interval


def plan_of(env, actions):
    """The demonstrator's subgoal at each turn of an episode of these actions.

    It ends early where the demonstrator has no advice.
    """
    env.reset()
    plan = []
    for action in actions:
        advice = env.expert("")
        if advice is None:
            break
        plan.append(advice[1])
        env.step(action)
    return plan


def agreement(pairs):
    """pairs: per episode ([(agent's boundary, its subgoal)], the demonstrator's plan) -> dict."""
    both = ours = theirs = turns = same = 0
    for agent, plan in pairs:
        for t in range(1, len(plan)):
            mine, expected = agent[t][0], plan[t] != plan[t - 1]
            turns += 1
            ours += mine
            theirs += expected
            both += mine and expected
            same += agent[t][1] == plan[t]
    if not turns:
        raise ConfigError(
            "there is nothing to compare: no episode has a second turn at which the demonstrator "
            "has advice"
        )
    agreed = (turns - ours - theirs + 2 * both) / turns
    chance = (ours * theirs + (turns - ours) * (turns - theirs)) / turns**2
    return {
        "turns": turns,
        "agent_boundaries": ours,
        "demonstrator_boundaries": theirs,
        "precision": both / ours if ours else None,
        "recall": both / theirs if theirs else None,
        "kappa": (agreed - chance) / (1 - chance) if chance < 1 else None,
        "same": same / turns,
    }


def measure(out, count, segments="learned"):
    """-> {success and the numbers of `agreement`} of one model."""
    start = out.name == "start"
    config, folder, _ = load_run(out.parent if start else out)
    folder = out if start else folder
    config = replace(config, segments=segments)
    check(config)
    split = envs.world(config.env).SPLITS[-1]
    tasks = choose_tasks(envs.size(config.env, split), count)
    options = envs.world_options(config)
    tokenizer = load_tokenizer(folder)
    actor = load_actor(folder, config, torch.float32)
    torch.manual_seed(config.seed)
    with envs.EnvPool(config.env, split, **options) as pool:
        episodes = collect(actor, tokenizer, pool, tasks, config, temperature=EVAL_TEMPERATURE)
    pairs = []
    for episode in episodes:
        env = envs.make(config.env, split, episode.index, **options)
        if not hasattr(env, "expert"):
            raise ConfigError(f"{config.env} has no demonstrator")
        plan = plan_of(env, [turn.decision.action for turn in episode.turns])
        pairs.append(([(turn.is_segment_start, turn.subgoal) for turn in episode.turns], plan))
        env.close()
    won = sum(episode.success for episode in episodes)
    interval = wilson_interval(won, len(episodes))
    return {
        "run": str(out),
        "segments": segments,
        "tasks": len(episodes),
        "success": won / len(episodes),
        "interval": interval,
        **agreement(pairs),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="+", help="a run's folder, or its start or best")
    parser.add_argument("--tasks", type=int, default=100, help="unseen tasks [100]")
    parser.add_argument(
        "--segments", nargs="+", default=["learned"], help="as train.py's; several [learned]"
    )
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    try:
        for out, segments in product(args.out, args.segments):
            print(json.dumps(measure(out, args.tasks, segments)), flush=True)
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
