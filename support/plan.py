"""What a run will need: `python train.py --plan [CONFIG.yaml] [--flag value ...]` prints it from the model's shape, without its weights.

Parameters, memory per GPU part by part, and what fits on 24, 80 and 141 GB. Every figure is a formula below, in bytes, for the way
train.py runs on GPUs: float32 weights, bf16 autocast, fused attention (no L x L matrix in the update), prompts and responses at their
longest. GB are 10^9 bytes. Data parallel: every GPU holds all weights; only the episodes are shared out. In shards (FSDP2) a GPU holds its
part of weights, gradients and moments, and what is put together for a pass; that the residual stream is bf16 then is not counted.
"""

import inspect
from collections import namedtuple
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

import hiper
from config import UserError

GPUS, COUNTS, RESERVE = (
    (24, 80, 141),
    (1, 4, 8, 16),
    0.1,
)  # GB; how many; the share left to CUDA, NCCL and fragmentation
CHUNK = inspect.signature(hiper.token_logp).parameters["chunk"].default
FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size tie_word_embeddings".split()
SHAPES = {
    "tiny": (128, 2, 4, 2, 384, 526, True),  # scratch.py's, with the household's vocabulary
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
}
# Parameters of the actor, of a critic's own backbone (or 0) and of the heads; of actor and critic those in matrix products, which
# autocast copies; of a layer and of all that is in none, what FSDP gathers at once; and the widths that activations follow: hidden, all
# queries, all keys, the MLP, vocabulary.
Sizes = namedtuple(
    "Sizes",
    "actor critic heads actor_linear critic_linear block outside layers hidden queries keys inner vocab",
)


def built_in(name):
    """SHAPES[name] as a model configuration."""
    return Qwen2Config(**dict(zip(FIELDS, SHAPES[name])))


def configuration(model):
    """-> (the model's configuration, where it is from). UserError where there is none."""
    if not model:
        return built_in("tiny"), "the tiny model from scratch"
    try:
        return AutoConfig.from_pretrained(model), model
    except (OSError, ValueError):
        if model in SHAPES:
            return built_in(model), f"{model}, its shape as built in here: the hub was not reached"
        raise UserError(
            f"no model {model!r}: give a folder with a config.json, or a name on the hub (which must be reachable)"
        ) from None


def sizes(shape, critic="separate"):
    """Configuration -> Sizes, of an actor-critic without memory behind it. A tied embedding counts once. UserError for no causal LM."""
    try:
        with torch.device("meta"):
            policy = hiper.ActorCritic(AutoModelForCausalLM.from_config(shape), critic)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
    linear = lambda module: count(*(m for m in module.modules() if isinstance(m, torch.nn.Linear)))
    own, blocks = (
        policy.critic or torch.nn.Identity(),
        [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)],
    )
    hidden, heads, known = (
        shape.hidden_size,
        shape.num_attention_heads,
        lambda name: getattr(shape, name, None),
    )
    width = known("head_dim") or hidden // heads
    return Sizes(
        count(policy.actor),
        count(own),
        count(policy.heads),
        linear(policy.actor),
        linear(own),
        max(map(count, blocks), default=0),
        count(policy) - count(*blocks),
        shape.num_hidden_layers,
        hidden,
        width * heads,
        width * (known("num_key_value_heads") or heads),
        known("intermediate_size") or 4 * hidden,
        shape.vocab_size,
    )


# ---- bytes: float32 is 4 (weights, residual stream, norms), bf16 is 2 (whatever goes into a matrix product) -----------


def layer(s):
    """Saved by one layer, a token: two norms' input and output, five inputs in bf16, attention's q, k, v and output, four of the MLP's."""
    return (
        2 * (4 + 4) * s.hidden
        + 5 * 2 * s.hidden
        + 2 * (2 * s.queries + 2 * s.keys)
        + 4 * 2 * s.inner
    )


def activations(s, tokens, checkpointing):
    """Actor's and critic's are alive until the one backward. Checkpointing keeps each layer's input, and one layer in full at a time."""
    backbones = 2 if s.critic else 1
    kept = (
        s.layers * 4 * s.hidden * backbones + layer(s)
        if checkpointing
        else s.layers * layer(s) * backbones
    )
    passing = 2 * 4 * s.hidden + 3 * 2 * s.inner  # the gradient on its way back through a layer
    return tokens * (kept + passing + backbones * 2 * 4 * s.hidden)  # and the last norm


def logits(s, tokens):
    """One chunk in float32, its softmax, and as much again on the way back; the next chunk comes when this one has gone."""
    return 4 * 4 * min(CHUNK, tokens * s.vocab)


def kv_cache(s, slots, length):
    """Keys come out of the rotation in float32, and the cache takes the values into the same type."""
    return slots * length * s.layers * s.keys * (4 + 4)


def prefill(s, slots, prompt):
    """All prompts in one forward: residual, norm, its bf16 copy, three of the MLP's tensors; left-padding's mask; next-token logits."""
    return (
        slots * prompt * ((4 + 4 + 2) * s.hidden + 3 * 2 * s.inner)
        + 3 * slots * prompt**2
        + 4 * 4 * slots * s.vocab
    )


def together(s):
    """FSDP2's bf16: all that rollout needs (the critic's embedding comes along); and in the update what is in no layer, two layers, and
    the gradients of the first and of one layer, which are summed in float32."""
    return {
        "put together: the actor, bf16": (2 * (s.layers * s.block + s.outside), ("rollout",)),
        "put together: layer by layer": (
            2 * (s.outside + 2 * s.block) + (2 + 4) * (s.outside + s.block),
            ("update",),
        ),
    }


def memory(s, config, shards=1):
    """-> ({part: (bytes, the phases that hold it)}, {phase: bytes at its peak}) of one GPU."""
    row, always, learning = (
        config.max_prompt + config.max_response,
        ("rollout", "update", "step"),
        ("update", "step"),
    )
    tokens = max(config.tokens_per_batch, row)  # a micro-batch has one row at the least
    trained = s.actor + s.critic + s.heads
    if (
        config.optimizer == "adamw8bit" and shards == 1
    ):  # it knows no shards; a float32 scale for every 256
        moments, scratch = {"Adam's two moments, 8 bits": (2 * (1 + 4 / 256) * trained, always)}, {}
    else:  # PyTorch's, in its foreach form
        moments = {"Adam's two moments, float32": (8 * trained / shards, always)}
        scratch = {
            "Adam's scratch copy of one group": (
                4 * max(s.actor, s.critic + s.heads) / shards,
                ("step",),
            )
        }
    copies = {
        "autocast's bf16 copies, actor": (2 * s.actor_linear, ("rollout", "update")),
        "autocast's bf16 copies, critic": (2 * s.critic_linear, ("update",)),
    }
    parts = {
        "actor weights, float32": (4 * s.actor / shards, always),
        "critic and heads, float32": (4 * (s.critic + s.heads) / shards, always),
        "reference weights, bf16": (
            2 * s.actor / shards if config.kl or config.kl_rest else 0,
            always,
        ),
        **moments,
        "gradients, float32": (4 * trained / shards, learning),
        **(together(s) if shards > 1 else copies),
        f"activations, {tokens} tokens": (
            activations(s, tokens, config.gradient_checkpointing),
            ("update",),
        ),
        "a chunk of logits": (logits(s, tokens), ("update",)),
        f"KV cache, {config.slots} x {row} tokens": (kv_cache(s, config.slots, row), ("rollout",)),
        f"prefill, {config.slots} x {config.max_prompt} tokens": (
            prefill(s, config.slots, config.max_prompt),
            ("rollout",),
        ),
        **scratch,
    }
    return parts, {
        phase: sum(size for size, phases in parts.values() if phase in phases) for phase in always
    }


def fits(s, config, gpu, gpus, sharded=False):
    """-> (GB to spare on each of `gpus` GPUs of `gpu` GB, negative where short of; flags with which it would fit, "" where none do)."""
    slots = min(
        config.slots, -(-config.episodes // config.group_size // gpus) * config.group_size
    )  # its share of the episodes
    mine, room = replace(config, slots=slots), gpu * (1 - RESERVE) * 1e9
    peaks = lambda **changes: memory(s, replace(mine, **changes), gpus if sharded else 1)[1]
    peak = lambda phase, **changes: peaks(**changes)[phase]
    halves = lambda n, least: [n >> k for k in range(n.bit_length()) if n >> k >= least]
    tokens = halves(config.tokens_per_batch, config.max_prompt + config.max_response) or [
        config.tokens_per_batch
    ]
    seats = next(({"slots": n} for n in halves(slots, 1) if peak("rollout", slots=n) <= room), None)
    batch = next(
        (
            way
            for way in [{}]
            + [{"gradient_checkpointing": True, "tokens_per_batch": n} for n in tokens]
            if peak("update", **way) <= room
        ),
        None,
    )
    enough = peak("step") <= room and seats is not None and batch is not None
    flags = (
        " ".join(f"--{n} {x}" for n, x in {**seats, **batch}.items() if x != getattr(mine, n))
        if enough
        else ""
    )
    return (room - max(peaks().values())) / 1e9, flags


def show(config):
    """Print the plan of a Config. UserError where there is none to make."""
    for name in ("episodes", "slots", "tokens_per_batch", "max_prompt", "max_response"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(config, name)}")
    shape, source = configuration(config.model)
    s = sizes(shape, config.critic if config.critical else "shared")
    parts, peaks = memory(s, config)
    row = lambda name, cells: print(f"  {name:36s}" + "".join(f"{cell:>10}" for cell in cells))
    kept = s.actor if config.kl or config.kl_rest else 0
    print(
        f"{source}\nparameters: actor {s.actor:,}, critic {s.critic:,}, heads {s.heads:,}, reference {kept:,}\n"
    )
    row("memory per GPU, GB", peaks)
    for name, (size, phases) in parts.items():
        row(name, [f"{size / 1e9:.2f}" if phase in phases else "" for phase in peaks])
    row("peak", [f"{size / 1e9:.2f}" for size in peaks.values()])
    tokens = max(config.tokens_per_batch, config.max_prompt + config.max_response)
    less, full = (f"{activations(s, tokens, on) / 1e9:.2f}" for on in (True, False))
    print(f"\nActivations with gradient checkpointing and without: {less}, {full}")
    say = lambda spare, flags: (
        f"yes, {spare:.1f} GB to spare"
        if spare >= 0
        else f"no, {-spare:.1f} GB short" + f" ({flags} fits)" * bool(flags)
    )
    print(f"What fits, {RESERVE:.0%} being left to CUDA, NCCL and fragmentation.")
    for sharded, title in enumerate(
        (
            "Weights replicated, more GPUs share only the episodes",
            "In shards, configs/accelerate/fsdp.yaml",
        )
    ):
        print(title + ":")
        for gpu in GPUS:
            answers = (
                f"{n} GPU{'s' * (n > 1)} {say(*fits(s, config, gpu, n, sharded))}"
                for n in COUNTS[sharded:]
            )
            print(f"{gpu:4d} GB: " + "; ".join(answers))
