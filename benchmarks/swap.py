"""Who plans, who executes? `python benchmarks/swap.py OUT --planner expert --executor random`.

OUT is the folder of a training run. Its agent plays tasks of the last split, as in eval.py: first
alone (the reference), then with planner, executor or both replaced by

    expert    the world's demonstrator. The planner switches when a subgoal is reached or hopeless;
              the executor pursues the agent's subgoal, and where it cannot, acts at random
    random    a random subgoal at the expert's switches; a random action
    frozen    the model that training started from

The last line is the success with parts replaced over the agent's. Minutes for the tiny agent.
"""

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import torch
from transformers.utils import logging

import envs
import hiper
from config import EVAL_TEMPERATURE, ConfigError
from eval import choose_tasks
from rollout import collect
from support.distributed import fail
from support.generation import generate
from support.loading import load_actor, load_run, load_tokenizer, start_folder
from support.metrics import format_table, summarize
from support.tokens import response_text

WHO = ("expert", "random", "frozen")


class Players:
    """Planners and executors, as `rollout.collect` calls them: agents are {slot: AgentState}."""

    def __init__(self, pool, tokenizer, config, frozen=None, temperature=EVAL_TEMPERATURE):
        self.pool = pool
        self.tokenizer = tokenizer
        self.config = config
        self.frozen = frozen  # the start model
        self.temperature = temperature
        self.rng = random.Random(config.seed)

    def plan_expert(self, agents, prompts, random_subgoals=False):
        advice = self.pool.expert({slot: state.subgoal for slot, state in agents.items()})
        texts = []
        for slot, state in agents.items():
            switch, subgoal, _ = advice[slot] or (False, state.subgoal, "")  # it may not know
            if switch and random_subgoals:
                subgoal = self.rng.choice(state.info["subgoals"])
            texts.append(hiper.format_plan(subgoal, switch))
        return texts

    def plan_random(self, agents, prompts):
        return self.plan_expert(agents, prompts, random_subgoals=True)

    def plan_frozen(self, agents, prompts):
        return self._write(prompts, "</subgoal>")

    def execute_expert(self, agents, prompts, decisions):
        subgoals = {slot: state.subgoal for slot, state in agents.items()}
        for (slot, state), decision in zip(agents.items(), decisions, strict=True):
            if decision.subgoal and (decision.switch or not state.turns):  # in force from now on
                subgoals[slot] = decision.subgoal
        actions = self.execute_random(agents, prompts, decisions)
        for n, advice in enumerate(self.pool.expert(subgoals).values()):
            if advice and not advice[0]:  # it keeps the subgoal
                actions[n] = advice[2]
        return actions

    def execute_random(self, agents, prompts, decisions):
        return [self.rng.choice(state.info["admissible"]) for state in agents.values()]

    def execute_frozen(self, agents, prompts, decisions):
        plans = [hiper.format_plan(decision.subgoal, decision.switch) for decision in decisions]
        plans = self.tokenizer(plans, add_special_tokens=False)["input_ids"]
        begun = [prompt + plan for prompt, plan in zip(prompts, plans, strict=True)]
        return [hiper.parse(text).action for text in self._write(begun, "</action>")]

    def _write(self, prompts, tag):
        """What the start model writes after these prompts (ids), up to the tag."""
        limits = dict(temperature=self.temperature, max_new_tokens=self.config.max_new_tokens)
        responses = generate(self.frozen, self.tokenizer, prompts, tag=tag, **limits)
        return [response_text(response, self.tokenizer) for response in responses]


def overrides(players, planner=None, executor=None):
    """The keyword arguments of `collect` for these names of WHO."""
    plan = getattr(players, f"plan_{planner}") if planner else None
    execute = getattr(players, f"execute_{executor}") if executor else None
    return {"planner": plan, "executor": execute}


def check_roles(planner, executor, config, env):
    """ConfigError for roles that the agent or its world does not allow. env: one of the world."""
    if config.prompt == "flat":
        raise ConfigError("the agent has the flat prompt: it does not plan")
    if planner == "random" and not env.reset()[1].get("subgoals"):
        raise ConfigError(f"--planner random: {config.env} does not list its subgoals")
    if (executor == "expert" or planner in ("expert", "random")) and not hasattr(env, "expert"):
        raise ConfigError(f"{config.env} has no expert")


def play(args):
    """-> success of the agent alone and with the parts replaced."""
    config, folder, _ = load_run(args.out)
    split = envs.world(config.env).SPLITS[-1]
    tasks = choose_tasks(envs.size(config.env, split), args.episodes)
    tokenizer = load_tokenizer(folder)
    actor = load_actor(folder, config, torch.float32)
    frozen = load_actor(start_folder(config, folder.parent), config, torch.float32)
    if torch.cuda.is_available():
        actor, frozen = actor.cuda(), frozen.cuda()
    options = envs.world_options(config)
    check_roles(args.planner, args.executor, config, envs.make(config.env, **options))
    success = []
    with envs.EnvPool(config.env, split, **options) as pool:
        players = Players(pool, tokenizer, config, frozen)
        for planner, executor in ((None, None), (args.planner, args.executor)):
            torch.manual_seed(config.seed)
            how = overrides(players, planner, executor) | {"temperature": EVAL_TEMPERATURE}
            result = summarize(collect(actor, tokenizer, pool, tasks, config, **how))
            print(f"{split}: planner {planner or 'agent'}, executor {executor or 'agent'}")
            print(format_table(result), flush=True)
            success.append(result["success"])
    return success


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the --out folder of a training run")
    parser.add_argument("--planner", choices=WHO)
    parser.add_argument("--executor", choices=WHO)
    parser.add_argument("--episodes", type=int, help="N tasks of the split; default: all")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    try:
        alone, replaced = play(args)
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        sys.exit(fail(error))
    print(f"swap: {replaced / alone:.2f}x" if alone else "swap: the agent alone had no success")


if __name__ == "__main__":
    main()
