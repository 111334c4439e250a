"""One small HiPER iteration with a real LLM, for benchmarks/audit.py, and its record."""

import copy
import os
import random
import sys
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM

import envs
import hiper
import train
from config import ConfigError
from rollout import collect
from support.arguments import read_config
from support.cloning import train_tokenizer
from support.distributed import prepare, prepare_reference
from support.gguf import model_folder
from support.loading import load_actor, load_tokenizer, make_optimizer
from support.memory_plan import SHAPES, built_in

HEADS, KINDS = ("high", "low", "switch"), ("switch", "subgoal", "action")
SAMPLE = 2**14  # entries of each parameter's gradient that are compared

# ---- one iteration -----------------------------------------------------------------------------


def make_config(model):
    """The paper's settings, small; sdpa, and no checkpointing until it is asked for.

    On a CPU with the short prompt and 4 turns, on a GPU with the paper's prompt and 32.
    """
    gpu = torch.cuda.is_available()
    small = f"--episodes {16 if gpu else 2} --num_envs 8 --short_prompt {str(not gpu).lower()}"
    small += " --env household --iterations 1 --epochs 2 --lr 1e-4 --critic_lr 1e-5"
    small += f" --max_new_tokens 1 --micro_batch_tokens {4096 if gpu else 256}"
    small += " --minibatch_size 1000 --gradient_checkpointing false --attention sdpa --env_options"
    file = str(ROOT / "configs" / "alfworld-1.5b.yaml")
    return read_config([file, "--model", model, *small.split(), '{"max_steps": 2}'])


def load(config):
    """-> (actor, tokenizer). Where the hub has none: SHAPES' shape, random weights."""
    try:
        folder = model_folder(config.model)
        return load_actor(folder, config, torch.float32), load_tokenizer(folder)
    except ConfigError:
        if config.model not in SHAPES:
            raise
    env = envs.make("household")
    observation, info = env.reset()
    prompt = hiper.plan_execute_prompt(info["task"], observation, "", (), info["admissible"])
    folder = os.environ.get("QWEN_TOKENIZER")
    tokenizer = load_tokenizer(folder) if folder else train_tokenizer([prompt])
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    shape = built_in(config.model)
    shape.vocab_size = max(shape.vocab_size, len(tokenizer))
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval(), tokenizer


def make_models(actor, accelerator):
    """-> (ActorCritic with value heads, a reference whose weights differ a little)."""
    policy = hiper.ActorCritic(actor, "separate")
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    reference = hiper.ActorCritic(copy.deepcopy(actor), "none")
    noise = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(policy.value_heads.weight, std=0.05, generator=noise)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.03 * p.std() * torch.randn(p.shape, generator=noise)
    return policy.to(accelerator.device), reference.to(accelerator.device, half)


def write_answers(agents, prompts):
    """A planner for `rollout.collect`: whole answers, since the model does not know the format.

    They switch or keep, in two styles, and every fifth is malformed.
    """
    answers = []
    for state in agents.values():
        number = 2 * state.place + len(state.turns)
        rng = random.Random(number)
        keeps = bool(state.subgoal) and number % 4 == 1
        subgoal = state.subgoal if keeps else rng.choice(state.info["subgoals"])
        action = rng.choice(state.info["admissible"])
        answer = hiper.format_response(not keeps, subgoal, action)
        if number % 3 == 0:
            answer = answer.replace("><", ">\n<")
        answers.append("I do not know." if number % 5 == 2 else answer)
    return answers


def iterate(policy, reference, tokenizer, config, accelerator, episodes=None):
    """One train.train_iteration, played by `write_answers` or on given episodes -> dict.

    gradients: of the first step, after clipping, a part of each parameter's; weights: after it,
    where a second epoch is to be checked.
    """
    policy = copy.deepcopy(policy)
    for backbone in (policy.actor, policy.critic):
        backbone.set_attn_implementation(config.attention)
        if config.gradient_checkpointing:
            backbone.activation_checkpointing_enable()
    kept = {}

    def before_step(*_):
        kept.setdefault("gradients", [part(p.grad) for p in policy.parameters()])

    def after_step(*_):
        kept.setdefault("weights", {n: x.clone() for n, x in policy.state_dict().items()})

    optimizer = make_optimizer(policy, config)
    if config.epochs == 1:  # the gradient is all that is asked for: no moments in memory
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, lr=0.0)
    else:
        optimizer.register_step_post_hook(after_step)
    optimizer.register_step_pre_hook(before_step)
    prepared, optimizer = prepare(policy, optimizer, accelerator)
    reference = prepare_reference(reference, accelerator)
    rank, count = accelerator.process_index, accelerator.num_processes
    play = partial(collect, planner=write_answers)
    if episodes:
        play = mock.Mock(return_value=episodes[rank::count])
    with (
        envs.EnvPool("household", "train", **config.env_options) as pool,
        mock.patch.object(train, "collect", play),
    ):
        run = train.Run(
            config, accelerator, pool, tokenizer, prepared, policy, optimizer, reference
        )
        metrics, episodes, old, advantages = train.train_iteration(run, 0)
    accelerator.free_memory()
    return dict(kept, metrics=flat(metrics), episodes=episodes, old=old, advantages=advantages)


def part(gradient):
    """At most about SAMPLE entries, evenly spread."""
    return gradient.flatten()[:: gradient.numel() // SAMPLE + 1].float().cpu()


def flat(metrics):
    """Without what depends on the clock; explained variances and families by name."""
    numbers = {}
    for name, value in metrics.items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        numbers.update({f"{name}.{key}" if key else name: number for key, number in parts})
    return {n: v for n, v in numbers.items() if not n.startswith(("seconds", "turns_per_second"))}


def digest(made):
    """What the ways are compared by: turns (a list for each episode), gradients, metrics."""
    old, advantages = made["old"], made["advantages"]
    rows = iter(range(len(old.v_high)))
    episodes = []
    for b, episode in enumerate(made["episodes"]):
        episodes.append([])
        for t, turn in enumerate(episode.turns):
            n, here = next(rows), slice(len(turn.response))
            pairs = zip(advantages.advantages[n, here], advantages.token_mask[n, here], strict=True)
            episodes[b].append(
                {
                    "logprobs": old.logprobs[n, here].tolist(),
                    "entropy": old.entropy[n, here].tolist(),
                    "values": {head: float(old.value(head)[n]) for head in HEADS},
                    "raw": {kind: float(advantages.raw[f"A_{kind}"][b, t]) for kind in KINDS},
                    "advantages": [float(a) if trained else None for a, trained in pairs],
                }
            )
    return {"episodes": episodes, "gradients": made["gradients"], "metrics": made["metrics"]}


def turns_of(digested):
    return [turn for episode in digested["episodes"] for turn in episode]
