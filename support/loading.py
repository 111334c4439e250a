"""What a run starts from: the checks of its world and model, the policy and its optimizer."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import hiper
from config import ConfigError
from support import lora
from support.arguments import read_config, read_settings
from support.check_config import check
from support.cloning import HEADS, clone_expert
from support.distributed import LONG, meet
from support.gguf import model_folder
from support.model_check import check_model, find_not_finite
from support.world_check import try_world


def check_world_and_model(config):
    """ConfigError where the world or the model cannot be had, before anything is written."""
    info = try_world(config)
    if (config.checklist or config.method == "beacon") and "progress" not in info:
        flag = "--checklist" if config.checklist else "--method beacon"
        raise ConfigError(
            f"{flag} needs a world that reports subtasks (info['progress']), and "
            f"{config.env} does not"
        )
    if config.lora:
        lora.check_peft()
    if config.model:
        check_model(config)


def load_policy(config, out, pool, accelerator):
    """-> (ActorCritic, tokenizer, reference or None), on the CPU.

    With `--bc_episodes` the start model is a clone of the expert in out/start, made here where it
    is not there yet.
    """
    start = start_folder(config, out)
    if config.bc_episodes and not (start / "config.json").exists():
        if accelerator.is_main_process:
            clone_expert(config, out, pool, accelerator, _load_pretrained(config))
        meet(accelerator, "the cloning", LONG)
    tokenizer = load_tokenizer(start)
    torch.manual_seed(config.seed)
    critic = config.critic if config.has_critic else "none"
    half = half_precision(accelerator)
    actor = load_actor(start, config, torch.float32)
    check_output_layer(actor, config)
    reference = None
    if config.lora:
        policy, reference = lora.make_policy(actor, critic, config.lora, half)
    else:
        policy = hiper.ActorCritic(actor, critic)
        if config.uses_reference:
            reference = hiper.ActorCritic(load_actor(start, config, half), "none")
    if config.gradient_checkpointing:
        for backbone in (policy.actor, policy.critic):
            if backbone is not None:
                backbone.activation_checkpointing_enable()
    if config.has_critic and config.bc_episodes:
        policy.value_heads.load_state_dict(load_file(start / HEADS))
    return policy, tokenizer, reference if config.uses_reference else None


def load_played(folder, config, accelerator):
    """The actor in OUT/actor or OUT/best as training plays it, on the device.

    With LoRA that is the start model with the adapter, not the merged weights.
    """
    folder = Path(folder)
    if config.lora and (folder / "adapter").is_dir():
        lora.check_peft()
        actor = load_actor(start_folder(config, folder.parent), config, torch.float32)
        actor = lora.put_adapter(actor, folder / "adapter", half_precision(accelerator))
    else:
        actor = load_actor(folder, config, torch.float32)
    return actor.to(accelerator.device)


def half_precision(accelerator):
    """The dtype of frozen weights: what forward passes compute in."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def start_folder(config, out):
    """Where the model is that training starts from: the clone, or `--model` itself."""
    return Path(out) / "start" if config.bc_episodes else Path(model_folder(config.model))


def _load_pretrained(config):
    """(model, tokenizer) of `--model` to be fine-tuned; None without one."""
    if not config.model:
        return None
    folder = model_folder(config.model)
    actor = load_actor(folder, config, torch.float32)
    check_output_layer(actor, config)
    if config.gradient_checkpointing:
        actor.base_model.activation_checkpointing_enable()
    return actor, load_tokenizer(folder)


@torch.no_grad()
def check_output_layer(actor, config):
    """ConfigError for a model that is not causal, or changes the logits after its output layer.

    Log-probabilities are computed from the hidden states that the loss reads, so they would be
    wrong for such a model (Cohere, Granite, Gemma 2).
    """
    if config.attention:  # flash attention wants a GPU, and this runs on the CPU
        actor.set_attn_implementation("eager")
    ids = torch.tensor([[0, 1]])
    hidden = hiper.last_hidden_state(actor.base_model, ids)
    alone = hiper.last_hidden_state(actor.base_model, ids[:, :1])
    if not torch.allclose(hidden[:, :1], alone, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{config.model} reads in both directions (as BERT does): --model takes a causal LM"
        )
    logits = actor.get_output_embeddings()(hidden)
    if not torch.allclose(actor(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{config.model} changes its logits after the output layer (as Cohere, Granite and "
            "Gemma 2 do): such models are not supported"
        )
    if config.attention:
        actor.set_attn_implementation(config.attention)


def load_tokenizer(path):
    """ConfigError where its files cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except Exception as error:  # of many kinds, from other packages
        raise ConfigError(f"the tokenizer of {path} cannot be loaded: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token_id = tokenizer.pad_token_id
    return tokenizer


def load_actor(path, config, dtype):
    """The causal LM in evaluation mode. ConfigError where its weights cannot be loaded."""
    try:
        actor, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=config.attention or None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ConfigError(f"the model {path} cannot be loaded: {error}") from None
    if report["missing_keys"]:
        raise ConfigError(
            f"the weights of {path} lack {', '.join(sorted(report['missing_keys'])[:3])}: it is no "
            "whole causal LM"
        )
    bad = find_not_finite(actor.named_parameters())
    if bad:
        raise ConfigError(f"the weights of {path} are damaged: {bad} holds NaN or infinity")
    return actor.eval()


def make_optimizer(policy, config):
    """AdamW over two groups: the actor, and what belongs to the critic alone. Frozen weights are
    in none."""
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    actor = [p for name, p in trained if name.startswith("actor.")]
    critic = [p for name, p in trained if not name.startswith("actor.")]
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    groups = [{"params": actor, "lr": config.lr}, {"params": critic, "lr": config.critic_lr}]
    return AdamW(groups, eps=config.adam_eps, weight_decay=0.0)


def load_run(out):
    """-> (config, folder of the actor, "last" or "best"). ConfigError where there is no run."""
    is_best = out.name == "best" and not (out / "actor").exists()
    folder = out if is_best else out / "actor"
    path = (out.parent if is_best else out) / "config.json"
    if not path.is_file() or not folder.is_dir():
        raise ConfigError(
            f"{out} holds no finished training run (config.json and actor/): give the --out of "
            "train.py"
        )
    config = read_settings(path)
    check(replace(config, optimizer="adamw"))  # bitsandbytes need not be here
    return config, folder, "best" if is_best else "last"


def load_evaluated(args):
    """What eval.py plays: a run's agent, or a model as it is -> (config, model, its description).

    args: of `support.arguments.read_eval_arguments`. ConfigError where there is neither.
    """
    if not args.settings:
        config, folder, which = load_run(args.out)
        try_world(config)
        check_split(config, args.split)
        return config, folder, {"run": f"{args.out} in {config.env}", "checkpoint": which}
    config = replace(read_config(args.settings), lora=0)  # there is no adapter to play
    check(config)
    check_world_and_model(config)
    check_split(config, args.split)
    return (
        config,
        model_folder(config.model),
        {"model": f"{config.model} in {config.env}, not trained"},
    )


def check_split(config, split):
    """ConfigError for a split that the world does not have; None is its last one."""
    splits = envs.world(config.env).SPLITS
    if split and split not in splits:
        raise ConfigError(f"{config.env} has no split {split!r}: choose {' or '.join(splits)}")


def choose_tasks(size, count):
    """All task indices of a split, or `count` of them: always the same random ones.

    Not the first ones, nor every n-th: splits are sorted, and neighbours are alike.
    """
    if not count or count >= size:
        return list(range(size))
    return sorted(random.Random(0).sample(range(size), count))


def describe_run(run, out):
    """One line: on what, with which model and settings, in which world, where to."""
    config, accelerator = run.config, run.accelerator
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    parameters = sum(p.numel() for p in run.model.actor.parameters()) / 1e6
    name = config.model or "tiny Qwen2 from scratch"
    if config.lora:
        name += f" with LoRA of rank {config.lora}"
    return (
        f"{config.method} in {config.env} on {accelerator.num_processes} x "
        f"{accelerator.device.type}, {precision}; {name}, {parameters:.1f} million parameters; "
        f"settings of {config.source}; all in {out}"
    )
