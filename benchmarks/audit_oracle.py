"""The numbers of one HiPER iteration, computed anew for benchmarks/audit.py.

Nothing of hiper.py, hae.py or support/ is used: a plain Hugging Face forward pass of each turn
alone, without padding; positions and masks from decoded text; loops over floats. It is slow, and
it knows the paper's settings only (closed form, one-step targets, unit variance per decision).
"""

import copy
import functools
import math
import re
from statistics import fmean, pstdev, variance

import torch

KINDS = ("switch", "subgoal", "action")
HEADS = ("high", "low", "switch")


# ---- one turn ----------------------------------------------------------------------------------


@torch.no_grad()
def read_sequence(model, prompt, response):
    """Log-probabilities and entropies of the response -> two lists of floats."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # row j is of response token j
    logprobs = [float(table[j, token]) for j, token in enumerate(response)]
    return logprobs, (-(table.exp() * table).sum(-1)).tolist()


@torch.no_grad()
def read_values(critic, heads, prompt, response, place):
    """V_high and V_switch at the last prompt token, V_low at response token `place`."""
    ids = torch.tensor([prompt + response], device=critic.device)
    hidden = critic(input_ids=ids, use_cache=False).last_hidden_state[0].double()
    table = hidden @ heads.weight.double().T + heads.bias.double()  # high, low, switch
    at_prompt, at_subgoal = table[len(prompt) - 1], table[len(prompt) + place]
    return {
        "high": float(at_prompt[0]),
        "low": float(at_subgoal[1]),
        "switch": float(at_prompt[2]),
    }


def token_starts(tokenizer, response):
    """The character at which each token begins, and the text."""
    texts = [tokenizer.decode(response[:j]) for j in range(len(response) + 1)]
    return [len(text) for text in texts[:-1]], texts[-1]


def find_block(text, kind):
    return re.search(f"<{kind}>(.+?)</{kind}>", text, re.DOTALL)


def is_valid(text):
    """Each block once. (The answers of this script hold them in order, or no tag at all.)"""
    tags = [tag for kind in KINDS for tag in (f"<{kind}>", f"</{kind}>")]
    return all(text.count(tag) == 1 for tag in tags)


def token_kinds(tokenizer, response):
    """Each token's decision, or None. Without an action all tokens are the action's."""
    starts, text = token_starts(tokenizer, response)
    if not find_block(text, "action"):
        return ["action"] * len(response)
    kinds = [None] * len(response)
    for kind in KINDS:
        block = find_block(text, kind)
        for j, start in enumerate(starts):
            if block and block.start() <= start < block.end():
                kinds[j] = kind
    return kinds


def subgoal_place(tokenizer, response):
    """The last token that begins before the last character of </subgoal>; -1 for none."""
    starts, text = token_starts(tokenizer, response)
    block = find_block(text, "subgoal")
    return sum(start < block.end() - 1 for start in starts) - 1 if block else -1


def switch_word(tokenizer, response):
    """The tokens with a character of the word KEEP or SWITCH."""
    starts, text = token_starts(tokenizer, response)
    block = find_block(text, "switch")
    if not block or block[1].strip() not in ("KEEP", "SWITCH"):
        return []
    spans = enumerate(zip(starts, [*starts[1:], len(text)], strict=True))
    return [j for j, (a, b) in spans if block.start(1) < b and a < block.end(1)]


# ---- advantages --------------------------------------------------------------------------------


def advantages(rewards, opens, values, ends, keep, p_switch, config):
    """One episode, each argument a list over its turns -> (advantages, value targets).

    values: dicts high, low, switch; ends: the same of the state after the last turn, zeros where
    the task itself ended; keep: V_low of the carried subgoal; p_switch: beta.
    """
    gamma, turns = config.gamma, len(rewards)
    bounds = [t for t in range(turns) if opens[t]] + [turns]
    actions, subgoals = [0.0] * turns, [0.0] * turns
    targets = {head: [None] * turns for head in HEADS}
    later = 0.0  # A_high of the next segment
    for first, end in reversed(list(zip(bounds[:-1], bounds[1:], strict=True))):
        v_after = ends["high"] if end == turns else values[end]["high"]
        for t in range(first, end):
            v_next = values[t + 1]["low"] if t + 1 < end else v_after
            if t + 1 == turns:
                v_next = ends["low"]
            targets["low"][t] = rewards[t] + gamma * v_next
            paid = sum(gamma ** (u - t) * rewards[u] for u in range(t, end))
            targets["switch"][t] = paid + gamma ** (end - t) * v_after
        for t in range(first, end):
            actions[t] = sum(
                (gamma * config.lam_low) ** (u - t) * (targets["low"][u] - values[u]["low"])
                for u in range(t, end)
            )
        delta = targets["switch"][first] - values[first]["high"]
        targets["high"][first] = targets["switch"][first]
        later = delta + gamma ** (end - first) * config.lam_high * later
        subgoals[first] = later
    switches = [(opens[t] - p_switch[t]) * (values[t]["high"] - keep[t]) for t in range(turns)]
    return {"switch": switches, "subgoal": subgoals, "action": actions}, targets


def standardize(numbers):
    """Zero mean, unit variance; {key: number} in and out. Equal numbers are centred only."""
    centre, spread = fmean(numbers.values()), pstdev(numbers.values())
    if len(set(numbers.values())) == 1:
        spread = 1.0
    return {key: (number - centre) / (spread + 1e-8) for key, number in numbers.items()}


# ---- what an update reports --------------------------------------------------------------------


def loss_terms(rows, new, config):
    """rows: of each turn logprobs, reference, kinds' advantages (None: not trained), values,
    targets; new: of each turn logprobs, entropy, values under the weights of the pass -> metrics.
    """
    sums = dict.fromkeys(("policy_loss", "kl_to_reference", "clip_fraction", "entropy"), 0.0)
    trained = spoken = 0
    errors = {head: [] for head in HEADS}
    for row, now in zip(rows, new, strict=True):
        for j, old in enumerate(row["logprobs"]):
            spoken += 1
            d = row["reference"][j] - now["logprobs"][j]
            sums["kl_to_reference"] += math.exp(d) - d - 1
            advantage = row["advantages"][j]
            if advantage is None:
                continue
            trained += 1
            ratio = math.exp(now["logprobs"][j] - old)
            clipped = min(max(ratio, 1 - config.clip_range), 1 + config.clip_range)
            sums["policy_loss"] -= min(ratio * advantage, clipped * advantage)
            sums["clip_fraction"] += clipped * advantage < ratio * advantage
            sums["entropy"] += now["entropy"][j]
        for head in HEADS:
            if row["targets"][head] is not None:
                errors[head].append((now["values"][head] - row["targets"][head]) ** 2 / 2)
    return {
        "policy_loss": sums["policy_loss"] / spoken,
        "value_loss": sum(map(fmean, errors.values())),
        "kl_to_reference": sums["kl_to_reference"] / spoken,
        "clip_fraction": sums["clip_fraction"] / trained,
        "entropy": sums["entropy"] / trained,
    }


def explained_variance(rows, head):
    """1 - Var(target - value) / Var(target), over the turns that have a target."""
    pairs = [(row["values"][head], row["targets"][head]) for row in rows]
    pairs = [(value, target) for value, target in pairs if target is not None]
    left = variance(target - value for value, target in pairs)
    return 1 - left / variance(target for _, target in pairs)


def count_episodes(episodes, decode):
    """The metrics of the episodes themselves, counted from their texts."""
    texts = [[decode(turn.response) for turn in episode.turns] for episode in episodes]
    turns = [text for episode in texts for text in episode]
    valid = [is_valid(text) for text in turns]
    later = [text for episode in texts for text in episode[1:]]
    chosen = sum("<switch>SWITCH</switch>" in text for text in later)
    kinds = sorted({episode.task_type for episode in episodes})
    won = {kind: [e.success for e in episodes if e.task_type == kind] for kind in kinds}
    return {
        "episodes": len(episodes),
        "success": fmean(episode.success for episode in episodes),
        "score": fmean(episode.task_score for episode in episodes),
        **{f"success_by_type.{kind}": fmean(results) for kind, results in won.items()},
        **{f"episodes_by_type.{kind}": len(results) for kind, results in won.items()},
        "episode_length": len(turns) / len(episodes),
        "switches_per_episode": chosen / len(episodes),
        "segment_length": len(turns) / (chosen + len(episodes)),
        "switch_rate": chosen / max(1, len(later)),
        "valid_format_rate": fmean(valid),
        "truncation_rate": fmean(episode.truncated for episode in episodes),
        "restarts": 0,
    }


# ---- all together -------------------------------------------------------------------------------


def recompute(made, policy, reference, tokenizer, config, accelerator):
    """-> (metrics, rows: one dict for each turn, as `loss_terms` reads them)."""
    later = copy.deepcopy(policy)
    later.load_state_dict(made["weights"])
    read = functools.partial(read_turn, tokenizer=tokenizer)
    rows = []
    with accelerator.autocast():
        for number, episode in enumerate(made["episodes"]):
            rows += read_episode(number, episode, policy, tokenizer, config)
        for row in rows:
            sequence = row["prompt"], row["response"]
            row["reference"], _ = read_sequence(reference.actor, *sequence)
        spread_advantages(rows, tokenizer)
        first = [read(row, policy) for row in rows]
        second = [read(row, later) for row in rows]
    terms = [loss_terms(rows, new, config) for new in (first, second)]
    heads = {f"explained_variance.{h}": explained_variance(rows, h) for h in HEADS}
    return {
        "iteration": 0,
        **count_episodes(made["episodes"], tokenizer.decode),
        **{name: (terms[0][name] + terms[1][name]) / 2 for name in terms[0]},
        "skipped_steps": 0,
        "lr": config.lr,
        **heads,
    }, rows


def read_turn(row, policy, tokenizer):
    logprobs, entropy = read_sequence(policy.actor, row["prompt"], row["response"])
    return {"logprobs": logprobs, "entropy": entropy, "values": values_of(policy, row, tokenizer)}


def values_of(policy, row, tokenizer):
    row["place"] = subgoal_place(tokenizer, row["response"])
    sequence = row["prompt"], row["response"], row["place"]
    return read_values(policy.critic, policy.value_heads, *sequence)


def read_episode(number, episode, policy, tokenizer, config):
    """The rows of one episode, with its advantages before normalisation."""
    rows, carried = [], ""

    def kept_value(prompt, head):
        text = f"<switch>KEEP</switch><subgoal>{carried or 'None'}</subgoal>"
        block = tokenizer(text, add_special_tokens=False)["input_ids"]
        return values_of(policy, {"prompt": prompt, "response": block}, tokenizer)[head]

    for t, turn in enumerate(episode.turns):
        row = {"at": (number, t), "prompt": turn.prompt, "response": turn.response}
        row["text"] = tokenizer.decode(turn.response)
        row.update(read_turn(row, policy, tokenizer))
        row["opens"] = t == 0 or "<switch>SWITCH</switch>" in row["text"]
        word = sum(row["logprobs"][j] for j in switch_word(tokenizer, turn.response))
        row["p_switch"] = math.exp(word) if row["opens"] else 1 - math.exp(word)
        row["keep"] = kept_value(turn.prompt, "low")
        won = episode.success and t == len(episode.turns) - 1
        row["reward"] = 10 * won - config.invalid_penalty * (not is_valid(row["text"]))
        subgoal = find_block(row["text"], "subgoal")
        if row["opens"] and subgoal:
            carried = subgoal[1].strip()
        rows.append(row)
    ends = {h: kept_value(episode.final_prompt, h) if episode.truncated else 0.0 for h in HEADS}
    columns = ("reward", "opens", "values")
    raw, targets = advantages(
        *([row[name] for row in rows] for name in columns),
        ends,
        *([row[name] for row in rows] for name in ("keep", "p_switch")),
        config,
    )
    for t, row in enumerate(rows):
        row["raw"] = {kind: raw[kind][t] for kind in KINDS}
        row["targets"] = {head: targets[head][t] for head in HEADS}
    return rows


def spread_advantages(rows, tokenizer):
    """Normalise each decision's advantages and give them to its tokens."""
    kinds_of = {row["at"]: token_kinds(tokenizer, row["response"]) for row in rows}

    def decides(row, kind):
        free = {"switch": row["at"][1] > 0, "subgoal": row["opens"], "action": True}[kind]
        return free and kind in kinds_of[row["at"]]

    scaled = {
        kind: standardize({row["at"]: row["raw"][kind] for row in rows if decides(row, kind)})
        for kind in KINDS
    }
    for row in rows:
        kinds = kinds_of[row["at"]]
        row["advantages"] = [scaled[kind].get(row["at"]) if kind else None for kind in kinds]


# ---- the gradient ------------------------------------------------------------------------------


def gradients(rows, actor, critic, heads, config):
    """The whole loss, turn by turn, and autograd; clipped at norm 1 for actor and critic each."""
    spoken = sum(len(row["response"]) for row in rows)
    counts = {head: sum(row["targets"][head] is not None for row in rows) for head in HEADS}
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["response"]], device=actor.device)
        start = len(row["prompt"])
        table = actor(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
        logprobs = table.log_softmax(-1).gather(1, ids[0, start:, None]).squeeze(1)  # [L]
        old, reference = (row_tensor(row[name], ids) for name in ("logprobs", "reference"))
        advantage = row_tensor([a or 0.0 for a in row["advantages"]], ids)
        trained = row_tensor([a is not None for a in row["advantages"]], ids)
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        surrogate = -torch.minimum(ratio * advantage, clipped * advantage) * trained
        d = reference - logprobs
        weight = config.kl_coef * trained + config.untrained_kl_coef * (1 - trained)
        loss = (surrogate + weight * (d.exp() - d - 1)).sum() / spoken
        hidden = critic(input_ids=ids, use_cache=False).last_hidden_state[0].float()
        with torch.autocast(hidden.device.type, enabled=False):
            at_prompt, at_subgoal = heads(hidden[[start - 1, start + row["place"]]])
        values = {"high": at_prompt[0], "low": at_subgoal[1], "switch": at_prompt[2]}
        for head, value in values.items():
            if row["targets"][head] is not None:
                loss = loss + (value - row["targets"][head]) ** 2 / 2 / counts[head]
        loss.backward()
    torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
    torch.nn.utils.clip_grad_norm_([*critic.parameters(), *heads.parameters()], 1.0)


def row_tensor(numbers, like):
    return torch.tensor(numbers, dtype=torch.float32, device=like.device)
