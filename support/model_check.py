"""What `--model` cannot be, said before anything is written: one sentence, from the model's files.

No weights are loaded. `support.loading` checks the loaded model.
"""

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from config import ConfigError
from support.gguf import model_folder
from support.tokens import token_bytes

HEAD = re.compile("ForCausalLM|LMHeadModel")  # in the class of a causal LM


def check_model(config):
    """ConfigError where `config.model` has no causal LM or no tokenizer that can be used."""
    name = model_folder(config.model)
    try:
        shape = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"no model {name!r}: give a folder with a model and its tokenizer in Hugging Face's "
            "format, or the name of one on the hub (which must be reachable)"
        ) from None
    check_shape(shape, name)
    folder = Path(name)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ConfigError(f"the folder {name} holds no weights (*.safetensors or *.bin)")
    needed = config.max_prompt_tokens + config.max_new_tokens
    places = getattr(shape, "max_position_embeddings", None) or needed
    if places < needed:
        raise ConfigError(
            f"{name} reads at most {places} tokens: --max_prompt_tokens and --max_new_tokens must "
            f"add up to no more, not to {needed}"
        )
    check_tokenizer(shape, name)


def check_shape(shape, name):
    """The same of a transformers configuration alone: is it a causal LM with a KV cache?"""
    kinds = shape.architectures or ["ForCausalLM"]
    if shape.is_encoder_decoder:
        problem = "an encoder-decoder"
    elif not any(HEAD.search(kind) for kind in kinds):
        problem = f"a {kinds[0]}"
    elif getattr(shape, "num_attention_heads", None) is None:
        problem = "a model without attention and its KV cache, such as a state-space model"
    else:
        return
    raise ConfigError(f"{name} is {problem}: --model takes a causal LM such as Qwen2.5 or Llama")


def check_tokenizer(shape, name):
    """ConfigError where there is none, where it ends no text, or where it is of another model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        token_bytes(tokenizer)
        if not tokenizer("go to drawer 1")["input_ids"]:  # an empty one stands in for missing files
            raise ValueError
    except Exception:  # of many kinds, from other packages
        raise ConfigError(
            f"{name} has no tokenizer that can be loaded: save one beside the model "
            "(tokenizer.save_pretrained)"
        ) from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {name} has neither an end token nor a padding token: set its "
            "eos_token and save it again"
        )
    rows = getattr(shape, "vocab_size", None)
    last = max(tokenizer.get_vocab().values())
    if rows and last >= rows:
        raise ConfigError(
            f"the tokenizer of {name} has ids up to {last}, and the model has only {rows} rows: "
            "they do not belong together"
        )


def find_not_finite(weights):
    """(name, tensor) pairs -> the name of the first that holds NaN or infinity, else None."""
    return next((name for name, weight in weights if not torch.isfinite(weight).all()), None)
