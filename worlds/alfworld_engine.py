"""TextWorld's PDDL engine for alfworld.py, with caches and with readable names for the objects.

    engine = load(game)        game: the parsed JSON of a game.tw-pddl
    state = engine.reset()     state.feedback, state.admissible_commands, state.won
    release(engine)            another env of this process may use it from now on

The caches make a step about 20 times faster and a reset of a known game about 10 times
(benchmarks/alfworld.py). The text stays the same, which tests/test_alfworld.py checks.
"""

import contextlib
import copy
import functools
import pickle
import re
import sys
import zlib
from collections import Counter

# Sizes of the caches, per process. Full caches take about 60 MB.
MAX_GAMES = 512  # translated problems
MAX_EXPRESSIONS = 512  # parsed expressions of the grammar
MAX_FACTS = 20_000  # facts that textworld itself stores, 1.6 MB a game

# Engines of closed envs. They are reused, because every new engine loads its own copy of the
# planner's library (about 2.5 MB), which cannot be unloaded safely.
idle_engines = []


def load(game):
    """An engine that holds `game`. RuntimeError: textworld cannot be used, see `_new_engine`."""
    engine = idle_engines.pop() if idle_engines else _new_engine()
    with _keep_argv():
        engine.load(game)
    for identifier, name in names(engine._entity_infos).items():
        engine._entity_infos[identifier].name = name
    return engine


def reset(engine):
    """Start the engine's game -> its first state."""
    with _keep_argv():
        return engine.reset()


def release(engine):
    """Give the engine to the next env of this process."""
    idle_engines.append(engine)


def names(identifiers):
    """PDDL identifier -> the name in the text: {"mug_bar__plus_00_dot_1": "mug 1", ...}.

    An identifier is a kind and a position, joined by "_bar_". Objects of a kind are numbered from
    1, the last identifier in sorted order first, as alfworld does without domain randomization. A
    basin is not its sink. An identifier without "_bar_" stays as it is.
    """
    count = Counter()
    named = {}
    for identifier in sorted(identifiers, reverse=True):
        kind, bar, _ = identifier.partition("_bar_")
        if not bar:
            named[identifier] = kind
            continue
        if "basin" in identifier:
            kind += "basin"
        count[kind] += 1
        named[identifier] = f"{kind} {count[kind]}"
    return named


def _new_engine():
    # textworld installs on 3.13, but its grammar writes to locals(), which is a copy there.
    if sys.version_info >= (3, 13):
        raise RuntimeError(
            "ALFWorld's engine, textworld, fails on Python 3.13 and newer: use Python 3.11 or 3.12"
        )
    try:
        from textworld import EnvInfos

        return engine_class()(EnvInfos(won=True, admissible_commands=True))
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # OSError, RuntimeError: no native library
        raise RuntimeError(
            f"ALFWorld needs textworld with its PDDL engine ({error}): "
            "pip install -r requirements-alfworld.txt"
        ) from error


@functools.cache
def engine_class():
    """TextWorld's PddlEnv with caches. A function, so that textworld is imported only if needed."""
    import fast_downward
    from textworld.envs.pddl import PddlEnv, textgen

    cached_functions = _cached_functions(fast_downward, textgen)
    return type("Engine", (_CachedEngine, PddlEnv), {"_cached_functions": cached_functions})


def _cached_functions(fast_downward, textgen):
    """List of (module or class, name, cached function): what to call instead of textworld's own."""
    pddl2sas = fast_downward.pddl2sas
    parse_and_convert = functools.lru_cache(MAX_EXPRESSIONS)(textgen._parse_and_convert)
    parse_query = functools.lru_cache(MAX_EXPRESSIONS)(textgen.Rule.parse_conjunctive_query)

    @functools.lru_cache(MAX_GAMES)
    def translate_and_compress(domain, problem):
        return zlib.compress(pickle.dumps(pddl2sas(domain, problem)), 1)  # 1 MB to 60 kB

    def translate(domain, problem, verbose=False, optimize=False):
        if optimize:
            return None, ""  # an input of the planner, which is not used here
        return pickle.loads(zlib.decompress(translate_and_compress(domain, problem)))

    def parse(*text, **options):
        return copy.deepcopy(
            parse_and_convert(*text, **options)
        )  # textworld writes into the symbols

    return [
        (fast_downward, "pddl2sas", translate),
        (textgen, "_parse_and_convert", parse),
        (textgen.Rule, "parse_conjunctive_query", parse_query),
    ]


class _CachedEngine:
    """What differs from textworld's PddlEnv, as a mixin."""

    def __init__(self, infos):
        super().__init__(infos)
        self.downward_lib.load_sas_replan = lambda sas: None  # an input of the planner, see above

    def load(self, game):
        import mementos.core

        facts = getattr(mementos.core, "_memento_cache", {})
        if len(facts) > MAX_FACTS:
            facts.clear()  # textworld never does; equal facts are made again
        with self._caches():
            super().load(game)
        self._commands = {}  # (template, names of its objects) -> text; constant during a game

    def reset(self):
        with self._caches():
            return super().reset()

    def step(self, command):
        with self._caches():
            return super().step(command)

    @contextlib.contextmanager
    def _caches(self):
        """Put the cached functions in place for the block, then textworld's own again."""
        with contextlib.ExitStack() as stack:
            for owner, name, function in self._cached_functions:
                stack.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, function)
            yield

    def _gather_infos(self):
        """PddlEnv's method without the parts that alfworld.py does not read."""
        actions = list(self._pddl_state.all_applicable_actions())
        commands = [self._command(action) for action in actions]
        self.state.update(
            won=self._pddl_state.check_goal(),
            lost=False,
            _valid_actions=actions,
            _valid_commands=commands,
            admissible_commands=sorted(set(commands)),
        )

    def _command(self, action):
        """The text of an action, rendered when the action is first admissible."""
        template = action.command_template
        words = re.findall(r"\w+", template)
        objects = [
            entity.name
            for placeholder, entity in action.mapping.items()
            if placeholder.name in words
        ]
        key = (template, *objects)
        if key not in self._commands:
            self._commands[key] = self._render(action)
        return self._commands[key]

    def _render(self, action):
        variables = {
            placeholder.name: self._entity_infos[entity.name]
            for placeholder, entity in action.mapping.items()
        }
        context = {
            "state": self._pddl_state,
            "facts": [],
            "variables": variables,
            "mapping": action.mapping,
            "entity_infos": self._entity_infos,
        }
        text = self._logic.grammar.derive(action.command_template, context)
        return text.format(**{key: info.name for key, info in self._entity_infos.items()})


@contextlib.contextmanager
def _keep_argv():
    """The PDDL translator overwrites sys.argv. Restore it after the block."""
    argv = sys.argv
    try:
        yield
    finally:
        sys.argv = argv
