"""What a run will need: `python train.py --plan [CONFIG.yaml] [--flag value ...]`.

Prints parameters, memory per GPU, disk, and what fits on 24, 80 and 141 GB, from the model's shape.
Each figure is a formula below, in bytes, for the way train.py runs on GPUs: float32 weights, bf16
autocast, fused attention, prompts and responses at their longest. GB are 10^9 bytes.

Replicated: every GPU holds all weights, only the episodes are shared out. In shards (FSDP2): a GPU
holds its part of weights, gradients and moments, and what is gathered for a pass.
"""

import inspect
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

import hiper
from config import ConfigError
from support.check_config import check
from support.gguf import model_folder
from support.model_check import check_shape

GPUS = (24, 80, 141)  # GB
COUNTS = (1, 4, 8, 16)  # GPUs; in shards from the second on
RESERVE = 0.1  # share of a GPU that is left to CUDA, NCCL and fragmentation
CHUNK = inspect.signature(hiper.logprobs_and_entropy).parameters["chunk"].default
PHASES = ("rollout", "update", "step")
SHAPES = {  # hidden, layers, heads, key-value heads, MLP, vocabulary, tied embedding
    "tiny": (128, 2, 4, 2, 384, 526, True),  # support/cloning.py, the household's vocabulary
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
}


class Sizes(NamedTuple):
    """A model's numbers of parameters, and the widths that activations follow."""

    actor: int
    critic: int  # a backbone of its own, or 0
    heads: int
    actor_linear: int  # in matrix products: autocast copies these to bf16
    critic_linear: int
    block: int  # one layer, which FSDP gathers at once
    outside: int  # in no layer
    layers: int
    hidden: int
    queries: int  # all heads together
    keys: int
    inner: int  # MLP
    vocab: int
    adapter: int = 0  # LoRA's on one backbone
    rank: int = 0


def built_in(name):
    """SHAPES[name] as a model configuration."""
    hidden, layers, heads, kv_heads, inner, vocab, tied = SHAPES[name]
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


def model_shape(model):
    """-> (the model's configuration, where it is from). ConfigError where there is none."""
    if not model:
        return built_in("tiny"), "the tiny model from scratch"
    try:
        return AutoConfig.from_pretrained(model_folder(model)), model
    except (OSError, ValueError):
        if model in SHAPES:
            return built_in(model), f"{model}, its shape as built in: the hub was not reached"
        raise ConfigError(
            f"no model {model!r}: give a folder with a config.json, or a name on the hub (which "
            "must be reachable)"
        ) from None


def count_sizes(shape, critic="separate", rank=0):
    """Model configuration -> Sizes. A tied embedding counts once. ConfigError for no causal LM.

    rank: of LoRA's adapters, two matrices beside each linear layer inside the model's layers.
    """
    try:
        with torch.device("meta"):  # no memory is used
            policy = hiper.ActorCritic(AutoModelForCausalLM.from_config(shape), critic)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    blocks = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    head_width = getattr(shape, "head_dim", None) or hidden // heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    return Sizes(
        actor=count(policy.actor),
        critic=count(policy.critic),
        heads=count(policy.value_heads),
        actor_linear=count_linear(policy.actor),
        critic_linear=count_linear(policy.critic),
        block=max(map(count, blocks), default=0),
        outside=count(policy) - sum(map(count, blocks)),
        layers=shape.num_hidden_layers,
        hidden=hidden,
        queries=head_width * heads,
        keys=head_width * kv_heads,
        inner=getattr(shape, "intermediate_size", None) or 4 * hidden,
        vocab=shape.vocab_size,
        adapter=rank * count_rows_and_columns(policy.actor),
        rank=rank,
    )


def count(module):
    """A module's number of parameters; 0 for None."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def count_linear(module):
    """The same of its linear layers alone."""
    layers = module.modules() if module is not None else ()
    return sum(count(layer) for layer in layers if isinstance(layer, torch.nn.Linear))


def count_rows_and_columns(model):
    """Of the linear layers inside a model's layers."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    linear = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    return sum(sum(layer.weight.shape) for layer in linear)


# ---- bytes: 4 for float32 (weights, residual stream, norms), 2 for bf16 (matrix products) ------


def layer_activations(s):
    """One layer, one token: two norms' input and output, five bf16 inputs, attention, the MLP."""
    norms = 2 * (4 + 4) * s.hidden + 5 * 2 * s.hidden
    attention = 2 * (2 * s.queries + 2 * s.keys)
    kept = norms + attention + 4 * 2 * s.inner
    if s.rank:  # norms are frozen: no outputs; attention's output twice; 7 adapters' inner widths
        kept += -2 * 4 * s.hidden + 2 * s.queries + 7 * 2 * s.rank
    return kept


def activations(s, tokens, checkpointing):
    """Saved for the backward pass. Checkpointing keeps each layer's input and one whole layer."""
    backbones = 2 if s.critic else 1  # both wait for one backward pass
    if checkpointing:
        kept = s.layers * 4 * s.hidden * backbones + layer_activations(s)
    else:
        kept = s.layers * layer_activations(s) * backbones
    gradient = 2 * 4 * s.hidden + 3 * 2 * s.inner  # on its way back through one layer
    last_norm = backbones * 2 * 4 * s.hidden
    return tokens * (kept + gradient + last_norm)


def logits(s, tokens):
    """One chunk in float32 and its softmax, and as much again on the way back."""
    return 4 * 4 * min(CHUNK, tokens * s.vocab)


def kv_cache(s, rows, length):
    """Keys leave the rotation in float32, values are bf16."""
    return rows * length * s.layers * s.keys * (4 + 2)


def prefill(s, rows, prompt):
    """All prompts in one forward pass: residual, norm, MLP; padding mask; next-token logits."""
    residual = rows * prompt * ((4 + 4 + 2) * s.hidden + 3 * 2 * s.inner)
    return residual + 3 * rows * prompt**2 + 4 * 4 * rows * s.vocab


def memory(s, config, shards=1, replicas=1):
    """-> ({part: (bytes, phases that hold it)}, {phase: bytes at its peak}) of one GPU."""
    rows, row = config.num_envs, config.max_prompt_tokens + config.max_new_tokens
    tokens = max(config.micro_batch_tokens, row)  # a micro-batch has at least one row
    actor, critic = trained_sizes(s)
    trained = actor + critic
    reference = 2 * s.actor / shards if config.uses_reference else 0
    parts = {
        "actor weights, float32": (4 * s.actor / shards, PHASES),
        "critic and heads, float32": (4 * (s.critic + s.heads) / shards, PHASES),
        "reference weights, bf16": (reference, PHASES),
    }
    if s.adapter:
        parts = {
            "frozen weights of all, bf16": (2 * s.actor, PHASES),
            "adapters and heads, float32": (4 * trained, PHASES),
        }
    parts |= {
        "gradients, float32": (
            4 * trained / shards,
            ("update", "step") if replicas == 1 else PHASES,  # DDP keeps its buckets
        ),
        f"activations, {tokens} tokens": (
            activations(s, tokens, config.gradient_checkpointing),
            ("update",),
        ),
        "a chunk of logits": (logits(s, tokens), ("update",)),
        f"KV cache, {rows} x {row} tokens": (kv_cache(s, rows, row), ("rollout",)),
        f"prefill, {rows} x {config.max_prompt_tokens} tokens": (
            prefill(s, rows, config.max_prompt_tokens),
            ("rollout",),
        ),
    }
    if config.optimizer == "adamw8bit" and shards == 1:  # one float32 scale for 256 numbers
        parts["Adam's two moments, 8 bits"] = (2 * (1 + 4 / 256) * trained, PHASES)
    else:
        largest_group = max(actor, critic)
        parts["Adam's two moments, float32"] = (8 * trained / shards, PHASES)
        parts["Adam's scratch copy of one group"] = (4 * largest_group / shards, ("step",))
    if s.adapter:
        parts["autocast's bf16 copies"] = (2 * trained, ("rollout", "update"))
    elif shards == 1:
        parts["autocast's bf16 copies, actor"] = (2 * s.actor_linear, ("rollout", "update"))
        parts["autocast's bf16 copies, critic"] = (2 * s.critic_linear, ("update",))
    else:  # for an update: what is in no layer, two layers, and float32 gradients to be summed
        whole = 2 * (s.layers * s.block + s.outside)
        by_layer = 2 * (s.outside + 2 * s.block) + (2 + 4) * (s.outside + s.block)
        parts["gathered: the actor, bf16"] = (whole, ("rollout",))
        parts["gathered: layer by layer"] = (by_layer, ("update",))
    peaks = {
        phase: sum(size for size, phases in parts.values() if phase in phases) for phase in PHASES
    }
    return parts, peaks


def trained_sizes(s):
    """-> (parameters of the optimizer's two groups: the actor's, the critic's and heads')."""
    if s.adapter:
        return s.adapter, s.adapter * bool(s.critic) + s.heads
    return s.actor, s.critic + s.heads


def disk(s, config):
    """-> (bytes of a checkpoint, bytes of a run at its largest: three of them and three actors)."""
    trained = sum(trained_sizes(s))
    moments = 2 * (1 + 4 / 256) if config.optimizer == "adamw8bit" else 8
    checkpoint = (4 + moments) * trained
    return checkpoint, 3 * checkpoint + 3 * 4 * s.actor


# ---- what fits ---------------------------------------------------------------------------------


def fits(s, config, gpu, gpus, sharded=False):
    """-> (GB to spare on each of `gpus` GPUs of `gpu` GB, flags with which it would fit or "")."""
    mine = replace(config, num_envs=config.slots(gpus))
    room = gpu * (1 - RESERVE) * 1e9
    shards, replicas = (gpus, 1) if sharded else (1, gpus)

    def spare(changes):
        return room - max(memory(s, replace(mine, **changes), shards, replicas)[1].values())

    flags = ""
    for changes in smaller_settings(mine):
        if spare(changes) >= 0:
            flags = " ".join(f"--{n} {x}" for n, x in changes.items() if x != getattr(mine, n))
            break
    return spare({}) / 1e9, flags


def smaller_settings(config):
    """Changes of a Config that need less and less memory, the first of them none."""
    yield {}
    tokens, row = config.micro_batch_tokens, config.max_prompt_tokens + config.max_new_tokens
    for k in range(16):
        yield {
            "gradient_checkpointing": True,
            "micro_batch_tokens": min(tokens, max(tokens >> k, row)),
            "num_envs": max(config.num_envs >> k, 1),
        }


# ---- the command -------------------------------------------------------------------------------


def show(config):
    """Print the plan of a Config. ConfigError where there is none to make."""
    check(replace(config, optimizer="adamw"))  # bitsandbytes need not be here
    shape, source = model_shape(config.model)
    check_shape(shape, config.model)
    s = count_sizes(shape, config.critic if config.has_critic else "none", config.lora)
    reference = s.actor if config.uses_reference else 0
    print(source)
    if config.lora:
        actor, critic = trained_sizes(s)
        print(f"parameters: {s.actor:,} frozen; trained: actor {actor:,}, critic {critic:,}\n")
    else:
        print(
            f"parameters: actor {s.actor:,}, critic {s.critic:,}, heads {s.heads:,}, "
            f"reference {reference:,}\n"
        )
    parts, peaks = memory(s, config)
    show_row("memory per GPU, GB", PHASES)
    for name, (size, phases) in parts.items():
        show_row(name, [f"{size / 1e9:.2f}" if phase in phases else "" for phase in PHASES])
    show_row("peak", [f"{size / 1e9:.2f}" for size in peaks.values()])
    kept, whole = disk(s, config)
    print(
        f"\nDisk: {kept / 1e9:.1f} GB a checkpoint; {whole / 1e9:.1f} GB in all, at the moment "
        "when a third one is written."
    )
    print(f"\nWhat fits, {RESERVE:.0%} being left to CUDA, NCCL and fragmentation.")
    print("Weights replicated, more GPUs share only the episodes:")
    show_fits(s, config, COUNTS, sharded=False)
    if not config.lora:
        print("In shards, configs/accelerate/fsdp.yaml:")
        show_fits(s, config, COUNTS[1:], sharded=True)


def show_row(name, cells):
    print(f"  {name:36s}" + "".join(f"{cell:>10}" for cell in cells))


def show_fits(s, config, counts, sharded):
    """One line per size of GPU."""
    for gpu in GPUS:
        answers = []
        for gpus in counts:
            spare, flags = fits(s, config, gpu, gpus, sharded)
            answer = f"yes, {spare:.1f} GB to spare"
            if spare < 0:
                answer = f"no, {-spare:.1f} GB short" + (f" ({flags} fits)" if flags else "")
            answers.append(f"{gpus} GPU{'s' * (gpus > 1)} {answer}")
        print(f"{gpu:4d} GB: " + "; ".join(answers))
