"""Warm start: behaviour cloning of a scripted expert that makes mistakes, with `--bc_episodes N`.

A pretrained model (`--model`) is fine-tuned on the expert's turns. Without one the tiny agent is
made from scratch: a byte-level BPE tokenizer from the world's own words, which keeps `drawer 1` as
one token, and a Qwen2 of about half a million parameters.
"""

import inspect
import random
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import envs
import hiper
from config import SUCCESS_REWARD, ConfigError
from support import lora
from support.batch import make_samples
from support.demonstrations import demonstrated_tasks, demonstrations
from support.distributed import say
from support.files import swap_in
from support.generation import tokenize_prompts, tokenize_texts
from support.gguf import model_folder
from support.model_check import find_not_finite
from support.ppo import set_checkpointing
from support.scoring import micro_batches
from support.terminal import make_bar
from support.tokens import token_bytes

BETAS = (0.9, 0.95)  # 0.999 averages squared gradients over 1,000 of the 1,400 steps
VALUE_WEIGHT = 0.002  # of the value loss beside the response loss
HEADS_LR = 2e-3  # of the value heads, which start at zero
HEADS = "value_heads.safetensors"


class Recipe(NamedTuple):
    """How the demonstrations are learnt."""

    lr: float  # the peak
    epochs: int  # passes over the demonstrations
    batch: int  # turns per step


FROM_SCRATCH = Recipe(lr=2e-3, epochs=1, batch=32)
PRETRAINED = Recipe(lr=2e-4, epochs=1, batch=16)  # for a model of 135 million parameters
ADAPTERS = PRETRAINED._replace(lr=1e-3)  # LoRA wants several times as much


def clone_expert(config, out, pool, accelerator, pretrained=None):
    """Demonstrations and cloning -> out/start, in Hugging Face's format.

    pretrained: (model, tokenizer) to fine-tune; without it a tiny model is made from scratch.
    With --short_prompt the clone's tokenizer has no chat template: a prompt without instructions
    needs none, and a template can be half as long as the prompt.
    """
    settings = dict(getattr(envs.world(config.env), "DEMONSTRATOR", {}))
    size = envs.size(config.env, pool.split)
    tasks = demonstrated_tasks(size, config.bc_episodes, settings.pop("tasks", 0))
    try:
        inspect.signature(demonstrations).bind(pool, tasks, config, **settings)
    except TypeError as error:
        raise ConfigError(f"DEMONSTRATOR of world {config.env!r}: {error}") from None
    examples = demonstrations(pool, tasks, config, **settings)
    torch.manual_seed(config.seed)
    if pretrained:
        model, tokenizer = pretrained
        if config.short_prompt:
            tokenizer.chat_template = None
    else:
        tokenizer = train_tokenizer([text for example in examples for text in example[:2]])
        model = tiny_model(tokenizer, config.attention or "sdpa")
    recipe = PRETRAINED if pretrained else FROM_SCRATCH
    if config.lora:
        recipe = ADAPTERS
        lora.add_adapters(model, config.lora)
    policy = hiper.ActorCritic(model, "shared").to(accelerator.device)
    set_checkpointing(policy, True)
    say(accelerator, f"cloning the expert: {len(examples)} turns, {recipe.batch} a step")
    loss = clone(policy, tokenizer, examples, config, recipe, accelerator.autocast)
    say(accelerator, f"cloned: loss {loss:.3f} nats per token")
    set_checkpointing(policy, False)
    bad = find_not_finite(policy.named_parameters())
    if bad:
        raise FloatingPointError(f"{bad} has become NaN or infinite in cloning: nothing is saved")
    temporary = out / "start.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if config.lora:
        source = model_folder(config.model)
        lora.save_merged(temporary, source, config, policy.actor.state_dict())
    else:
        policy.actor.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    save_file(policy.value_heads.state_dict(), temporary / HEADS)
    swap_in(temporary, out / "start")


# ---- tokenizer and model -----------------------------------------------------------------------


def train_tokenizer(texts, vocab_size=2048):
    """Qwen2's tokenizer class with byte-level BPE learnt from `texts` -> Qwen2Tokenizer.

    Any text can be encoded. A tag, or a name such as ` drawer 1`, a product number or a product
    option, is one token. AutoTokenizer finds it again beside a Qwen2 model.
    """
    end = "<|endoftext|>"
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate([end, *sorted(letters)])}
    tokenizer = Qwen2Tokenizer(vocabulary, []).train_new_from_iterator(
        texts, vocab_size, initial_alphabet=letters, show_progress=False
    )
    names = re.compile(r"</?[a-z]+>|KEEP|SWITCH|go to| [a-z]+ \d+|\bB[0-9A-Z]{9}\b")
    options = re.compile(r"click\[([a-z0-9][^][]+)\]")
    for pattern, whole_word in ((names, False), (options, True)):
        found = Counter(name for text in texts for name in pattern.findall(text))
        tokenizer.add_tokens(
            [
                AddedToken(name, normalized=False, single_word=whole_word)
                for name, _ in found.most_common(vocab_size)
            ]
        )
    return tokenizer


def tiny_model(tokenizer, attention="eager", hidden=128, layers=2):
    """A Qwen2 from a config, random weights, float32.

    `drawer 1` starts near the sum of `drawer` and `1`, which halves the time of cloning.
    """
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.08,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation=attention,
        )
    )
    table = token_bytes(tokenizer)
    texts = [table[i].decode("utf-8", "replace") for i in range(len(tokenizer))]
    ids = {text: i for i, text in enumerate(texts)}
    weight = model.get_input_embeddings().weight.data  # [V, H]
    for i, text in enumerate(texts):
        kind, _, number = text.rpartition(" ")
        if kind in ids and number in ids and number.isdigit():
            parts = (weight[ids[kind]] + weight[ids[number]]) / 2**0.5
            weight[i] = parts + 0.3 * weight[i]
    return model


# ---- cloning -----------------------------------------------------------------------------------


def clone(policy, tokenizer, examples, config, recipe=FROM_SCRATCH, autocast=nullcontext):
    """Supervised learning of the demonstrations, in place -> the last steps' loss, nats a token.

    The actor learns the responses, the value heads the returns: the clone acts nearly as the
    expert did, so the critic need not start from nothing.
    autocast() is entered anew for every forward pass: it keeps copies of the weights.
    A step whose gradient is not finite is skipped. FloatingPointError where all are.
    """
    device = policy.value_heads.weight.device
    prompts, responses, shorter, turns_left = zip(*examples, strict=True)
    samples = make_samples(
        tokenize_prompts(tokenizer, prompts, config.max_prompt_tokens, shorter),
        tokenize_texts(tokenizer, responses),
        tokenizer,
    )
    returns = [0.0 if left is None else SUCCESS_REWARD * config.gamma**left for left in turns_left]
    returns = torch.tensor(returns, device=device)  # [N]
    steps = _shuffled_batches(len(examples), recipe, config.seed)
    heads = list(policy.value_heads.parameters())
    groups = [{"params": policy.actor.parameters()}, {"params": heads, "lr": HEADS_LR}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, weight_decay=0.01)

    def ramp(step):  # linear warm-up over 30 steps, then linearly down to a twentieth
        return min(1.0, (step + 1) / 30) * (1 - 0.95 * step / len(steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    lengths = samples.total_lengths()
    losses = []
    bar = make_bar(len(steps), "cloning")
    for rows in steps:
        spoken = samples.lengths[rows].sum()
        optimizer.zero_grad()
        total = 0.0
        for part in micro_batches(lengths, config.micro_batch_tokens, rows):
            with autocast():
                output = policy(*samples.model_inputs(part, device))
            loss = -output.logprobs.sum() / spoken
            values = torch.stack([output.v_high, output.v_low, output.v_switch])  # [3, n]
            value_loss = (values - returns[part]).square().sum() / len(rows)
            (loss + VALUE_WEIGHT * value_loss).backward()
            total += loss.detach()
        if torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).isfinite():
            optimizer.step()
            losses.append(total)
        schedule.step()
        if losses and len(losses) % 20 == 0:
            bar.set_postfix_str(f"loss {_recent(losses):.3f} nats per token", refresh=False)
        bar.update()
    bar.close()
    if not losses:
        raise FloatingPointError("cloning found no finite gradient: is the start model whole?")
    return _recent(losses)


def _recent(losses):
    return float(torch.stack(losses[-20:]).mean())


def _shuffled_batches(count, recipe, seed):
    """Passes over `count` rows in batches; a rest is left out."""
    rng = random.Random(seed)
    batches = []
    for _ in range(recipe.epochs):
        order = rng.sample(range(count), count)
        size = min(recipe.batch, count)
        batches += [order[n : n + size] for n in range(0, count - size + 1, size)]
    return batches
