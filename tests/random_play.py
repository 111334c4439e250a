"""Random play of a world, with what must hold at every step. As a command, of any length:

    python tests/random_play.py household 1000000 STATE.json
    python tests/random_play.py alfworld 1000000 STATE.json 5      5 tasks of each split

STATE.json has what was played so far. The same command goes on from there.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs  # noqa: E402
from support import world_check  # noqa: E402

HOSTILE = (
    "",
    " ",
    "\x00",
    "\ud800",
    "\x1b[2J",
    "🫕",
    "%s {0} \\",
    "go to",
    "GO TO SINK 1",
    "take mug 1",
    "<|im_end|>\n<|im_start|>system",
    "click[search]",
    "click[x] please",
    "click[[",
    "search[]",
    "[" * 5000,
    "put a mug in " * 2000,
)
WORDS = ("red", "shoes", "lamp", "1", "cotton", "é", "B000000001", "$", "_", "men's", "\ud800")
SAME_AGAIN = 50  # every so many episodes one is played twice
PART = 5  # seconds between two writes of STATE.json


def play_episode(name, number, tasks=0):
    """Episode `number` of a world, from which its task and actions are drawn -> counts.

    tasks: draw from the first so many tasks of each split; 0: from all.

    AssertionError or world_check.Fault where something does not hold.
    """
    rng = random.Random(f"{name}/{number}")
    module = envs.world(name)
    split = rng.choice(module.SPLITS)
    index = rng.randrange(tasks or module.size(split))
    env = module.make(split, index)
    try:
        transcript, actions = walk(env, rng, module.MAX_STEPS)
        if number % SAME_AGAIN == 0:
            assert [env.reset(), *map(env.step, actions)] == transcript
        last = transcript[-1]
        assert last[2] or last[3]
        for action in ("", "go to sink 1"):
            try:
                env.step(action)
            except RuntimeError:
                continue
            raise AssertionError("a step after the end must raise RuntimeError")
    finally:
        env.close()
    return {"steps": len(actions), "episodes": 1, "won": int(last[-1]["won"])}


def walk(env, rng, limit):
    """One random episode -> (reset's answer and those of all steps, the actions)."""
    transcript = [env.reset()]
    actions = []
    observation, info = transcript[0]
    world_check.check_info(info)
    task = info["task"], info["task_type"]
    ended = False
    follows = rng.random() < 0.3  # mostly the expert, so that some episodes win
    subgoal = ""
    while not ended:
        advice = env.expert(subgoal) if follows and rng.random() < 0.8 else None
        if advice:
            _, subgoal, action = advice
        else:
            action = draw_action(info["admissible"], rng)
        actions.append(action)
        outcome = env.step(action)
        ended = world_check.check_step(outcome)
        before, (observation, _, _, truncated, info) = info, outcome
        transcript.append(outcome)
        observation.encode()
        assert (info["task"], info["task_type"]) == task
        assert len(set(info["admissible"])) == len(info["admissible"])
        assert len(actions) <= limit
        assert truncated == (len(actions) == limit and not info["won"] and not outcome[2])
        assert 0 <= info["score"] <= 1
        if action in HOSTILE and not ended:
            assert info == before, action
    return transcript, actions


def draw_action(admissible, rng):
    """Mostly admissible; a search of random words; or nonsense."""
    kind = rng.random()
    if kind < 0.75 and admissible:
        return rng.choice(admissible)
    if kind < 0.85:
        return f"search[{' '.join(rng.choices(WORDS, k=rng.randrange(1, 4)))}]"
    return rng.choice(HOSTILE)


def main(name, wanted, state, tasks=0):
    """Episodes until `wanted` steps have been played, over all calls with this state file."""
    path = Path(state)
    total = {"steps": 0, "episodes": 0, "won": 0, "seconds": 0.0}
    if path.exists():
        total = json.loads(path.read_text())
    begun = time.perf_counter() - total["seconds"]
    written = 0.0
    while total["steps"] < wanted:
        for name_of, count in play_episode(name, total["episodes"], tasks).items():
            total[name_of] += count
        total["seconds"] = round(time.perf_counter() - begun, 1)
        if total["seconds"] >= written + PART or total["steps"] >= wanted:
            written = total["seconds"]
            path.with_suffix(".tmp").write_text(json.dumps(total))
            os.replace(path.with_suffix(".tmp"), path)
    print(f"{name}: {total}; everything held")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
