"""How fast are rollouts? `python benchmarks/rollout.py`, about two minutes on two CPU cores.

`rollout.collect` on 256 household episodes of mixed length in 128 slots, against the same episodes played in lockstep, as it is commonly
written: a fixed batch of 128 tasks; every slot generates in every turn until the last episode of the batch has ended, and what
finished slots say is thrown away; HF `generate` runs to the end token or to max_new_tokens. Same model, prompts, tasks, sampling
and limits.
    lockstep, own    the same, but with our `rollout.generate`, whose rows leave at their `</action>`: what remains is the waste of the
                     batch alone
The step limit of task i lies between 3 and 50, evenly. The tiny model is cloned for a few seconds first (`--demos 0`: left random), so that
its answers have the length that answers have. It was never taught to write an end token after `</action>`; a chat model was, mostly, and
then our `generate` is worth less: see the line in between. Only turns of running episodes, and tokens up to `</action>`, are counted.

Then one step of decoding against its roofline: the bytes of weights and KV cache that it has to read, at the copy bandwidth measured
here on 64 MiB. `--model NAME` does this part for another shape (plan.SHAPES, or a folder with a config.json; random weights), on
a GPU where there is one. A tiny model's 2 MB stay in the processor's cache, so its bound is loose: what it pays is Python and kernel
launches.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # this file bears the name of a module there

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import envs
import hiper
from worlds import household
from support import plan
import rollout
from support import cloning as scratch
from benchmarks.update import seconds
from config import Config

MIXED = SimpleNamespace(
    SPLITS=household.SPLITS,
    IN_PROCESS=True,
    size=household.size,
    make=lambda split, index: household.make(split, index, 3 + index * 29 % 48),
)  # 3 to 50 turns, evenly
sys.modules["mixed_household"] = MIXED


# ---- the reference ----


def stock(actor, tokenizer, prompts, longest, **more):
    """HF's `generate` with its own loop, left-padded prompts -> what it returns; more: further fields of its configuration."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(actor.device)
    config = GenerationConfig(
        max_new_tokens=longest,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return actor.generate(**batch, generation_config=config)


def generate(actor, tokenizer, prompts, style, own):
    """Prompts -> sampled responses, cut after `</action>`."""
    if own:
        return rollout.generate(
            actor, tokenizer, prompts, temperature=1.0, max_response=style.max_response
        )
    rows = stock(
        actor, tokenizer, prompts, style.max_response, eos_token_id=tokenizer.eos_token_id
    )[:, max(map(len, prompts)) :].tolist()
    table, cut = hiper.token_bytes(tokenizer), []
    for row in rows:
        said, n = b"", 0
        while n < len(row) and b"</action>" not in said and row[n] != tokenizer.eos_token_id:
            said, n = said + table[row[n]], n + 1
        cut.append(row[:n])
    return cut


def lockstep(actor, tokenizer, runner, tasks, batch, style, own=False):
    """-> (running turns, their tokens, rows generated)"""
    turns = tokens = rows = 0
    for start in range(0, len(tasks), batch):
        part = dict(enumerate(tasks[start : start + batch]))
        seats = {
            slot: rollout.Seat(part[slot], *reset, style)
            for slot, reset in runner.reset(part).items()
        }
        running = set(seats)
        while running:
            prompts = rollout.prompts_of(list(seats.values()), tokenizer)
            responses = dict(zip(seats, generate(actor, tokenizer, prompts, style, own)))
            decisions = {
                slot: hiper.parse(hiper.response_text(responses[slot], tokenizer))
                for slot in running
            }
            outcomes = runner.step({slot: decisions[slot].action for slot in sorted(running)})
            turns, rows = turns + len(running), rows + len(seats)
            tokens += sum(len(responses[slot]) for slot in running)
            running -= {
                slot
                for slot in outcomes
                if seats[slot].answer(
                    prompts[slot], responses[slot], decisions[slot], outcomes[slot]
                )
            }
    return turns, tokens, rows


def ours(actor, tokenizer, runner, tasks, slots, style):
    episodes = rollout.collect(
        actor, tokenizer, runner, tasks, slots=slots, temperature=1.0, style=style
    )
    turns = [turn for e in episodes for turn in e.turns]
    return len(turns), sum(len(turn.response) for turn in turns), len(turns)


def play(config, style, demos, episodes):
    """-> ({way to play: (turns a second)}, actor, tokenizer)"""
    with envs.Runner("household", "train") as runner:
        shown = scratch.demonstrations(
            runner, range(max(demos, 50)), plan_noise=0.9, slips=0.15, style=style, seed=0
        )
    tokenizer = scratch.train_tokenizer([text for *texts, _ in shown for text in texts])
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    policy = hiper.ActorCritic(scratch.tiny_model(tokenizer), "shared")
    if demos:
        scratch.clone(
            policy, tokenizer, shown, epochs=1, lr=2e-3, seed=0, gamma=0.95, success_reward=10.0
        )
    actor, tasks, speed = policy.actor.eval(), list(range(episodes)), {}
    print(
        f"tiny model of {sum(p.numel() for p in actor.parameters()) / 1e6:.2f} M, "
        f"{f'cloned on {demos} demonstrations' if demos else 'random'}; {episodes} episodes in {config.slots} slots, "
        f"at most {style.max_response} tokens a turn, {torch.get_num_threads()} threads"
    )
    print(
        "                  seconds   turns/s  tokens/s  turns  tokens a turn  rows generated a turn"
    )
    with envs.Runner("mixed_household", "train") as runner:
        for name, method in {
            "ours": ours,
            "lockstep": lockstep,
            "lockstep, own": lambda *a: lockstep(*a, own=True),
        }.items():
            method(actor, tokenizer, runner, [0, 1], config.slots, style)  # what is done once only
            torch.manual_seed(1)
            start = time.perf_counter()
            turns, tokens, rows = method(actor, tokenizer, runner, tasks, config.slots, style)
            took = time.perf_counter() - start
            speed[name] = turns / took
            print(
                f"{name:16s}{took:9.1f}{turns / took:10.0f}{tokens / took:10.0f}{turns:7d}{tokens / turns:15.1f}{rows / turns:15.2f}",
                flush=True,
            )
    return speed, actor, tokenizer


# ---- the roofline of decoding ----


def roofline(actor, s, slots, prompt, response, device, half):
    """Print a decode step's time beside the time to read weights and cache once."""
    block = torch.zeros(2, 2**24, device=device)  # 64 MiB are copied: as much read as written
    bandwidth = (
        2
        * block[0].nbytes
        / min(seconds(lambda: block[0].copy_(block[1]), device) for _ in range(10))
    )
    ids = torch.randint(s.vocab, (slots, prompt), device=device)

    def decode(n):
        config = GenerationConfig(
            min_new_tokens=n, max_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0
        )
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
            actor.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )

    decode(2)
    first, all_ = (
        min(seconds(lambda: decode(n), device) for _ in range(3)) for n in (1, 1 + response)
    )
    step = (all_ - first) / response
    weights = (2 if half else 4) * s.actor_linear  # under autocast: its bf16 copies
    cache = slots * (prompt + response / 2) * s.layers * s.keys * 8  # float32, see plan.kv_cache
    bound = (weights + cache) / bandwidth
    print(
        f"\ndecoding on {device.type}, {slots} rows after prompts of {prompt} tokens: {1e3 * step:.2f} ms a step, "
        f"{slots / step:.0f} tokens/s (prompts: {1e3 * first:.0f} ms)\nroofline: {weights / 1e6:.1f} MB of weights and "
        f"{cache / 1e6:.1f} MB of cache at {bandwidth / 1e9:.1f} GB/s "
        f"take {1e3 * bound:.2f} ms: decoding reaches {bound / step:.0%} of it"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default="", help="the roofline of another shape, and nothing else"
    )
    parser.add_argument("--demos", type=int, default=400)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=60, help="of the roofline, tokens")
    given = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count()))
    if given.model:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = (
            plan.built_in(given.model)
            if given.model in plan.SHAPES
            else plan.configuration(given.model)[0]
        )
        with torch.device(device):
            actor = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
        return roofline(
            actor,
            plan.sizes(shape, "shared"),
            given.slots,
            given.prompt,
            24,
            device,
            device.type == "cuda",
        )
    config = Config(slots=given.slots)
    speed, actor, _ = play(config, config.style, given.demos, given.episodes)
    roofline(
        actor,
        plan.sizes(actor.config, "shared"),
        given.slots,
        given.prompt,
        24,
        torch.device("cpu"),
        False,
    )
    own = speed["lockstep, own"]
    print(
        f"our generate is worth {own / speed['lockstep']:.1f}x, full slots {speed['ours'] / own:.1f}x"
    )
    print(f"rollout: {speed['ours'] / speed['lockstep']:.1f}x")


if __name__ == "__main__":
    main()
