"""How fast are rollouts? `python benchmarks/rollout.py`, a few minutes on two CPU cores.

`rollout.collect` plays household episodes of mixed length (step limits from 3 to 50, evenly).
The reference plays the same episodes in lockstep, as it is commonly written: a fixed batch of
tasks; every row generates until the last episode of the batch has ended, and what ended episodes
say is thrown away; HF `generate` runs to an end token or to max_new_tokens. In between stands

    lockstep, stop    lockstep with our `generate`, which ends a row at its `</action>`

Same model, tasks, prompts, sampling and limits. The three take turns, round after round, so that
a slow moment of the machine meets all of them. Counted are turns of running episodes. The tiny
model is cloned first, so that its responses are as long as real ones. It was never taught to write
an end token after `</action>`; a chat model was, mostly, and gains less from stopping there.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import ModuleType

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import torch
from transformers import GenerationConfig
from transformers.utils import logging

import envs
import hiper
from rollout import AgentState, build_prompts, collect
from support.arguments import read_config
from support.cloning import clone, demonstrations, tiny_model, train_tokenizer
from support.generation import generate
from support.tokens import response_text
from worlds import household


def make_mixed(split, index):
    """The household with a step limit from 3 to 50 that depends on the task."""
    return household.make(split, index, max_steps=3 + index * 29 % 48)


mixed = ModuleType("mixed_household")  # a world, see envs.py
mixed.SPLITS = household.SPLITS
mixed.size = household.size
mixed.make = make_mixed
sys.modules["mixed_household"] = mixed


# ---- the reference -----------------------------------------------------------------------------


def hf_generate(actor, tokenizer, prompts, max_new_tokens, **more):
    """HF `generate` as it is -> what it returns. more: fields of its configuration."""
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(actor.device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return actor.generate(**inputs, generation_config=settings)


def plain_responses(actor, tokenizer, prompts, max_new_tokens):
    """Texts by `hf_generate`, each up to `</action>`."""
    ids = hf_generate(actor, tokenizer, prompts, max_new_tokens)
    width = max(map(len, prompts))
    texts = [response_text(row, tokenizer) for row in ids[:, width:].tolist()]
    return [text.partition("</action>")[0] + "</action>" for text in texts]


def stopped_responses(actor, tokenizer, prompts, max_new_tokens):
    """Texts by our `generate`."""
    responses = generate(actor, tokenizer, prompts, temperature=1.0, max_new_tokens=max_new_tokens)
    return [response_text(response, tokenizer) for response in responses]


def lockstep(actor, tokenizer, pool, tasks, config, write=plain_responses):
    """Play the tasks in fixed batches -> (turns of running episodes, rows generated)."""
    turns = rows = 0
    for start in range(0, len(tasks), config.num_envs):
        part = dict(enumerate(tasks[start : start + config.num_envs]))
        resets = pool.reset(part)
        agents = {slot: AgentState(config, part[slot], *resets[slot]) for slot in part}
        running = list(agents)
        while running:
            prompts = build_prompts(list(agents.values()), tokenizer)
            texts = write(actor, tokenizer, prompts, config.max_new_tokens)
            decisions = dict(zip(agents, map(hiper.parse, texts), strict=True))
            outcomes = pool.step({slot: decisions[slot].action for slot in running})
            for slot, outcome in outcomes.items():
                agents[slot].record_turn([], [], decisions[slot], outcome)
            turns += len(running)
            rows += len(agents)
            running = [slot for slot in running if not agents[slot].ended]
    return turns, rows


def lockstep_with_stop(actor, tokenizer, pool, tasks, config):
    return lockstep(actor, tokenizer, pool, tasks, config, write=stopped_responses)


def slot_refill(actor, tokenizer, pool, tasks, config):
    """Ours -> (turns, rows generated), which are the same."""
    turns = sum(len(episode.turns) for episode in collect(actor, tokenizer, pool, tasks, config))
    return turns, turns


METHODS = {
    "ours": slot_refill,
    "lockstep, stop": lockstep_with_stop,
    "lockstep": lockstep,
}


# ---- measuring ---------------------------------------------------------------------------------


def cloned_agent(config, episodes):
    """-> (actor, tokenizer), cloned on so many demonstrations."""
    with envs.EnvPool("household") as pool:
        examples = demonstrations(pool, range(episodes), config, **household.DEMONSTRATOR)
    tokenizer = train_tokenizer([text for *texts, _ in examples for text in texts])
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    policy = hiper.ActorCritic(tiny_model(tokenizer), "shared")
    clone(policy, tokenizer, examples, config)
    return policy.actor.eval(), tokenizer


def measure(actor, tokenizer, config, episodes, rounds):
    """Play `rounds` times `episodes` tasks with each method -> {method: [seconds, turns, rows]}."""
    totals = defaultdict(lambda: [0.0, 0, 0])
    with envs.EnvPool("mixed_household") as pool:
        for method in METHODS.values():
            method(actor, tokenizer, pool, [0, 1], config)  # what is done once only
        for k in range(rounds):
            tasks = range(k * episodes, (k + 1) * episodes)
            for name, method in METHODS.items():
                torch.manual_seed(k)
                start = time.perf_counter()
                turns, rows = method(actor, tokenizer, pool, tasks, config)
                seconds = time.perf_counter() - start
                pairs = zip(totals[name], (seconds, turns, rows), strict=True)
                totals[name] = [total + new for total, new in pairs]
    return totals


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demos", type=int, default=200, help="demonstrations that are cloned")
    parser.add_argument("--num_envs", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=192, help="in one round")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    config = replace(read_config([]), num_envs=args.num_envs)
    actor, tokenizer = cloned_agent(config, args.demos)
    totals = measure(actor, tokenizer, config, args.episodes, args.rounds)
    print(
        f"{args.rounds} rounds of {args.episodes} episodes, {args.num_envs} at once, at most "
        f"{config.max_new_tokens} tokens a turn, {torch.get_num_threads()} threads\n"
        "                  seconds   turns/s    turns   rows generated a turn"
    )
    speed = {}
    for name, (seconds, turns, rows) in totals.items():
        speed[name] = turns / seconds
        print(f"{name:16s}{seconds:9.1f}{speed[name]:10.0f}{turns:9d}{rows / turns:15.2f}")
    stop = speed["lockstep, stop"]
    print(
        f"stopping at </action> gives {stop / speed['lockstep']:.1f}x, "
        f"refilling slots {speed['ours'] / stop:.1f}x"
    )
    print(f"rollout: {speed['ours'] / speed['lockstep']:.1f}x")


if __name__ == "__main__":
    main()
