"""Demonstrations: episodes of a world's scripted expert, with mistakes on purpose."""

import random

import envs
import hiper
from config import ConfigError
from rollout import AgentState


def demonstrated_tasks(size, count, few):
    """`count` task indices: the first tasks, all again if there are too few; or spread over `few`
    tasks of the split."""
    few = min(few, size)
    if not few:
        return [n % size for n in range(count)]
    return [n * few // count * size // few for n in range(count)]


def demonstrations(
    pool,
    tasks,
    config,
    *,
    random_subgoals=0.0,
    action_noise=0.0,
    wrong_actions=0.0,
    disguises=0,
):
    """Episodes of the scripted expert -> list of (prompt, response, shorter prompt, turns left).

    Three texts; the shorter prompt lacks the history and is "" where there is none. Turns left to
    the success: None in an episode without success. The expert plans badly on purpose: with
    probability `random_subgoals`, when it switches, it takes any subgoal one could choose now
    (info["subgoals"]), and shows that one. With probability `action_noise` another action happens
    than the one it shows, admissible now or earlier, so that the clone sees how to go on after a
    mistake. With probability `wrong_actions` an action of another episode happens, which mostly
    fails here. `disguises` further copies follow, each under other names (world.disguise).
    An episode that is lost with its environment is begun once more, then left out.
    ConfigError where the world has no expert, or none that begins, or no `disguise`.
    """
    world = envs.world(pool.name)
    if disguises and not hasattr(world, "disguise"):
        raise ConfigError(f"world {pool.name!r} has no `disguise`: leave out `disguises`")
    rng = random.Random(config.seed)
    noise = dict(
        random_subgoals=random_subgoals, action_noise=action_noise, wrong_actions=wrong_actions
    )
    episodes = []
    for start in range(0, len(tasks), config.num_envs):
        part = dict(enumerate(tasks[start : start + config.num_envs]))
        played = _demonstrate(pool, part, config, rng, **noise)
        lost = {slot: index for slot, index in part.items() if slot not in played}
        if lost:
            played.update(_demonstrate(pool, lost, config, rng, **noise))
        episodes += played.values()
    if not any(episodes):
        raise ConfigError(f"the expert of world {pool.name!r} gives no advice in the first turn")
    copies = [world.disguise(episodes, rng) for _ in range(disguises)]
    return [turn for part in [episodes, *copies] for turns in part for turn in turns]


def _demonstrate(pool, tasks, config, rng, *, random_subgoals, action_noise, wrong_actions):
    """Play {slot: task index} side by side -> {slot: list of turns}, without lost episodes."""
    resets = pool.reset(tasks)
    agents = {slot: AgentState(config, tasks[slot], *resets[slot]) for slot in tasks}
    seen_actions = {slot: [] for slot in tasks}
    shown = {slot: [] for slot in tasks}  # (prompt, response, shorter prompt) of each turn
    succeeded = set()
    while agents:
        advice = _advice(pool, agents, rng, random_subgoals)
        for slot in agents.keys() - advice.keys():
            del agents[slot]
            if pool.failed[tasks[slot]]:  # else the expert has no more advice
                del shown[slot]
        done = {}
        for slot, (switch, subgoal, action) in advice.items():
            state = agents[slot]
            seen_actions[slot].extend(state.info["admissible"])
            done[slot] = action
            if rng.random() < action_noise:
                done[slot] = rng.choice(seen_actions[slot])
            if wrong_actions and rng.random() < wrong_actions:
                done[slot] = rng.choice(rng.choice(list(agents.values())).info["admissible"])
            if config.prompt == "flat":
                response = hiper.format_flat_response(subgoal, action)
            else:
                response = hiper.format_response(switch, subgoal, action)
            shown[slot].append((state.prompt(), response, state.shorter_prompt()))
        for slot, outcome in pool.step(done).items():
            switch, subgoal, _ = advice[slot]
            if outcome is None:  # lost with its environment process
                del agents[slot], shown[slot]
                continue
            happened = hiper.Decision(switch, subgoal, done[slot], True, "")
            agents[slot].record_turn([], [], happened, outcome)
            if outcome[-1]["won"]:
                succeeded.add(slot)
        agents = {slot: state for slot, state in agents.items() if not state.ended}
    return {
        slot: [
            (*texts, len(turns) - 1 - t if slot in succeeded else None)
            for t, texts in enumerate(turns)
        ]
        for slot, turns in shown.items()
    }


def _advice(pool, agents, rng, random_subgoals):
    """{slot: (switch, subgoal, action)} of the expert, without episodes it cannot go on with."""
    try:
        advice = pool.expert({slot: state.subgoal for slot, state in agents.items()})
    except AttributeError:
        raise ConfigError(
            f"world {pool.name!r} has no expert to clone: give --model without --bc_episodes"
        ) from None
    advice = {slot: reply for slot, reply in advice.items() if reply}
    random_choice = {}
    for slot, (switch, _, _) in advice.items():
        choices = agents[slot].info.get("subgoals")
        if switch and choices and rng.random() < random_subgoals:
            random_choice[slot] = rng.choice(choices)
    for slot, reply in pool.expert(random_choice).items():
        if reply:
            advice[slot] = (True, *reply[1:])
    return advice
