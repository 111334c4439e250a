"""The episode viewer: episodes with their segments, tokens, values and advantages as one HTML file.

`python eval.py OUT --html FILE` and training (OUT/episodes.html) write it. viewer.html shows it.
`python eval.py OUT --show N` prints episodes instead.

B episodes, T turns, N turns in all, L response tokens.
"""

import codecs
import pickle
import warnings
from types import SimpleNamespace

import torch
from accelerate.utils import gather_object
from torch.distributed import checkpoint

import envs
import hiper
from baselines import baseline_advantages
from config import ConfigError
from hae import gae, normalize
from support.batch import make_batch
from support.loading import start_folder
from support.lora import add_critic, frozen_names
from support.metrics import format_episode
from support.pages import write_page
from support.scoring import compute_logprobs_and_values, micro_batches, score
from support.tokens import response_text, token_bytes

IN_TRAINING = 64  # episodes of an iteration that training writes
SHARDS = "pytorch_model_fsdp_0"  # Accelerate's folder in a checkpoint of FSDP2
LETTERS = {"switch": "s", "subgoal": "o", "action": "a"}  # a token's decision; "." for none


def write_training(out, done, run, episodes, old, advantages):
    """OUT/episodes.html: episodes of iteration `done` (from 1) with the credit that it used.

    run: train.Run; old: PolicyOutput of the policy that played; advantages: TokenAdvantages.
    """
    if not run.accelerator.is_main_process:
        return
    config = run.config
    shown = episodes[:IN_TRAINING]
    data = page_data(shown, old, advantages, config, run.tokenizer, has_critic=config.has_critic)
    data["title"] = f"{out}, iteration {done}"
    data["note"] = (
        f"{len(shown)} of {len(episodes)} training episodes, sampled at temperature 1. Values and "
        "advantages are those that this iteration's update used."
    )
    write_page(out / "episodes.html", "viewer.html", data)


def show_episodes(args, played, actor, config, tokenizer, accelerator):
    """Score the episodes that eval.py played under the run's policy, print the first args.show of
    them and write args.html.

    played: this process's Episodes, in any order; the first process shows those of all.
    """
    episodes = sorted(gather_object(played), key=lambda episode: episode.index)
    if not accelerator.is_main_process:
        return
    if not args.html:
        episodes = episodes[: args.show]
    out = getattr(args, "out", None)  # None with --model
    policy, note = load_policy_with_critic(actor, config, out)
    old, advantages = score_episodes(policy, episodes, config, tokenizer)
    has_critic = advantages is not None
    raw = advantages.raw if has_critic else {}
    for b, episode in enumerate(episodes[: args.show]):
        its_values = {name: values[b] for name, values in raw.items()}
        print(format_episode(episode, its_values), end="\n\n")
    if not args.html:
        return
    data = page_data(episodes, old, advantages, config, tokenizer, has_critic=has_critic)
    split = args.split or envs.world(config.env).SPLITS[-1]
    data["title"] = f"{out or args.model}, {split}"
    data["note"] = note
    write_page(args.html, "viewer.html", data)


def score_episodes(policy, episodes, config, tokenizer):
    """-> (PolicyOutput, TokenAdvantages over these episodes, or None without value heads)."""
    batch = make_batch(episodes, tokenizer)
    batches = micro_batches(batch.samples.total_lengths(), config.micro_batch_tokens)
    if policy.value_heads is None:
        return compute_logprobs_and_values(policy, batch.samples, batches), None
    run = SimpleNamespace(config=config, model=policy, tokenizer=tokenizer, reference=None)
    old, _, end_values, v_keep = score(run, batch, batches)
    if config.method != "hiper":
        advantages = baseline_advantages(batch, old, config, normalize, end_values=end_values)
    else:
        advantages = hiper.hiper_advantages(
            batch, old, config, normalize, end_values=end_values, v_keep=v_keep
        )
    return old, advantages


def load_policy_with_critic(actor, config, out):
    """The actor with the value heads of OUT/checkpoint -> (ActorCritic, a sentence on it).

    out: the run's folder, or None. Without a critic that can be read the value heads are None.
    """
    note = "Probabilities are the policy's own, at temperature 1."
    folder = out / "checkpoint" if out else None
    if not config.has_critic:
        missing = f"{config.method} has no critic"
    elif out is None:
        missing = "no critic: the model is not trained"
    elif not folder.is_dir():
        missing = f"no critic: {out} has no checkpoint"
    else:
        if config.lora:
            policy = add_critic(actor, start_folder(config, out), config)
        else:
            policy = hiper.ActorCritic(actor, config.critic)
        try:
            load_critic(policy, folder)
        except (
            *(RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError),
            checkpoint.CheckpointException,
        ):
            raise ConfigError(f"{folder} is damaged: evaluate {out}/best instead") from None
        return policy.to(actor.device), note
    return hiper.ActorCritic(actor, "none"), f"{note} No values or advantages, {missing}."


def load_critic(policy, folder):
    """Load all but the actor from a checkpoint, in place: one file, or the shards of FSDP2.

    KeyError where the checkpoint is another policy's.
    """
    frozen = frozen_names(policy)  # which no checkpoint holds
    critic = {
        name: weight
        for name, weight in policy.state_dict().items()
        if not name.startswith("actor.") and name not in frozen
    }
    if (folder / SHARDS).is_dir():
        with warnings.catch_warnings():  # that this is a single process
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load({"model": critic}, checkpoint_id=folder / SHARDS, no_dist=True)
        return  # into the tensors that the policy holds
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    found = {name for name in state if not name.startswith("actor.")}
    if found != set(critic):
        raise KeyError(f"not this policy's critic: {found ^ set(critic)}")
    policy.load_state_dict({name: state[name] for name in critic}, strict=False)


# ---- episodes as plain numbers -----------------------------------------------------------------


class Texts:
    """Texts that occur often, each written once: `self(text)` is its number."""

    def __init__(self):
        self.number_of = {}

    def __call__(self, text):
        return self.number_of.setdefault(text, len(self.number_of))

    def lines(self, text):
        return [self(line) for line in text.split("\n")]


def page_data(episodes, old, advantages, config, tokenizer, *, has_critic):
    """What viewer.html shows of `episodes`, as plain Python.

    old: PolicyOutput and advantages: TokenAdvantages, or None, of a batch that begins with these
    episodes. has_critic: whether the values of `old` mean anything.
    """
    batch = make_batch(episodes, tokenizer)
    texts, tokens = Texts(), Texts()
    flat = flat_gae(batch, old, advantages, config) if has_critic else None
    shown, n = [], 0  # n: turn of the batch
    for b, episode in enumerate(episodes):
        turns = []
        for t, turn in enumerate(episode.turns):
            record = _turn(turn, old, n, batch.samples, tokenizer, texts, tokens)
            record["trained"] = _trained(advantages, n, len(turn.response))
            if has_critic:
                values = [old.v_high[n], old.v_low[n], old.v_switch[n]]
                values = values if config.method == "hiper" else values[:1]
                record["values"] = [_round(value) for value in values]
            if advantages is not None:
                record["raw"] = _raw(advantages, b, t, turn, config)
                record["scaled"] = _scaled(advantages, n, batch.samples.masks)
            if flat is not None:
                record["flat"] = _round(flat[b, t])
            turns.append(record)
            n += 1
        shown.append(
            {
                "task": episode.task,
                "type": episode.task_type,
                "index": episode.index,
                "success": bool(episode.success),
                "score": _round(episode.task_score),
                "truncated": bool(episode.truncated),
                "turns": turns,
            }
        )
    settings = ("method", "prompt")
    return {
        "settings": {name: getattr(config, name) for name in settings},
        "texts": list(texts.number_of),
        "tokens": list(tokens.number_of),
        "episodes": shown,
    }


def flat_gae(batch, old, advantages, config):
    """Flat GAE [B, T] with HAE's own V_low, gamma and lam_low: only the boundaries are missing.

    None for other methods. The last turn's delta is HAE's, whatever it bootstraps from.
    """
    if config.method != "hiper" or advantages is None:
        return None
    rows = len(batch.samples.prompts)
    v_low = batch.to_grid(old.v_low[:rows])
    columns = batch.mask.shape[1]
    a_low = advantages.raw["A_action"][: len(batch.mask), :columns]
    last = torch.zeros_like(batch.mask)
    last[torch.arange(len(last)), batch.mask.sum(1) - 1] = True
    rewards = torch.where(last, a_low + v_low, batch.rewards)
    return gae(rewards, batch.mask, v_low, gamma=config.gamma, lam=config.lam_low)[0]


def _turn(turn, old, n, samples, tokenizer, texts, tokens):
    """What is known of a turn without a critic."""
    decision = turn.decision
    length = len(turn.response)
    logprobs = old.logprobs[n, :length]
    kinds = ["."] * length
    for kind, letter in LETTERS.items():
        for i in getattr(samples.masks, kind)[n, :length].nonzero().flatten().tolist():
            kinds[i] = letter
    written = samples.switch_word[n, :length]
    p_switch = None  # beta: the probability of the word SWITCH
    if written.any():
        p_written = logprobs[written].sum().exp()
        p_switch = _round(p_written if decision.switch else 1 - p_written)
    return {
        "observation": texts.lines(turn.observation),
        "prompt": texts.lines(response_text(turn.prompt, tokenizer)),
        "tokens": [tokens(text) for text in token_texts(turn.response, tokenizer)],
        "p": [round(float(p), 3) for p in logprobs.exp()],
        "kinds": "".join(kinds),
        "start": bool(turn.is_segment_start),
        "switch": bool(decision.switch),
        "subgoal": turn.subgoal,
        "drift": decision.drifts(turn.subgoal),
        "action": decision.action,
        "error": decision.error,
        "reward": _round(turn.reward),
        "beta": p_switch,
    }


def token_texts(ids, tokenizer):
    """The text of each token. A character that several tokens share stands with its last one."""
    table = token_bytes(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(table[i], final=k == len(ids) - 1) for k, i in enumerate(ids)]


def _trained(advantages, n, length):
    """A digit per token: 1 where the policy loss trains it."""
    if advantages is None:
        return ""
    return "".join("1" if on else "0" for on in advantages.token_mask[n, :length].tolist())


def _raw(advantages, b, t, turn, config):
    """{decision, or "all": advantage before normalisation}, for the decisions of this turn."""
    raw = {name: _round(values[b, t]) for name, values in advantages.raw.items()}
    if "A" in raw:
        return {"all": raw["A"]}
    found = {"a": raw["A_action"]}
    if turn.is_segment_start:
        found["o"] = raw["A_subgoal"]
    if t > 0 and config.segments == "learned":
        found["s"] = raw["A_switch"]
    return found


def _scaled(advantages, n, masks):
    """{decision, or "all": advantage of its tokens as the loss uses it}."""
    width = masks.action.shape[1]
    values, trained = advantages.advantages[n, :width], advantages.token_mask[n, :width]
    if "A" in advantages.raw:
        return {"all": _round(values[0])}
    spans = {letter: getattr(masks, kind)[n] & trained for kind, letter in LETTERS.items()}
    return {letter: _round(values[span][0]) for letter, span in spans.items() if span.any()}


def _round(x):
    return float(f"{float(x):.4g}")
