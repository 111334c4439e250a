"""LoRA, with `--lora RANK`: actor, critic and reference on one frozen copy of the weights.

Each is a model of its own around the same weights. The actor and a separate critic have adapters
(package peft), the reference has none: it is the start model. Only adapters and value heads are
trained; they are float32, the frozen weights are bfloat16 where the device computes in it.
"""

import copy
import importlib.util

import torch
from transformers import AutoModelForCausalLM

import hiper
from config import ConfigError

SCALE = 2  # of what an adapter adds: alpha = 2 x rank, so the learning rate fits any rank


def check_peft():
    """ConfigError where the package is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--lora needs peft: pip install --no-deps -r requirements-llm.txt")


def add_adapters(model, rank):
    """Adapters on all linear layers but the output layer, in place -> the PeftModel around it.

    At first they add nothing. The model's own weights are frozen.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear")
    return get_peft_model(model, config).eval()


def share_weights(model):
    """A copy of the model's modules around the very same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def cast_weights(model, dtype):
    """Another precision of the weights, in place."""
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)


def make_policy(model, critic, rank, dtype):
    """A causal LM -> (ActorCritic with adapters, reference), the weights of both being `model`'s.

    critic: as in ActorCritic; "shared" puts the value heads on the actor's adapter. dtype: of the
    frozen weights.
    """
    cast_weights(model, dtype)
    reference = hiper.ActorCritic(share_weights(model), "none")
    backbone = share_weights(model.base_model) if critic == "separate" else None
    actor = add_adapters(model, rank).get_base_model()
    policy = hiper.ActorCritic(actor, "none" if critic == "none" else "shared")
    if backbone is not None:
        policy.critic = add_adapters(backbone, rank).get_base_model()
    return policy, reference


def put_adapter(model, folder, dtype):
    """A start model, in place, as training plays it -> the model with the adapter in `folder`.

    The merged weights are not that: in bfloat16 they round small changes away.
    """
    from peft import PeftModel

    cast_weights(model, dtype)
    return PeftModel.from_pretrained(model, folder).get_base_model().eval()


def add_critic(actor, start, config):
    """ActorCritic of a trained actor, for the value heads and the critic's adapter of a checkpoint.

    start: the model that training began with.
    """
    check_peft()
    policy = hiper.ActorCritic(actor, "shared")
    if config.critic == "separate":
        backbone = load_frozen(start, config).base_model
        cast_weights(backbone, actor.dtype)
        policy.critic = add_adapters(backbone, config.lora).get_base_model()
    return policy


def load_frozen(start, config):
    return AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation=config.attention or None
    )


def frozen_names(model):
    """The names of all parameters that are not trained."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def save_merged(folder, start, config, state):
    """An actor with its adapter merged, in Hugging Face's format; the adapter in folder/adapter.

    start: the model that training began with, read again so that no weight in use is changed;
    state: the actor's state_dict, of which the adapter is used.
    """
    wrapped = add_adapters(load_frozen(start, config), config.lora)
    adapter = {name: value for name, value in state.items() if "lora_" in name}
    wrapped.get_base_model().load_state_dict(adapter, strict=False)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    wrapped.merge_and_unload().save_pretrained(folder)
