"""All that a GPU has to say about this project: `python benchmarks/gpu.py`, one command, under eight minutes on one H200.

Qwen2.5-1.5B's shape, random weights, bf16 autocast as in train.py. A row is printed as each part ends, and written to `--out` as JSON.
A part that fails says so in its row, and the rest goes on; past `--limit` seconds no part is begun, and 45 seconds later the last is broken
off. `--model tiny` and small sizes go through all of it on a CPU, in bf16 too, but for peaks of memory and torch.compile.
    hae         the kernel here: does it say what it says on the CPU (to 1e-5 of the largest), and its time on both
    log-probs   largest differences of the old ones to a second pass and to the update's forward on the same micro-batches (0: the ratio
                is exactly 1), to a pass in smaller micro-batches, and to generation's own
    generate    a turn of all slots, `rollout.generate`: float32 weights under autocast, as train.py has them, against a bf16 copy of
                them, and that in HF's own loop with a static cache. floor: ms to read bf16 weights and cache once, at the copy
                bandwidth measured here
    rollout     `rollout.collect` against the same episodes in lockstep (benchmarks/rollout.py): episodes of 1 to `--longest` turns,
                evenly, in a made-up world. Random weights never write a tag, so that every response has all its tokens
    update      `train.update`, with a critic of its own, against the plain one of benchmarks/update.py (everything of all
                positions, all rows as long as the longest; on a quarter of the turns); MFU as it is counted there, without recomputation
    plan        plan.py's peaks of memory and those measured: the paper's settings, but for fewer slots and shorter responses
    compiled    the static cache again, its decode step compiled: what may take long comes last
QWEN_TOKENIZER names the folder of Qwen2.5's tokenizer; without it one is trained on the prompts. The vocabulary stays the model's.
"""

import time

START = time.perf_counter()

import argparse
import copy
import gc
import json
import math
import os
import signal
import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this folder's hae.py and rollout.py are not the library's

import torch
import transformers
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import hiper
from support import plan
import rollout
from support import cloning as scratch
import train
from benchmarks import hae as kernel, rollout as playing, update as updating
from benchmarks.update import seconds
from config import Config, read_config


class World:
    """Episode `index`, of 1 to `longest` turns; about `actions` admissible actions fill the prompt, and none changes anything."""

    longest, actions = 8, 50

    def __init__(self, split, index):
        self.index, self.turn, self.last, self.close = (
            index,
            0,
            1 + 29 * index % self.longest,
            lambda: None,
        )

    def reset(self, seed=None):
        things = range(
            self.actions * (8 + (self.index + self.turn) % 5) // 10
        )  # four fifths to six fifths of them
        return f"You are at shelf {self.turn}. On it you see nothing.", {
            "task": "put a clean mug in shelf 3",
            "task_type": "made-up",
            "won": False,
            "score": 0.0,
            "admissible": [f"take mug {n} from shelf {n % 20}" for n in things],
        }

    def step(self, action):
        self.turn += 1
        observation, info = self.reset()
        return observation, 0.0, self.turn == self.last, False, info


sys.modules["made_up"] = SimpleNamespace(
    SPLITS=("train",), IN_PROCESS=True, size=lambda split: 10**6, make=World
)


class Lab:
    """What the parts share: the flags, the device and, once `build` has run, tokenizer, sizes and policy."""

    def __init__(self, given):
        self.given, self.device, self.policy = (
            given,
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            torch.nn.Identity(),
        )
        self.gpu, self.flops, self.bandwidth = self.device.type == "cuda", math.nan, math.nan
        self.accelerator = updating.alone(self.device, True)
        self.style = rollout.Style(max_prompt=2 * given.prompt, max_response=given.response)

    def prompts(self, n):
        """First prompts of n episodes, as ids."""
        return rollout.prompts_of(
            [rollout.Seat(i, *World("train", i).reset(), self.style) for i in range(n)],
            self.tokenizer,
        )

    def actor(self, half):
        """-> (float32 weights, as train.py has them, or a bf16 copy of them; the context to generate in)"""
        if not half:
            return self.policy.actor, self.accelerator.autocast()
        actor = copy.deepcopy(self.policy.actor)
        for p in actor.parameters():  # not the rotation's frequencies, which are buffers
            p.data = p.data.bfloat16()
        self.peak()  # of making it: nobody asked
        return actor, nullcontext()

    def checkpointing(self, on):
        for backbone in (self.policy.actor, self.policy.critic):
            (
                backbone.gradient_checkpointing_enable
                if on
                else backbone.gradient_checkpointing_disable
            )()

    def clean(self):
        """Nothing of a part stays behind, not even of one that failed."""
        self.policy.zero_grad()
        self.policy.eval()
        gc.collect()
        torch.cuda.empty_cache()  # nothing without a GPU
        self.peak()

    def peak(self):
        """GB allocated at most since this was last asked; None where nobody counts."""
        if self.gpu:
            most = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
            return most


# ---- the parts: each of a Lab and its own sizes -> {what: figure} -----------------------------------------------------


def environment(lab):
    block = torch.zeros(
        2, 2 ** (28 if lab.gpu else 22), device=lab.device
    )  # on a GPU far larger than its cache
    lab.bandwidth = (
        2
        * block[0].nbytes
        / min(seconds(lambda: block[0].copy_(block[1]), lab.device) for _ in range(10))
    )
    lab.flops = updating.peak_flops(lab.device, True)
    card = (
        torch.cuda.get_device_properties(0)
        if lab.gpu
        else SimpleNamespace(name="CPU", total_memory=math.nan)
    )
    return {
        "device": card.name,
        "GB": card.total_memory / 1e9,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bf16 matmul TFLOP/s": lab.flops / 1e12,
        "copy GB/s": lab.bandwidth / 1e9,
    }


def build(lab):
    given, name = lab.given, os.environ.get("QWEN_TOKENIZER")
    World.longest, texts = (
        given.longest,
        [rollout.Seat(i, *World("train", i).reset(), lab.style).prompt() for i in range(10)],
    )
    lab.tokenizer = AutoTokenizer.from_pretrained(name) if name else scratch.train_tokenizer(texts)
    lab.tokenizer.padding_side = "left"
    bare, full = map(
        len, rollout.encode(lab.tokenizer, [hiper.plan_execute_prompt("", ""), texts[2]])
    )
    World.actions = max(1, round(World.actions * (given.prompt - bare) / (full - bare)))
    shape = plan.built_in(given.model)
    shape.vocab_size = max(shape.vocab_size, len(lab.tokenizer))
    torch.manual_seed(0)
    with torch.device(lab.device):
        lab.policy = hiper.ActorCritic(
            AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval(), "separate"
        )
    torch.nn.init.normal_(lab.policy.heads.weight, std=0.1)
    lab.sizes, lengths = plan.sizes(shape), list(map(len, lab.prompts(50)))
    return {
        "actor M": lab.sizes.actor / 1e6,
        "tokens a prompt": sum(lengths) / 50,
        "least": min(lengths),
        "most": max(lengths),
    }


def attention(lab):
    """The code that Hugging Face picks; the kernel that sdpa does, in the update and for left-padded prompts."""
    config, length = lab.policy.actor.config, lab.given.prompt
    width = lab.sizes.keys // config.num_key_value_heads
    q, k = (
        torch.zeros(
            2, heads, length, width, device=lab.device, dtype=torch.bfloat16, requires_grad=True
        )
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    sdpa = lambda *args, **more: SDPBackend(torch._fused_sdp_choice(*args, **more)).name.lower()
    padded = sdpa(
        *[q.detach()] * 3, torch.ones(2, 1, length, length, dtype=torch.bool, device=lab.device)
    )
    return {
        "code": config._attn_implementation,
        "kernel, update": sdpa(q, k, k, None, 0.0, True, enable_gqa=True),
        "prompts": padded,
    }


def advantages(lab, rows):
    x, y = (kernel.batch(rows, 50, device) for device in (lab.device, torch.device("cpu")))
    here, there = (partial(kernel.hae, **z, **kernel.SETTINGS) for z in (x, y))
    off = max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(here(), there()))
    return {
        "holds": off <= 1e-5,
        "difference": off,
        "ms": 1e3 * kernel.best(here),
        "ms on the CPU": 1e3 * kernel.best(there),
    }


@torch.no_grad()
def sampled(actor, tokenizer, prompts, n):
    """-> (n ids after each prompt, their log-probs [N, n] as generation has them)"""
    out = playing.stock(
        actor, tokenizer, prompts, n, return_dict_in_generate=True, output_logits=True
    )
    ids = out.sequences[:, -n:]
    return ids.tolist(), torch.cat(
        [x.float().log_softmax(-1).gather(-1, ids[:, t, None]) for t, x in enumerate(out.logits)], 1
    ).cpu()


def logprobs(lab, rows, tokens):
    prompts, own, autocast = lab.prompts(rows), {}, lab.accelerator.autocast
    for name, half in (("generation, bf16 copy", True), ("generation", False)):
        actor, context = lab.actor(half)
        with context:
            ids, logp = sampled(actor, lab.tokenizer, prompts, lab.given.response)
        samples = rollout.samples_of(prompts, ids, lab.tokenizer)
        with autocast():
            old, again, other = (
                rollout.score(lab.policy, samples, tokens=n).logp
                for n in (tokens, tokens, tokens // 2)
            )
        own[name] = float((logp - old).abs().max())
    learning = torch.zeros_like(old)
    for index in rollout.micro_batches([len(p) + len(r) for p, r in zip(prompts, ids)], tokens):
        with autocast():
            learning[index] = lab.policy(*samples.rows(index, lab.device)).logp.detach().cpu()
    again, learning, other = (float((x - old).abs().max()) for x in (again, learning, other))
    return {
        "holds": again == learning == 0,
        "again": again,
        "update": learning,
        "smaller micro-batches": other,
        **own,
    }


def generation(lab, slots, half=False, **cache):
    (actor, context), prompts, response, s = (
        lab.actor(half),
        lab.prompts(slots),
        lab.given.response,
        lab.sizes,
    )
    own = lambda n: rollout.generate(actor, lab.tokenizer, prompts, temperature=1.0, max_response=n)
    run = (lambda n: playing.stock(actor, lab.tokenizer, prompts, n, **cache)) if cache else own
    with context:
        _, first, warm, took = (
            seconds(lambda: run(n), lab.device) for n in (1, 1, response, response)
        )
    step, kept = (
        (took - first) / (response - 1),
        sum(map(len, prompts)) + slots * response / 2,
    )  # tokens, half way
    floor = 2 * (s.actor_linear + kept * s.layers * 2 * s.keys) / lab.bandwidth
    return {
        "turns/s": slots / took,
        "tokens/s": slots * response / took,
        "ms a step": 1e3 * step,
        "floor": 1e3 * floor,
        "reached": floor / step,
        "ms prompts": 1e3 * first,
        "s first call": warm,
        "peak GB": lab.peak(),
    }


def play(lab, slots, method, half=False):
    actor, context = lab.actor(half)
    torch.manual_seed(1)
    with envs.Runner("made_up", "train") as runner, context:
        start = time.perf_counter()
        turns, tokens, rows = method(
            actor, lab.tokenizer, runner, range(max(lab.given.slots)), slots, lab.style
        )
        took = time.perf_counter() - start
    return {
        "turns/s": turns / took,
        "tokens/s": tokens / took,
        "turns": turns,
        "rows a turn": rows / turns,
        "peak GB": lab.peak(),
    }


def update(lab, turns, tokens, checkpointing, plain=False):
    lab.checkpointing(checkpointing)
    prompt, response, policy = lab.given.prompt, lab.given.response, lab.policy
    config = Config(lr=0.0, critic_lr=0.0, tokens_per_batch=tokens, minibatch=256)
    optimizer = train.optimizer_of(policy, config)
    for n in (
        max(1, min(turns, 2 * tokens // (prompt + response))),
        turns,
    ):  # two micro-batches to get warm
        samples, credit = updating.turns(
            n, (4 * prompt // 5, 6 * prompt // 5), lab.sizes.vocab, (response, response)
        )
        start = time.perf_counter()
        with lab.accelerator.autocast():
            old = rollout.score(policy, samples, tokens=tokens)  # on the CPU: the device has ended
        scored = time.perf_counter() - start
        some, mine, patch = updating.variant(policy, samples, plain, plain)
        lab.peak()
        with patch:
            took = seconds(
                lambda: train.update(
                    some, optimizer, mine, old, old, credit, config, lab.accelerator, True
                ),
                lab.device,
            )
    total = sum(len(p) + response for p in samples.prompts)
    return {
        "seconds": took,
        "turns": turns,
        "tokens/s": total / took,
        "MFU": updating.needed(lab.sizes, samples, True) / took / lab.flops,
        "scored tokens/s": total / scored,
        "peak GB": lab.peak(),
    }


def planned(lab, slots, tokens, checkpointing):
    """One iteration at the paper's settings, every prompt and response at its longest, as the plan has them."""
    policy, config, half = (
        lab.policy,
        read_config([str(ROOT / "configs" / "alfworld-1.5b.yaml")]),
        lab.actor(True)[0],
    )
    long, said, gb = min(config.max_prompt, 3 * lab.given.prompt), lab.given.response, {}
    config = replace(
        config,
        slots=slots,
        tokens_per_batch=tokens,
        gradient_checkpointing=checkpointing,
        max_prompt=long,
        max_response=said,
        lr=0.0,
        critic_lr=0.0,
    )
    lab.checkpointing(checkpointing)
    samples, credit = updating.turns(
        max(2, 2 * tokens // (long + said)), (long, long), lab.sizes.vocab, (said, said)
    )
    prompts = [
        samples.prompts[0][n == 0 :] for n in range(slots)
    ]  # one is shorter, or there would be no mask
    reference, optimizer = (
        hiper.ActorCritic(half).to(lab.device),
        train.optimizer_of(policy, config),
    )
    train.step(policy, optimizer, config, lab.accelerator, True)  # from now on there are moments
    optimizer.register_step_pre_hook(lambda *_: gb.update(update=lab.peak()))
    lab.peak()
    with lab.accelerator.autocast():
        rollout.generate(policy.actor, lab.tokenizer, prompts, temperature=1.0, max_response=said)
        gb["rollout"] = lab.peak()
        old, ref = (
            rollout.score(p, samples, tokens=tokens, parts=("logp", "values")[:n])
            for p, n in ((policy, 2), (reference, 1))
        )
    lab.peak()
    train.update(policy, optimizer, samples, old, ref, credit, config, lab.accelerator, True)
    gb["step"] = lab.peak()
    rows = {
        phase: (size / 1e9, gb[phase] or math.nan)
        for phase, size in plan.memory(lab.sizes, config)[1].items()
    }
    return {
        f"{phase}{what}": x
        for phase, (wanted, had) in rows.items()
        for what, x in ((" planned", wanted), (" GB", had), ("'s ratio", had / wanted))
    }


def parts(given, gpu):
    """(name, function of a Lab), what matters most first."""
    (few, many), (least, most) = given.tokens, sorted(given.slots)
    yield from {"environment": environment, "build": build, "attention": attention}.items()
    yield from ((f"hae, {rows} x 50", partial(advantages, rows=rows)) for rows in (128, 4096))
    yield "log-probs", partial(logprobs, rows=min(32, most), tokens=few)
    copied, static = dict(half=True), dict(half=True, cache_implementation="static")
    for n in (most, least):
        for name, how in {
            "": {},
            ", bf16 copy": copied,
            ", bf16 copy, HF's, static": {**static, "disable_compile": True},
        }.items():
            yield f"generate, {n} slots{name}", partial(generation, slots=n, **how)
    for n in (most, least):
        for name, how in {"": playing.ours, ", lockstep": playing.lockstep}.items():
            yield f"rollout, {n} slots{name}", partial(play, slots=n, method=how)
    yield (
        f"rollout, {most} slots, bf16 copy",
        partial(play, slots=most, method=playing.ours, half=True),
    )
    for name, on in {"update": False, "update, checkpointing": True}.items():
        yield name, partial(update, turns=given.turns, tokens=few, checkpointing=on)
    yield (
        "update, checkpointing, plain",
        partial(update, turns=max(1, given.turns // 4), tokens=few, checkpointing=True, plain=True),
    )
    for n, tokens, on in (
        (most // 4 or 1, few, True),
        (most // 2 or 1, many, True),
        (most // 8 or 1, few, False),
    ):
        yield (
            f"plan, {n} slots, {tokens} tokens{', checkpointing' * on}",
            partial(planned, slots=n, tokens=tokens, checkpointing=on),
        )
    if gpu:
        yield (
            f"generate, {most} slots, bf16 copy, HF's, compiled",
            partial(generation, slots=most, **static),
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="one of plan.SHAPES")
    for name, default, text in (
        ("slots", [64, 128], "episodes in play at once; as many episodes as the most"),
        ("prompt", 750, "tokens, about"),
        ("response", 40, "tokens, at least 2"),
        ("longest", 8, "turns of an episode"),
        ("turns", 256, "of the update"),
        ("tokens", [8192, 16384], "of a micro-batch; the second for the plan alone"),
        ("limit", 420, "s; no part is begun later"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            nargs=2 if isinstance(default, list) else None,
            help=text,
        )
    parser.add_argument("--out", default=os.devnull, help="file for the rows, as JSON lines")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)

    def stop(*_):
        raise TimeoutError("broken off: no time is left")

    signal.signal(signal.SIGALRM, stop)
    lab, gone, found, widths, out = (
        Lab(given),
        lambda: time.perf_counter() - START,
        {},
        {},
        open(given.out, "w"),
    )

    def row(name, values):
        """To the file and below the others, under a head of its own where the columns change."""
        nonlocal widths
        found[name] = values = {key: x for key, x in values.items() if x is not None and x == x}
        print(json.dumps({"part": name, **values}), file=out, flush=True)
        cells = {
            key: str(x) if not isinstance(x, float) else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"
            for key, x in values.items()
        }
        if "failed" not in cells and list(cells) != list(widths):
            widths = {key: max(len(key), len(cell), 6) for key, cell in cells.items()}
            print("\n" + " " * 42 + "  ".join(f"{key:>{width}}" for key, width in widths.items()))
        print(
            f"{name:42s}"
            + "  ".join(f"{cell:>{widths.get(key, 0)}}" for key, cell in cells.items()),
            flush=True,
        )

    if not lab.gpu:
        print("no GPU here: peaks of memory and torch.compile are left out")
    for name, part in parts(given, lab.gpu):
        start = gone()
        try:
            if start > given.limit:
                raise TimeoutError("left out: no time is left")
            signal.alarm(math.ceil(given.limit + 45 - start))
            values = part(lab)
        except Exception as error:
            values = {
                "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            }
        signal.alarm(0)
        with suppress(Exception):  # which a broken context raises for everything
            lab.clean()
        row(name, {**values, "took": gone() - start})
    most, speed = (
        max(given.slots),
        {name: values["turns/s"] for name, values in found.items() if "turns/s" in values},
    )
    ours, lockstep = (speed.get(f"rollout, {most} slots{name}") for name in ("", ", lockstep"))
    fastest = max(
        (name for name in speed if name.startswith(f"generate, {most} slots")),
        key=speed.get,
        default="none",
    )
    row(
        "all",
        {
            "fastest": fastest,
            "failed parts": sum("failed" in values for values in found.values()),
            "took": gone(),
        },
    )
    print(f"gpu: {ours / lockstep:.1f}x" if ours and lockstep else "gpu: not measured")


if __name__ == "__main__":
    main()
