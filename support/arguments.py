"""From flags and configuration files to a Config."""

import argparse
import difflib
import json
import math
import os
import sys
from pathlib import Path

import yaml

from config import EVAL_TEMPERATURE, FIELDS, Config, ConfigError
from support.tracking import TRACKERS, check_tracker

CONFIGS = Path(__file__).parent.parent / "configs"
LEAST_TEMPERATURE = 0.01  # logits over less can overflow
GROUPS = {  # first field of a group -> its title in --help
    "env": "World, model and method",
    "episodes": "Rollout",
    "gamma": "Advantages",
    "critic": "Update",
    "bc_episodes": "Warm start, evaluation and checkpoints",
}


def read_config(argv):
    """Flags, and before them one YAML or JSON file if one is given -> Config.

    Later ones win: the defaults of Config; configs/tiny.yaml where there is no model; without a
    file, the world's own configs/tiny-ENV.yaml or, with a model, configs/ENV-1.5b.yaml; the
    file; the flags. ConfigError for what is unknown.
    """
    argv = list(argv)
    path = expanded_path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    known, unknown = _parser().parse_known_args(argv)
    if unknown:
        hint = suggest(unknown[0].lstrip("-").lower(), [f"--{name}" for name in FIELDS])
        raise ConfigError(f"there is no flag {unknown[0]!r}{hint}")
    flags = vars(known)
    for name in flags.keys() - FIELDS.keys():
        raise ConfigError(f"--{name} is no setting: it goes with train.py alone")
    given = {**(_read_file(path) if path else {}), **flags}
    env = given.get("env", Config.env)
    files = []
    if given.get("model"):
        world_file = CONFIGS / f"{env}-1.5b.yaml"
    else:
        world_file = CONFIGS / f"tiny-{env}.yaml"
        files.append(CONFIGS / "tiny.yaml")
    if path is None and os.path.isfile(world_file):  # False also for a name too long
        files.append(world_file)
    values = {}
    for layer in [*map(_read_file, files), given]:
        values.update(layer)
    values = {name: _convert(name, value) for name, value in values.items()}
    for name in ("out", "model"):
        values[name] = os.path.expanduser(values.get(name, ""))
        if values[name].startswith("~"):
            raise ConfigError(f"--{name} {values[name]}: there is no such user")
    config = Config(**values)
    config.source = ", ".join(file.name for file in [*files, path] if file) or Config.source
    return config


def read_train_arguments(argv):
    """The words of train.py's command line (None: sys.argv's).

    -> (Config, whether only the memory plan is asked for, the tracker's name or None)
    """
    parser = _Parser(prog="train.py", add_help=False, allow_abbrev=False)
    _add_run_flags(parser)
    args, settings = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    config = read_config(settings)
    if args.track:
        check_tracker(args.track)
    return config, args.plan, args.track


def _add_run_flags(parser):
    """What one may ask of a run beside its settings. Nothing of it changes what is learnt."""
    parser.add_argument("--plan", action="store_true", help="print the memory plan and stop")
    text = "also log to a tracker: " + " or ".join(TRACKERS)
    parser.add_argument("--track", choices=tuple(TRACKERS), metavar="NAME", help=text)


def read_settings(path):
    """A run's config.json -> Config. A setting that it lacks has its default.

    ConfigError where the file is no configuration.
    """
    try:
        values = json.loads(path.read_text())
        for record in ("versions", "counts"):
            values.pop(record, None)
        unknown = [name for name in values if name not in FIELDS]
        if unknown:
            raise ConfigError(f"there is no setting {unknown[0]!r}")
        return Config(**{name: _convert(name, value) for name, value in values.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"{path} is not a configuration of this version ({error}): mend it, or remove the "
            "folder and train anew"
        ) from None


def expanded_path(text):
    """A Path whose ~ is the home folder."""
    return Path(os.path.expanduser(text))


def read_eval_arguments(argv):
    """The words of eval.py's command line (None: sys.argv's) -> Namespace.

    Without a run `settings` are the words for `read_config`. ConfigError for what cannot be meant.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        prog="eval.py",
        usage="python eval.py OUT [flags]\n       python eval.py --model M --env E [flags]"
        "\n       python eval.py --report OUT [OUT ...] [--html FILE]",
        description="Evaluate the agent of a run, or any model without training (zero-shot). "
        "Zero-shot also takes train.py's settings, such as --num_envs 16.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    zero_shot = any(word.split("=")[0] == "--model" for word in argv)
    if "--report" not in argv and not zero_shot:  # else OUT would be the value of a setting
        add("out", type=expanded_path, help="the --out folder of a training run, or its best/")
    add("--model", help="without OUT: Hugging Face name or path of a causal LM")
    add("--env", help="without OUT: the world")
    add("--split", help="default: the last split of the world")
    add("--episodes", type=int, help="N tasks of the split; default: all")
    add("--temperature", type=float, default=EVAL_TEMPERATURE, help="(paper: 0.4)")
    add("--greedy", action="store_true", help="take the most probable tokens")
    add("--seed", type=int, help="default: the run's, as in training")
    add("--json", type=expanded_path, help="write the result to this file")
    add("--html", type=expanded_path, help="write the episodes to this page")
    add("--show", type=int, default=0, metavar="N", help="print the first N episodes turn by turn")
    add("--report", type=Path, nargs="+", metavar="OUT", help="one page of these runs' curves")
    args, settings = parser.parse_known_args(argv)
    if args.report and settings:
        raise ConfigError(f"--report takes folders of runs and --html FILE, not {settings[0]}")
    if zero_shot and settings and not settings[0].startswith("-"):
        raise ConfigError(f"{settings[0]!r} and --model: give either a run or a model")
    if "out" in args and (settings or args.env):
        raise ConfigError(
            f"the run in {args.out} has its own settings: leave out "
            f"{settings[0] if settings else '--env'}"
        )
    for name in ("json", "html"):
        path = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name}: there is no folder {path.parent}")
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise ConfigError(f"--{name}: {path} is no file that can be written")
    if args.episodes is not None and args.episodes < 1:
        raise ConfigError("--episodes must be 1 or more")
    if args.show < 0:
        raise ConfigError("--show must be 0 or more")
    sampled = math.isfinite(args.temperature) and args.temperature >= LEAST_TEMPERATURE
    if args.temperature != 0 and not sampled:
        raise ConfigError(
            f"--temperature must be 0 (greedy), or {LEAST_TEMPERATURE} and more, not "
            f"{args.temperature}"
        )
    if args.seed is not None and not 0 <= args.seed <= FIELDS["seed"].metadata["high"]:
        raise ConfigError(f"--seed must be from 0 to {FIELDS['seed'].metadata['high']}")
    env = ["--env", args.env] if args.env else []
    args.settings = [*settings, "--model", args.model, *env] if zero_shot else []
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message} (python {self.prog} --help lists all flags)")


def _parser():
    parser = _Parser(
        prog="train.py",
        usage="python train.py [CONFIG.yaml] [--flag value ...]",
        description="Train an LLM agent. A YAML or JSON file may come first; flags win over it. "
        "Defaults are the paper's; without --model those of configs/tiny.yaml hold.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_run_flags(parser)
    group = parser
    for name, entry in FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        text = entry.metadata["help"]
        choices = [choice for choice in entry.metadata["choices"] or () if choice]
        if not all(choice in text for choice in choices):
            text += f": {', '.join(choices)}"
        if entry.type is not dict and entry.default != "":
            text += f" [{entry.default}]"
        group.add_argument(f"--{name}", metavar=entry.type.__name__.upper(), help=text)
    return parser


def _read_file(path):
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold lines of the form `field: value`")
    for name in values:
        if name not in FIELDS:
            raise ConfigError(f"{path}: there is no field {name!r}{suggest(str(name), FIELDS)}")
    return {name: value for name, value in values.items() if value is not None}


def suggest(name, names):
    """', did you mean X?' where a name is near, else where to find all."""
    near = difflib.get_close_matches(name, names, 1)
    return f", did you mean {near[0]!r}?" if near else " (python train.py --help lists all)"


def add_env_options(parser):
    """The flag --env_options of an argparse parser: a world's options, as JSON -> dict.

    ConfigError from parse_args where they are no object.
    """
    parser.add_argument(
        "--env_options",
        type=lambda text: _convert("env_options", text),
        default={},
        metavar="JSON",
        help="options of the world, for example '{\"max_steps\": 20}'",
    )


def _convert(name, value):
    """A value from a file or a flag as the field's type; ConfigError if it is none."""
    kind = FIELDS[name].type
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if kind is dict:
            options = json.loads(value) if isinstance(value, str) else value
            if not (isinstance(options, dict) and all(isinstance(key, str) for key in options)):
                raise ValueError
            return options
        if value is None or isinstance(value, list | dict):
            raise ValueError
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        return kind(str(value))
    except (ValueError, KeyError, RecursionError):
        wanted[dict] = "a JSON object such as '{\"max_steps\": 30}'"
        wanted = wanted.get(kind, "text")
        raise ConfigError(f"--{name} must be {wanted}, not {str(value)!r}") from None
