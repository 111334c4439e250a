"""Play a world by hand: `python -m worlds.household`, `python -m worlds.alfworld`,
`python -m worlds.webshop`, `python -m worlds.babyai`, or `python -m support.play NAME` for a world
of one's own.

You see what an agent sees. The expert's hint is the answer that an agent would give: KEEP or
SWITCH, the subgoal and the action.
"""

import argparse
import contextlib
import re
import shutil
import sys
import textwrap

import envs
from config import ConfigError
from support.arguments import add_env_options
from support.metrics import printable

HELP = "a number or an action · ? hint · Enter list · :r restart · :n next task · :q quit"


def main(name, argv=None):
    """Play world `name` in the terminal -> exit code."""
    try:
        args = _read_arguments(name, argv)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, makes `input` keep a history
        with envs.EnvPool(name, args.split, workers=1, **args.options) as pool:
            return Game(pool, args.size).play(args.task)
    except (ConfigError, TypeError, ValueError, LookupError, RuntimeError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _read_arguments(name, argv):
    splits = envs.world(name).SPLITS
    parser = argparse.ArgumentParser(
        prog=f"python -m worlds.{name}"
        if name in envs.WORLDS
        else f"python -m support.play {name}",
        description=f"Play {name} by hand. At the prompt: {HELP}.",
    )
    parser.add_argument("--split", default=splits[0], help=f"{' or '.join(splits)} [{splits[0]}]")
    parser.add_argument("--task", type=int, default=0, metavar="N", help="number of the task [0]")
    text = "the page that the tiny agent reads, where the world has one"
    parser.add_argument("--tiny", action="store_true", help=text)
    add_env_options(parser)
    args = parser.parse_args(argv)
    if args.split not in splits:
        raise ConfigError(f"{name} has no split {args.split!r}: choose {' or '.join(splits)}")
    args.size = envs.size(name, args.split)
    if not 0 <= args.task < args.size:
        raise ConfigError(f"--task: {args.split} has tasks 0 to {args.size - 1}, not {args.task}")
    tiny = getattr(envs.world(name), "TINY_AGENT", {}) if args.tiny else {}
    args.options = {**tiny, **args.env_options}
    return args


class Game:
    """One task after the other, in slot 0 of the pool, whose split has `size` tasks."""

    def __init__(self, pool, size):
        self.pool = pool
        self.size = size

    def play(self, task):
        """Ask for actions until the player leaves -> exit code 0."""
        self.begin(task)
        while True:
            try:
                words = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if words == ":q":
                return 0
            if words == ":r":
                self.begin(self.task)
            elif words == ":n":
                self.begin((self.task + 1) % self.size)
            elif words == "?":
                self.hint()
            elif words == "":
                self.list_actions()
            elif self.ended:
                print("The episode has ended: :r restarts it, :n takes the next task, :q quits.")
            elif words.isdecimal() and not 1 <= int(words) <= len(self.actions):
                print(f"There are actions 1 to {len(self.actions)}.")
            else:
                self.step(self.actions[int(words) - 1] if words.isdecimal() else words)

    def begin(self, task):
        """Show the task from its start."""
        self.task, self.steps, self.ended = task, 0, False
        self.subgoal = ""  # the one that the last hint named
        observation, info = self.pool.reset({0: task})[0]
        print(
            f"\nTask {task} of 0 to {self.size - 1} in {self.pool.split}: {printable(info['task'])}"
        )
        print(HELP)
        self.show(observation, info)

    def step(self, action):
        """Do the action and show what came of it."""
        try:  # `search[<your query>]`: what stands in <> is asked for
            action = re.sub("<(.+?)>", lambda found: input(f"{found[1]}: "), action)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        outcome = self.pool.step({0: action})[0]
        if outcome is None:
            print("The world failed, so the task begins anew.")
            self.begin(self.task)
            return
        observation, _, terminated, truncated, info = outcome
        self.steps += 1
        self.ended = terminated or truncated
        self.show(observation, info)
        if self.ended:
            result = "Won" if info["won"] else "Out of steps" if truncated else "Lost"
            print(f"{result} after {self.steps} steps, score {info['score']:.2f}. :r, :n or :q?")

    def show(self, observation, info):
        """Print what an agent sees, and the actions."""
        self.actions = info["admissible"]
        width = shutil.get_terminal_size().columns
        print()
        for line in printable(observation).split("\n"):
            print(textwrap.fill(line, width))
        if not self.ended:
            self.list_actions()

    def list_actions(self):
        """Print the admissible actions with their numbers, in columns."""
        cells = [f"{n:3d} {printable(action)}" for n, action in enumerate(self.actions, 1)]
        width = max(map(len, cells), default=0) + 2
        columns = max(1, shutil.get_terminal_size().columns // width)
        for start in range(0, len(cells), columns):
            print("".join(cell.ljust(width) for cell in cells[start : start + columns]).rstrip())

    def hint(self):
        """Print what the expert would answer now."""
        try:
            advice = None if self.ended else self.pool.expert({0: self.subgoal})[0]
        except AttributeError:
            print("This world has no expert.")
            return
        if advice is None:
            print("The expert has no advice here.")
            return
        switch, self.subgoal, action = advice
        decision = "SWITCH to" if switch else "KEEP"
        print(f"{decision} '{printable(self.subgoal)}', then: {printable(action)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(
            "usage: python -m support.play NAME [--split SPLIT] [--task N] [--env_options JSON]"
        )
    sys.exit(main(sys.argv[1], sys.argv[2:]))
