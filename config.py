"""Every setting: its default and its bounds. support/arguments.py reads them,
support/check_config.py checks them.

The defaults of `Config` are the paper's settings for Qwen2.5-1.5B (arXiv:2602.16165). They hold
where `--model` is given. The tiny agent from scratch has its own, in configs/tiny.yaml.

What the user can mend raises ConfigError: one sentence, before anything is written.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field

METHODS = ("hiper", "ppo", "rloo", "grpo", "gigpo", "hgpo", "gagpo", "beacon")
DECISIONS = ("switch", "subgoal", "action")
SUCCESS_REWARD = 10.0  # paper: 10, else 0
EVAL_TEMPERATURE = 0.4  # paper: 0.4; training samples at temperature 1


class ConfigError(Exception):
    """What the caller can mend: one sentence, exit code 2, nothing overwritten."""


def setting(default, text, *, low=None, high=None, choices=None):
    """A field with its help text and bounds."""
    bounds = {"help": text, "low": low, "high": high, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass
class Config:
    env: str = setting(
        "household",
        "household, alfworld, webshop, babyai, gym:ID, openenv:URL, or an importable module",
    )
    env_options: dict = setting({}, "options of the world, as JSON: '{\"max_steps\": 30}'")
    model: str = setting(
        "", "Hugging Face name, folder or GGUF file of a causal LM; empty: a tiny Qwen2"
    )
    method: str = setting("hiper", "how advantages are estimated", choices=METHODS)
    prompt: str = setting(
        "plan-execute",
        "plan-execute: switch, subgoal, action; flat: think, action (not for hiper)",
        choices=("plan-execute", "flat"),
    )
    out: str = setting("", "folder for all output; empty: runs/ENV-SEED")
    seed: int = setting(0, "seed of everything random", low=0, high=2**31)
    iterations: int = setting(150, "rollout-update iterations", low=1)

    episodes: int = setting(128, "episodes per iteration, over all processes", low=1)
    group_size: int = setting(
        0, "episodes per task; 0: 1 for hiper and ppo, 8 for the others", low=0
    )
    task_sampling: str = setting(
        "uniform",
        "training tasks: uniform, or edge, more of those that succeed now and then",
        choices=("uniform", "edge"),
    )
    num_envs: int = setting(128, "episodes in play at once, per process", low=1)
    history: int = setting(2, "past (observation, action) pairs in the prompt", low=0)
    short_prompt: bool = setting(
        False, "prompt without instructions and admissible actions, for a cloned model"
    )
    max_prompt_tokens: int = setting(
        2048, "a longer prompt loses its history, then its left end", low=1
    )
    max_new_tokens: int = setting(512, "response tokens at most", low=1)
    invalid_penalty: float = setting(0.1, "reward taken off a turn with invalid format", low=0)
    keep_penalties: dict = setting(
        {},
        "reward taken off KEEP turns as the released code does, as JSON: turn (each: 0.3 on "
        "ALFWorld), ratio (per episode, times its share of them: 3.5 on WebShop), drift (where "
        "KEEP's subgoal is not the carried one: 0.3)",
    )
    checklist: float = setting(
        0.0, "share of the success reward that is paid for subtasks (CM2)", low=0, high=1
    )
    segments: str = setting("learned", "learned, or imposed: single, every-turn, fixed:K")

    gamma: float = setting(1.0, "hiper, ppo: discount per turn", low=0, high=1)
    lam_low: float = setting(1.0, "hiper: lambda of the executor, per turn", low=0, high=1)
    lam_high: float = setting(0.95, "hiper: lambda of the planner, per segment", low=0, high=1)
    gae_lambda: float = setting(0.95, "ppo, gagpo: lambda of flat GAE, per turn", low=0, high=1)
    decisions: str = setting("switch,subgoal,action", "hiper: the decisions that are trained")
    normalize: str = setting(
        "per_decision",
        "hiper: scale advantages to unit variance per_decision (paper) or jointly",
        choices=("per_decision", "jointly"),
    )
    switch_advantage: str = setting(
        "closed_form",
        "hiper: closed_form, (q - beta)(V_high - V_keep) (paper), or value_head, G - V_switch "
        "(released code)",
        choices=("closed_form", "value_head"),
    )
    value_target: str = setting(
        "td0",
        "hiper: td0, one-step targets (paper), or lambda, lambda-returns (released code)",
        choices=("td0", "lambda"),
    )
    bootstrap: bool = setting(
        True, "value the state after a truncated episode; false: count it as 0"
    )

    critic: str = setting(
        "separate",
        "critic backbone: separate, or shared with the actor",
        choices=("separate", "shared"),
    )
    lr: float = setting(1e-6, "learning rate of the actor", low=0)
    critic_lr: float = setting(1e-5, "learning rate of the critic", low=0)
    final_lr_fraction: float = setting(
        1.0, "both learning rates fall linearly to this fraction", low=0, high=1
    )
    lora: int = setting(
        0, "rank of LoRA adapters on frozen weights (needs --model and peft); 0: train all", low=0
    )
    optimizer: str = setting(
        "adamw",
        "adamw, or adamw8bit with 8-bit moments (pip install bitsandbytes; not with FSDP)",
        choices=("adamw", "adamw8bit"),
    )
    adam_eps: float = setting(1e-8, "AdamW's epsilon", low=0)
    critic_warmup: int = setting(0, "first iterations that train the critic only", low=0)
    epochs: int = setting(1, "passes over each iteration's turns", low=1)
    minibatch_size: int = setting(256, "turns per optimizer step, over all processes", low=1)
    micro_batch_tokens: int = setting(
        16384, "tokens per forward pass, padding included: sets the memory", low=1
    )
    clip_range: float = setting(0.2, "PPO's clip of the probability ratio", low=0)
    value_clip: float = setting(
        0.0, "how far a value may move from its old one; 0: no limit (released code: 0.5)", low=0
    )
    kl_coef: float = setting(0.01, "weight of the k3 KL to the frozen start model", low=0)
    untrained_kl_coef: float = setting(
        0.01, "the same for response tokens that no decision trains", low=0
    )
    gradient_checkpointing: bool = setting(
        True, "recompute activations in the backward pass: less memory, a third more time"
    )
    attention: str = setting(
        "",
        "eager, sdpa or flash_attention_2; empty: Hugging Face's choice",
        choices=("", "eager", "sdpa", "flash_attention_2"),
    )

    bc_episodes: int = setting(
        0,
        "episodes of the world's demonstrator, which makes mistakes on purpose, that the model is "
        "fine-tuned on first; 0: none",
        low=0,
    )
    eval_episodes: int = setting(0, "tasks of that split; 0: all", low=0)
    save_every: int = setting(10, "iterations between checkpoints and printed episodes", low=1)

    source = "the defaults"  # not a setting: the files that support/arguments.py has read

    def __post_init__(self):
        if not self.group_size:
            self.group_size = 1 if self.has_critic else 8
        if not self.out:
            name = re.sub(r"[^\w.-]+", "-", self.env)  # gym:ID and openenv:URL are no file names
            self.out = f"runs/{name}-{self.seed}"

    @property
    def has_critic(self):
        return self.method in ("hiper", "ppo")

    @property
    def needs_keep_value(self):
        """Whether V_low(s_t, o_{t-1}) is needed: the value of keeping the carried subgoal."""
        return self.method == "hiper" and self.switch_advantage == "closed_form"

    @property
    def drawn_tasks(self):
        """How many tasks an iteration draws, each for `group_size` episodes."""
        return self.episodes // self.group_size

    def slots(self, processes):
        """Episodes that each of `processes` plays at once in training: at most its share."""
        draws = math.ceil(self.drawn_tasks / processes)
        return min(self.num_envs, draws * self.group_size)

    @property
    def uses_reference(self):
        return self.kl_coef > 0 or self.untrained_kl_coef > 0


FIELDS = {entry.name: entry for entry in dataclasses.fields(Config)}
