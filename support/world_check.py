"""`python -m envs WORLD`: does a world keep the interface of envs.py? One sentence per fault."""

import argparse
import inspect
import pickle
import random

import envs
from config import ConfigError
from support.arguments import add_env_options
from support.metrics import printable
from support.world_guard import describe

LIMIT = 500  # steps after which an episode counts as endless
STEP = "step must return (observation, reward, terminated, truncated, info)"


class Fault(Exception):
    """One sentence."""


def main(argv):
    """Print what is wrong with the world, or a summary -> exit code 2 or 0."""
    parser = argparse.ArgumentParser(prog="python -m envs", description=__doc__)
    parser.add_argument("world", help="household, gym:ID, a module of your own ...")
    add_env_options(parser)
    try:
        args = parser.parse_args(argv)
        faults, summary = check_world(args.world, **args.env_options)
    except ConfigError as error:
        faults, summary = [str(error)], ""
    for fault in faults:
        print(f"error: {printable(fault)}")
    if not faults:
        print(f"ok: {summary}")
    return 2 if faults else 0


def try_world(config):
    """The first info of a run's world. ConfigError where the world cannot be had or played."""
    limit = config.env_options.get("max_steps", 1)
    if not is_step_limit(limit):
        raise ConfigError(f"--env_options: max_steps must be a whole number above 0, not {limit!r}")
    try:
        split = envs.world(config.env).SPLITS[0]
        options = envs.world_options(config)
        with envs.EnvPool(config.env, split, workers=1, **options) as pool:
            _, info = pool.reset({0: 0})[0]  # a package that is missing shows here
            check_info(info)
            if config.bc_episodes:
                pool.expert({0: ""})
            check_step(pool.step({0: ""})[0])
    except (ValueError, RuntimeError) as error:  # the world's own sentences
        raise ConfigError(error) from None
    except (Exception, SystemExit) as error:
        if isinstance(error, AttributeError) and "has no attribute 'expert'" in str(error):
            raise ConfigError(
                f"world {config.env!r} has no expert to clone: give --model without --bc_episodes"
            ) from None
        said = error if isinstance(error, Fault) else describe(error)
        raise ConfigError(
            f"world {config.env!r} does not work: {said} (python -m envs {config.env} checks it)"
        ) from None
    return info


def is_step_limit(value):
    return type(value) is int and value > 0


def check_world(name, tasks=4, **options):
    """Play `tasks` tasks of each split -> (list of sentences, one per fault; summary)."""
    try:
        module = load(name)
        check_splits(module)
        limit, options = check_options(module, options)
        sizes = {split: check_size(module, split) for split in module.SPLITS}
        check_make(module, sizes, options)
    except Fault as fault:
        return [str(fault)], ""
    faults = {}  # check -> first sentence: one of each kind is enough
    lengths = []
    wins = []  # of the expert
    for split, size in sizes.items():
        for index in random.Random(0).sample(range(size), min(tasks, size)):

            def make(split=split, index=index):
                return module.make(split, index, **options)

            for check in (check_episode, check_same_again, check_end, check_expert):
                try:
                    result = guarded(check, make)
                except Fault as fault:
                    faults.setdefault(check, f"task {index} of {split!r}: {fault}")
                    continue
                if check is check_episode:
                    lengths.append(result)
                elif check is check_expert and result is not None:
                    wins.append(result)
            if check_episode in faults:
                return list(faults.values()), ""
    lengths = [min(length, limit or LIMIT) for length in lengths]
    if max(lengths) >= LIMIT and "max_steps" in inspect.signature(module.make).parameters:
        faults[play] = f"no end in {LIMIT} steps: step must return truncated True at max_steps"
    if wins and not any(wins):
        faults[check_expert] = "the expert wins none of the tasks that were tried"
    return list(faults.values()), summarize(module, sizes, lengths, wins, limit)


def summarize(module, sizes, lengths, wins, limit):
    counts = ", ".join(f"{size} tasks in {split}" for split, size in sizes.items())
    parts = [
        f"{module.__name__} has {counts}; random play ends after {min(lengths)} to "
        f"{max(lengths)} steps"
    ]
    if limit:
        parts.append(f"episodes are truncated after {limit} steps")
    if wins:
        parts.append(f"the expert wins {sum(wins)} of {len(wins)} tasks")
    else:
        parts.append("it has no expert, so it needs --model")
    return "; ".join(parts)


# ---- the module --------------------------------------------------------------------------------


def load(name):
    """envs.world; a Fault where there is none, or where its code cannot be imported."""
    try:
        return envs.world(name)
    except ValueError as error:
        raise Fault(error) from None
    except (Exception, SystemExit) as error:
        raise Fault(f"{name} cannot be imported: {describe(error)}") from None


def check_splits(module):
    splits = module.SPLITS
    if not (isinstance(splits, tuple) and splits and all(isinstance(s, str) for s in splits)):
        raise Fault(f"SPLITS must be a tuple of names, the training split first, not {splits!r}")
    if not isinstance(getattr(module, "IN_PROCESS", True), bool):
        raise Fault("IN_PROCESS must be True or False")


def check_options(module, options):
    """-> envs.step_limit. A Fault where `make` does not take them, before any task is played."""
    limit = options.get("max_steps", 1)
    if not is_step_limit(limit):
        raise Fault(f"max_steps must be a whole number above 0, not {limit!r}")
    steps, passed_on = envs.step_limit(module, options)
    try:
        inspect.signature(module.make).bind(module.SPLITS[0], 0, **passed_on)
    except TypeError as error:
        raise Fault(f"make does not take the options {options}: {error}") from None
    return steps, passed_on


def check_size(module, split):
    size = guarded(module.size, split)
    if type(size) is not int or size < 1:
        raise Fault(f"size({split!r}) must return a whole number above 0, not {size!r}")
    return size


def check_make(module, sizes, options):
    first = module.SPLITS[0]
    refuses(module.size, "no such split", error=ValueError, what="size of an unknown split")
    refuses(module.make, "no such split", 0, error=ValueError, what="make of an unknown split")
    for split, size in sizes.items():
        for index in (size, -1):
            what = f"make({split!r}, {index}), where tasks are 0 to {size - 1},"
            refuses(module.make, split, index, error=IndexError, what=what)

    def begin(*task):
        return module.make(*task, **options).reset()

    default, given, again = (guarded(begin, *task) for task in ((), (first, 0), (first, 0)))
    if given != again:
        raise Fault(f"make({first!r}, 0) must begin the same task every time")
    if default != given:
        raise Fault(f"make() must be task 0 of {first!r}, the first split")


def refuses(call, *arguments, error, what):
    try:
        call(*arguments)
    except error:
        return
    except Exception as other:
        raise Fault(f"{what} must raise {error.__name__}, not {type(other).__name__}") from None
    raise Fault(f"{what} must raise {error.__name__}")


# ---- its envs: each check takes a function that makes one ---------------------------------------


def check_episode(make):
    """A random episode keeps the types -> its length."""
    return len(play(make(), seed=0)) - 1


def check_same_again(make):
    env = make()
    first = play(env, seed=1)
    if play(make(), seed=1) != first:
        raise Fault("the same actions in the same task must give the same answers every time")
    if play(env, seed=1) != first:
        raise Fault("reset must begin the task anew")
    if env.reset(seed=1) != first[0]:
        raise Fault("reset(seed=1) must begin the task as reset() does")
    for action in ("", "no such action\n\u00e9"):  # a model says anything
        if check_step(env.step(action)):
            env.reset()


def check_end(make):
    env = make()
    refuses(env.step, "x", error=RuntimeError, what="step before reset")
    outcome = play(env, seed=0)[-1]
    if outcome[2] or outcome[3]:
        refuses(env.step, "x", error=RuntimeError, what="step after the end")
    env.close()


def check_expert(make):
    """-> whether it wins; None where there is none."""
    env = make()
    if not hasattr(env, "expert"):
        return None
    env.reset()
    subgoal = ""
    for turn in range(LIMIT):
        advice = env.expert(subgoal)
        if advice is None:
            return False
        try:
            switch, wanted, action = advice
        except (TypeError, ValueError):
            raise Fault("expert must return (switch, subgoal, action) or None") from None
        if not (type(switch) is bool and isinstance(wanted, str) and isinstance(action, str)):
            raise Fault(f"expert must return a bool and two strings, not {advice!r}")
        if not wanted or not (switch or wanted == subgoal):
            raise Fault(f"expert must name a subgoal, on KEEP the one it holds, not {advice!r}")
        if not switch and not turn:
            raise Fault("expert must switch in the first turn: there is no subgoal to keep")
        subgoal = wanted
        outcome = env.step(action)
        if check_step(outcome):
            if not outcome[-1]["won"]:
                raise Fault("the expert does not win")
            return True
    raise Fault(f"the expert does not win in {LIMIT} steps")


def play(env, seed):
    """A random episode -> [(observation, info), what each step returned]."""
    rng = random.Random(seed)
    begun = env.reset()
    if not (isinstance(begun, tuple) and len(begun) == 2 and isinstance(begun[0], str)):
        raise Fault("reset must return (observation, info), the observation being text")
    check_info(begun[1])
    if begun[1]["won"]:
        raise Fault("info['won'] must be False after reset")
    transcript = [begun]
    for _ in range(LIMIT):
        admissible = transcript[-1][-1]["admissible"]
        transcript.append(env.step(rng.choice(admissible or [""])))
        if check_step(transcript[-1]):
            return transcript
        if transcript[-1][-1]["task"] != begun[1]["task"]:
            raise Fault("info['task'] must stay the same within an episode")
    return transcript


def check_step(outcome):
    """-> whether the episode has ended."""
    if not (isinstance(outcome, tuple) and len(outcome) == 5):
        raise Fault(STEP)
    observation, reward, terminated, truncated, info = outcome
    if not isinstance(observation, str) or not observation:
        raise Fault(f"{STEP}: the observation must be text, not {observation!r}")
    if not isinstance(reward, float):
        raise Fault(f"{STEP}: the reward must be a float, not {reward!r}")
    if type(terminated) is not bool or type(truncated) is not bool:
        raise Fault(f"{STEP}: terminated and truncated must be True or False")
    if terminated and truncated:
        raise Fault("step must not return both terminated and truncated")
    check_info(info)
    if reward != float(info["won"] and terminated):
        raise Fault(f"the reward must be 1.0 on the step that wins, else 0.0, not {reward!r}")
    return terminated or truncated


def check_info(info):
    wanted = {"task": str, "task_type": str, "admissible": list, "won": bool, "score": float}
    if not isinstance(info, dict):
        raise Fault("info must be a dict")
    for key, kind in wanted.items():
        if not isinstance(info.get(key), kind):
            raise Fault(f"info[{key!r}] must be a {kind.__name__}, not {info.get(key)!r}")
    for key in ("admissible", "subgoals"):
        texts = info.get(key, [])
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise Fault(f"info[{key!r}] must be a list of strings")
    progress = info.get("progress", 0.0)
    if not (isinstance(progress, int | float) and 0 <= progress <= 1):
        raise Fault(f"info['progress'] must be from 0 to 1, not {progress!r}")
    if not info["task"] or not isinstance(info.get("gamefile", ""), str):
        raise Fault("info['task'] and info['gamefile'] must be text")
    try:
        pickle.dumps(info)
    except Exception:
        raise Fault("info must hold plain values, which can be pickled") from None


# ---- errors ------------------------------------------------------------------------------------


def guarded(call, *arguments):
    """The call's answer; a Fault that says where, if the world's own code raises."""
    try:
        return call(*arguments)
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        raise Fault(f"{describe(error)}") from None
