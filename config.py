"""The configuration: every field with its default and the paper's value, how it is read, and what is refused.

The defaults are those of the tiny agent in the household world; configs/ holds others. All that the user can mend raises UserError,
one sentence, before anything is written.
"""

import dataclasses
import difflib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import envs
from credit import DECISIONS, GROUPED, METHODS
from rollout import Style


def knob(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    # what
    env: str = knob(
        "household",
        "world: household, alfworld, webshop, or an importable module of your own (see envs.py)",
    )
    model: str = knob(
        "",
        "Hugging Face name or path of a causal LM; empty: a tiny Qwen2 from scratch (paper: Qwen2.5-1.5B/7B-Instruct)",
    )
    method: str = knob(
        "hiper", "how credit is given: hiper, ppo, rloo, grpo or gigpo (see credit.py)"
    )
    prompt: str = knob(
        "plan-execute", "plan-execute: switch, subgoal, action; flat: think, action (not for hiper)"
    )
    out: str = knob("", "folder for everything that is written; empty: runs/ENV-SEED")
    seed: int = knob(0, "seed of everything random")
    iterations: int = knob(24, "rollout-update iterations (paper: 150)")
    # rollout
    episodes: int = knob(128, "episodes per iteration, over all processes (paper: 128)")
    group: int = knob(
        0,
        "episodes of each task among them; 0: 1 for hiper and ppo, 8 for rloo, grpo, gigpo (papers: the same)",
    )
    slots: int = knob(128, "episodes in play at once, per process")
    env_workers: int = knob(0, "environment processes for worlds that need them; 0: one per core")
    temperature: float = knob(1.0, "sampling temperature in training (paper: 1.0)")
    history: int = knob(
        0,
        "past (observation, action) pairs in the prompt (paper: 2; household's page sums up the past itself)",
    )
    brief: bool = knob(
        True, "short prompt without instructions, for a model that was cloned (paper: false)"
    )
    show_admissible: bool = knob(False, "list the admissible actions in the prompt (paper: true)")
    page: bool = knob(
        False,
        "show what was seen so far summed up in a line, where the world can (alfworld, webshop), for a model "
        "too small to keep it in mind",
    )
    max_prompt: int = knob(2048, "prompt tokens at the most (paper: 2048)")
    max_response: int = knob(24, "response tokens at the most (paper: 512)")
    success_reward: float = knob(10.0, "reward of winning (paper: 10)")
    invalid_penalty: float = knob(
        2.0,
        "taken off on a turn with an invalid format (paper: 0.1; here the executor of a "
        "planner that starts out at random would rather be unreadable than carry out a harmful subgoal)",
    )
    keep_penalty: float = knob(
        0.0,
        "taken off on a KEEP turn: does switching need to be paid for? (paper: 0.3 on ALFWorld)",
    )
    drift_penalty: float = knob(
        0.0, "taken off where KEEP's subgoal is not the carried one (paper: 0.3)"
    )
    checklist: float = knob(
        0.0,
        "share of the success reward paid for subtasks as they are done: is sparse reward the trouble? (paper: 0)",
    )
    segments: str = knob(
        "learned",
        "learned, or imposed: single, every-turn, fixed:K. Do learned boundaries matter? (paper: learned)",
    )
    # credit
    gamma: float = knob(0.95, "discount per turn (paper: 1.0)")
    lam_low: float = knob(0.9, "lambda of the executor, per turn (paper: 1.0)")
    lam_high: float = knob(0.7, "lambda of the planner, per segment (paper: 0.95)")
    decisions: str = knob(
        "switch,subgoal,action",
        "hiper: decisions that are trained. `switch,subgoal`: how far does the planner "
        "alone get? `action`: how far the executor alone? (paper: all three)",
    )
    whiten: str = knob(
        "together",
        "hiper: advantages are scaled to unit variance together, which keeps the proportions of Theorem 4.1, or "
        "each decision's by themselves (paper: each)",
    )
    switch_advantage: str = knob(
        "critic",
        "hiper: critic, G - V_switch (released code), or gain, (q - beta)(V_high - V_keep) (paper)",
    )
    heads: int = knob(
        3,
        "hiper: 3 value heads, or 2, with V_switch put together from the others: is the third worth having? (released "
        "code: 3)",
    )
    targets: str = knob(
        "lambda",
        "hiper: values learn lambda-returns (released code) or td0, one-step targets (paper)",
    )
    lam: float = knob(0.65, "ppo: lambda of flat GAE, per turn (customary: 0.95)")
    gigpo_gamma: float = knob(
        0.95, "gigpo: discount of the returns compared at equal states (GiGPO: 0.95)"
    )
    gigpo_weight: float = knob(1.0, "gigpo: weight of the step-level advantage (GiGPO: 1)")
    gigpo_scale: bool = knob(
        True,
        "gigpo: divide by the group's standard deviation (GiGPO: with on ALFWorld, without on WebShop)",
    )
    bootstrap: bool = knob(
        False,
        "value the state after a truncated episode (paper: true) or count it 0 (released code on WebShop)",
    )
    # update
    critic: str = knob(
        "separate", "separate critic backbone, or one shared with the actor (paper: separate)"
    )
    lr: float = knob(6e-4, "actor learning rate (paper: 1e-6)")
    lr_end: float = knob(
        0.1, "what both learning rates fall to, linearly, as a share (paper: 1, constant)"
    )
    critic_lr: float = knob(5e-4, "critic learning rate (paper: 1e-5)")
    optimizer: str = knob(
        "adamw",
        "adamw, or adamw8bit, whose moments take a quarter of the memory (pip install bitsandbytes; not with "
        "FSDP; paper: adamw)",
    )
    critic_warmup: int = knob(1, "first iterations that train the critic only (paper: 0)")
    epochs: int = knob(1, "passes over each iteration's turns (paper: 1)")
    minibatch: int = knob(256, "turns per optimizer step, over all processes (paper: 256)")
    attention: str = knob(
        "",
        "eager, sdpa or flash_attention_2 (pip install flash-attn); empty: eager for the model from scratch, a third "
        "faster at the household's short prompts on a CPU, and for others what Hugging Face picks",
    )
    tokens_per_batch: int = knob(4096, "tokens per forward, padding included: the knob for memory")
    clip: float = knob(0.2, "PPO ratio clip (paper: 0.2)")
    value_clip: float = knob(
        0.0, "how far a value may move from its old one; 0: as far as it likes (released code: 0.5)"
    )
    kl: float = knob(
        0.3,
        "weight of the k3 KL to the frozen start model (paper: 0.01, at a learning rate 600 times smaller)",
    )
    kl_rest: float = knob(
        1.0,
        "its weight on tokens that no decision trains: KEEP's subgoal, text outside the blocks (paper: 0.01)",
    )
    max_grad_norm: float = knob(1.0, "gradient clip, for actor and critic each")
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    # start from scratch
    start: str = knob(
        "",
        "folder `start` of another run, to begin from its clone instead of making one; empty: make one",
    )
    demos: int = knob(1600, "demonstration episodes to clone before training; 0: none")
    demo_tasks: int = knob(
        0,
        "how many training tasks they are of, spread over the split; 0: the split's first, each once",
    )
    plan_noise: float = knob(
        0.9, "probability that the demonstrator sets out for any subgoal that one could have"
    )
    act_noise: float = knob(
        0.0, "probability that the demonstrator does, and shows, any admissible action"
    )
    slips: float = knob(
        0.25, "probability that another action happens than the one the demonstrator shows"
    )
    blunders: float = knob(
        0.0,
        "probability that instead an action of another episode is tried, which mostly nothing comes of",
    )
    disguises: int = knob(
        0,
        "further copies of each demonstration under permuted names (alfworld), so that the clone reads "
        "them instead of reciting them",
    )
    clone_epochs: int = knob(2, "passes over the demonstrations")
    clone_lr: float = knob(2e-3, "learning rate of cloning")
    # reporting
    eval_split: str = knob(
        "", "split played after the warm start and at the end; empty: the world's last (unseen)"
    )
    eval_episodes: int = knob(0, "tasks of that split to play; 0: all")
    eval_temperature: float = knob(0.4, "sampling temperature in evaluation (paper: 0.4)")
    save_every: int = knob(10, "iterations between checkpoints")
    show_every: int = knob(10, "iterations between episodes printed in full; 0: never")
    cpu: bool = knob(False, "stay on the CPU where there is a GPU")

    @property
    def critical(self):
        """Whether the method has a critic."""
        return self.method not in GROUPED

    @property
    def group_size(self):
        return self.group or (1 if self.critical else 8)

    @property
    def attends(self):
        return self.attention or (None if self.model else "eager")

    @property
    def style(self):
        return Style(**{name: getattr(self, name) for name in Style.__dataclass_fields__})


class UserError(Exception):
    """What the caller can mend: one sentence, exit code 2, nothing overwritten."""


def check(config):
    """UserError for what cannot be meant, or cannot work, before anything is written."""
    for name in (
        "iterations",
        "episodes",
        "slots",
        "epochs",
        "minibatch",
        "tokens_per_batch",
        "max_prompt",
        "max_response",
        "save_every",
    ):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(config, name)}")
    for name in (
        "env_workers",
        "history",
        "eval_episodes",
        "demos",
        "demo_tasks",
        "disguises",
        "critic_warmup",
        "show_every",
        "lr",
        "critic_lr",
        "kl",
        "kl_rest",
        "clip",
        "group",
        "value_clip",
        "eval_temperature",
        "invalid_penalty",
        "keep_penalty",
        "drift_penalty",
        "gigpo_weight",
    ):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} must not be negative, not {getattr(config, name)}")
    for name in ("temperature", "max_grad_norm", "clone_epochs", "clone_lr"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} must be above 0, not {getattr(config, name)}")
    for name in (
        "gamma",
        "lam_low",
        "lam_high",
        "lam",
        "gigpo_gamma",
        "checklist",
        "lr_end",
        "plan_noise",
        "act_noise",
        "slips",
        "blunders",
    ):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} must lie in [0, 1], not {getattr(config, name)}")
    for name, choices in {
        "method": METHODS,
        "prompt": ("plan-execute", "flat"),
        "critic": ("separate", "shared"),
        "heads": (2, 3),
        "whiten": ("together", "each"),
        "switch_advantage": ("critic", "gain"),
        "targets": ("lambda", "td0"),
        "optimizer": ("adamw", "adamw8bit"),
    }.items():
        if getattr(config, name) not in choices:
            raise UserError(
                f"--{name} must be {' or '.join(map(str, choices))}, not {getattr(config, name)!r}"
            )
    if not re.fullmatch("learned|single|every-turn|fixed:[1-9][0-9]*", config.segments):
        raise UserError(
            f"--segments must be learned, single, every-turn or fixed:K with K turns, not {config.segments!r}"
        )
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    if config.prompt == "flat" and config.method == "hiper":
        raise UserError(
            "--prompt flat has no switches: it goes with --method ppo, rloo, grpo or gigpo"
        )
    if config.segments != "learned" and config.method != "hiper":
        raise UserError(
            f"--segments {config.segments} writes a part of each answer, which only --method hiper can leave out of training"
        )
    if not config.decisions or set(config.decisions.split(",")) - set(DECISIONS):
        raise UserError(
            f"--decisions must name some of {','.join(DECISIONS)}, not {config.decisions!r}"
        )
    if config.episodes % config.group_size:
        raise UserError(
            f"--episodes {config.episodes} is no multiple of --group {config.group_size}, the episodes of each task"
        )
    if config.group_size == 1 and not config.critical:
        raise UserError(
            f"--method {config.method} compares episodes of one task: --group must be at least 2"
        )
    if config.start and (config.model or not (Path(config.start) / "heads.pt").is_file()):
        raise UserError(
            f"--start {config.start} must be the folder `start` of a run without --model"
            if not config.model
            else "give --model or --start, not both"
        )
    if not config.model and not config.demos:
        raise UserError("a model from scratch needs demonstrations: give --demos, or --model")
    try:
        module = envs.world(config.env)
        if config.eval_split and config.eval_split not in module.SPLITS:
            raise UserError(
                f"--eval_split must be one of {', '.join(module.SPLITS)}, not {config.eval_split!r}"
            )
        with envs.Runner(config.env, module.SPLITS[0], 1) as runner:
            _, info = runner.reset({0: 0})[0]  # what is not installed shows here
        if config.checklist and "progress" not in info:
            raise UserError(
                f"--checklist needs a world that reports its subtasks (info['progress']), and {config.env} does not"
            )
        if config.page and "page" not in info:
            raise UserError(
                f"--page needs a world that sums up what was seen (info['page']), and {config.env} does not"
            )
        if config.disguises and not hasattr(module, "disguise"):
            raise UserError(
                f"--disguises needs a world with other names for its things (`disguise`), and {config.env} has none"
            )
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(error) from None
    if config.model:
        try:
            AutoConfig.from_pretrained(config.model), AutoTokenizer.from_pretrained(config.model)
        except (OSError, ValueError):
            raise UserError(
                f"no model {config.model!r}: give a folder with a model and its tokenizer in Hugging Face's format, or "
                "the name of one on the hub (which must be reachable)"
            ) from None


def read_config(argv):
    """Flags, and before them one YAML or JSON file if one is given; flags win -> Config. UserError for what is unknown.

    Without a file, `--env NAME` takes configs/NAME.yaml, and with `--model` configs/NAME-1.5b.yaml, where there is one: a world's
    prompts and budgets are not the household's.
    """
    names = {f.name for f in dataclasses.fields(Config)}
    parser = HfArgumentParser(
        Config,
        allow_abbrev=False,
        description="Train an LLM agent with HiPER. A YAML or JSON "
        "file may come first, flags win over it; --plan says what memory it would take, and stops.",
    )
    parser.error = lambda message: (_ for _ in ()).throw(
        UserError(f"{message} (python train.py --help lists all flags)")
    )
    words = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    flag = lambda name: next(
        (after for word, after in zip(words, words[1:]) if word == f"--{name}"), ""
    )
    own = Path(__file__).parent / "configs" / f"{flag('env')}{'-1.5b' * bool(flag('model'))}.yaml"
    if (not argv or argv[0].startswith("-")) and own.is_file():
        argv = [str(own), *argv]
    if argv and not argv[0].startswith("-"):
        try:
            given = yaml.safe_load(Path(argv[0]).read_text()) or {}  # JSON is YAML
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"cannot read the configuration {argv[0]}: {str(error).splitlines()[0]}"
            ) from None
        if not isinstance(given, dict):
            raise UserError(
                f"cannot read the configuration {argv[0]}: it must hold lines of the form `field: value`"
            )
        for name in given:
            if name not in names:
                raise UserError(f"{argv[0]}: there is no field {name!r}" + nearest(name, names))
        parser.set_defaults(
            **{name: str(value) for name, value in given.items() if value is not None}
        )
        argv = argv[1:]
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise UserError(f"there is no flag {unknown[0]!r}" + nearest(unknown[0].lstrip("-"), names))
    return dataclasses.replace(config, out=config.out or f"runs/{config.env}-{config.seed}")


def nearest(name, names):
    near = difflib.get_close_matches(name, names, 1)
    return f", did you mean {near[0]!r}?" if near else " (python train.py --help lists all)"


def open_out(out, config):
    """Make the folder of a new run, or accept that of the very same one. UserError, with nothing touched, otherwise."""
    mine = dataclasses.asdict(config)
    if (out / "config.json").is_file():
        theirs = json.loads((out / "config.json").read_text())
        differs = [
            f"{k} {theirs.get(k)!r} there, {v!r} here"
            for k, v in mine.items()
            if theirs.get(k) != v and k != "out"
        ]
        if differs:
            raise UserError(
                f"{out} holds another run ({'; '.join(differs)}): give another --out, or remove it"
            )
        return
    if out.exists() and (
        not out.is_dir() or {path.name for path in out.iterdir()} - {"config.tmp"}
    ):
        raise UserError(f"{out} exists and is not a run of this script: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.tmp").write_text(json.dumps(mine, indent=1))
    (out / "config.tmp").replace(out / "config.json")
