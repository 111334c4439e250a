"""What of the settings cannot be meant, or cannot work: one sentence before anything is written."""

import importlib.util
import math
import re

from accelerate.utils import DistributedType

from config import DECISIONS, FIELDS, ConfigError

KEEP_PENALTIES = ("turn", "ratio", "drift")


def check(config):
    """ConfigError for what cannot be meant or cannot work, before anything is written."""
    for name, entry in FIELDS.items():
        _check_bounds(name, getattr(config, name), entry.metadata)
    if not re.fullmatch("learned|single|every-turn|fixed:[1-9][0-9]*", config.segments):
        raise ConfigError(
            "--segments must be learned, single, every-turn or fixed:K with K turns, "
            f"not {config.segments!r}"
        )
    if not config.decisions or set(config.decisions.split(",")) - set(DECISIONS):
        raise ConfigError(
            f"--decisions must name some of {','.join(DECISIONS)}, not {config.decisions!r}"
        )
    _check_keep_penalties(config.keep_penalties)
    if config.lora and not config.model:
        raise ConfigError("--lora trains adapters on a pretrained model's weights: give --model")
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    if config.attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        raise ConfigError("--attention flash_attention_2 needs flash-attn: pip install flash-attn")
    if config.method == "hiper" and config.prompt == "flat":
        raise ConfigError("--prompt flat has no switches: it goes with the other methods")
    if config.method != "hiper" and config.segments != "learned":
        raise ConfigError(
            f"--segments {config.segments} writes a part of each response, which only "
            "--method hiper can leave out of training"
        )
    if config.episodes % config.group_size:
        raise ConfigError(
            f"--episodes {config.episodes} is no multiple of --group_size {config.group_size}"
        )
    if not config.has_critic and config.group_size == 1:
        raise ConfigError(
            f"--method {config.method} compares episodes of one task: --group_size must be at "
            "least 2"
        )
    if not config.model and not config.bc_episodes:
        raise ConfigError("a model from scratch needs --bc_episodes above 0; or give --model")


def _check_bounds(name, value, bounds):
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--{name} must be a finite number, not {value}")
    if bounds["low"] is not None and value < bounds["low"]:
        raise ConfigError(f"--{name} must be at least {bounds['low']}, not {value}")
    if bounds["high"] is not None and value > bounds["high"]:
        raise ConfigError(f"--{name} must be at most {bounds['high']}, not {value}")
    if bounds["choices"] and value not in bounds["choices"]:
        choices = " or ".join(filter(None, bounds["choices"]))
        raise ConfigError(f"--{name} must be {choices}, not {value!r}")


def _check_keep_penalties(penalties):
    for name, value in penalties.items():
        if name not in KEEP_PENALTIES:
            raise ConfigError(
                f"--keep_penalties holds some of {', '.join(KEEP_PENALTIES)}, not {name!r}"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"--keep_penalties: {name} must be a number of at least 0, not {value!r}"
            )


def check_processes(config, accelerator):
    """ConfigError where a run's processes have no episodes, or shard what cannot be sharded."""
    if config.drawn_tasks < accelerator.num_processes:
        raise ConfigError(
            f"--episodes {config.episodes} in groups of {config.group_size} leave some of "
            f"the {accelerator.num_processes} processes without one"
        )
    check_sharding(config, accelerator)


def check_sharding(config, accelerator):
    """ConfigError for DeepSpeed, for FSDP1, and for what does not work with FSDP2."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            "DeepSpeed does not work here, since its engine clips and steps by itself: take FSDP2 "
            "(configs/accelerate/fsdp.yaml)"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "FSDP works in version 2 and without CPU-RAM-efficient loading only: start with "
            "accelerate launch --config_file configs/accelerate/fsdp.yaml"
        )
    if config.optimizer != "adamw":
        raise ConfigError(f"--optimizer {config.optimizer} does not work with FSDP: take adamw")
    if config.lora:
        raise ConfigError(
            "--lora does not work with FSDP: without it each GPU holds the frozen weights once"
        )
