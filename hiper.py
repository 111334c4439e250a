"""The plan-execute policy and its loss: prompt, parser, decision masks, actor-critic, PPO with three advantages.

One LLM plans and executes. Each turn it writes

    <switch>KEEP|SWITCH</switch><subgoal>...</subgoal><action>...</action>

so that pi(q, o, a | s) = pi(q | s, o_prev) pi(o | s)^q pi(a | s, o)                                    (paper, section 3)
and the policy gradient has one term per decision, each with an advantage of its own:                   # Thm 4.1
    grad J = E sum_t [ grad log pi(q_t) A_switch + q_t grad log pi(o_t) A_high + grad log pi(a_t) A_low ]

N turns (samples), L response tokens, P prompt tokens, H hidden size. q switch, o subgoal, a action, s prompt.

Follow one turn: `plan_execute_prompt` -> generate -> `parse` -> env; then `decision_masks` -> `ActorCritic` -> `hae` (hae.py)
-> `token_advantages` -> `ppo_loss`.

Deviations from the paper: (1) KL to the reference is taken over all response tokens, the policy term over decision tokens; what no
decision trains (KEEP's subgoal, text outside the blocks) may be held with a weight of its own, since nothing else keeps it in shape.
From the released code: (2) masks come from the sampled ids, not from text tokenised again; (3) one token-weighted mean over
all ranks and micro-batches, not a mean of means; (4) on KEEP the carried subgoal stays, whatever the block repeats.
"""

import re
import weakref
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.last_layer import reading

# ---- prompt -----------------------------------------------------------------------------------------------------------

PLAN_EXECUTE = """You act in a text world and work on a task by short-term subgoals, one action per turn.

Task: {task}
{history}Observation: {observation}
Subgoal you carry: {subgoal}
{actions}
First decide whether the subgoal still stands. Then name the subgoal, then act on it. Answer with these three blocks and \
nothing else:
<switch>KEEP</switch> while the subgoal stands, <switch>SWITCH</switch> when it is reached, hopeless or None
<subgoal>on KEEP the carried subgoal word for word; on SWITCH a new one, reachable in a few actions</subgoal>
<action>exactly one of the admissible actions</action>"""

FLAT = """You act in a text world and work on a task, one action per turn.

Task: {task}
{history}Observation: {observation}
{actions}
Think first, then act. Answer with these two blocks and nothing else:
<think>your reasoning</think>
<action>exactly one of the admissible actions</action>"""

BRIEF_FLAT = "Task: {task}.\n{history}{observation}\n{actions}"  # for a model that was cloned, not instructed
BRIEF = BRIEF_FLAT.replace(
    "{actions}", "Subgoal: {subgoal}.\n{actions}"
)  # what is admissible is read in the subgoal's light


def plan_execute_prompt(task, observation, subgoal="", history=(), admissible=(), brief=False):
    """The text of one turn. history: the last (observation, action) pairs, oldest first; subgoal: o_{t-1}, "" at turn 0."""
    return _fill(BRIEF if brief else PLAN_EXECUTE, task, observation, subgoal, history, admissible)


def flat_prompt(task, observation, history=(), admissible=(), brief=False):
    """The baselines' prompt, without a plan: <think> and <action>."""
    return _fill(BRIEF_FLAT if brief else FLAT, task, observation, "", history, admissible)


def _fill(template, task, observation, subgoal, history, admissible):
    past = "".join(f"Earlier: {seen}\nYou did: {did}\n" for seen, did in history)
    actions = (
        "Admissible actions: " + ", ".join(f"'{a}'" for a in admissible) + "\n"
        if admissible
        else ""
    )
    return template.format(
        task=task, observation=observation, subgoal=subgoal or "None", history=past, actions=actions
    )


def response(switch, subgoal, action):
    """What a perfectly formed answer looks like: the demonstrator writes this."""
    return keep_block(subgoal, "SWITCH" if switch else "KEEP") + f"<action>{action}</action>"


def flat_response(thought, action):
    """The same for the flat prompt."""
    return f"<think>{thought}</think><action>{action}</action>"


def keep_block(subgoal, word="KEEP"):
    """A KEEP block with the carried subgoal: scoring it gives the counterfactual V_low(s, o_{t-1})."""
    return f"<switch>{word}</switch><subgoal>{subgoal or 'None'}</subgoal>"


# ---- parser -----------------------------------------------------------------------------------------------------------

KINDS = ("switch", "subgoal", "action")
# Well-formed: the tags of one kind with none of the three kinds' tags between them. Bytes, so that `parse` and
# `decision_masks` cannot disagree.
BLOCK = {
    kind: re.compile(
        rb"<%s>([^<]*(?:<(?!/?(?:switch|subgoal|action)>)[^<]*)*)</%s>"
        % (kind.encode(), kind.encode())
    )
    for kind in KINDS
}


class Decision(NamedTuple):
    """One parsed turn. Unreadable parts: switch False, subgoal and action ""."""

    switch: bool  # q: SWITCH (True) or KEEP
    subgoal: str  # o
    action: str  # a
    valid: bool
    error: str  # "" when valid, else what was wrong, in a few words


def parse(text):
    """Read the three blocks -> Decision. Never raises. The first well-formed block of a kind counts.

    Valid: the three blocks once each, in order, `KEEP` or `SWITCH` to the letter, subgoal and action not empty. Text around the
    blocks is tolerated.
    """
    raw = text.encode("utf-8", "replace")
    blocks = {kind: BLOCK[kind].search(raw) for kind in KINDS}
    body = {
        kind: b[1].decode("utf-8", "replace").strip() if b else "" for kind, b in blocks.items()
    }
    error = ""
    for kind in KINDS:
        tags = raw.count(b"<%s>" % kind.encode()), raw.count(b"</%s>" % kind.encode())
        if blocks[kind] is None:
            error = error or (
                f"no <{kind}> block" if tags == (0, 0) else f"<{kind}> block not well-formed"
            )
        elif not body[kind]:
            error = error or f"empty <{kind}> block"
        elif tags != (1, 1):
            error = error or f"more than one <{kind}> tag"
    if not error and body["switch"] not in ("KEEP", "SWITCH"):
        error = f"<switch> holds {body['switch'][:20]!r}, not KEEP or SWITCH"
    if (
        not error
        and not blocks["switch"].end()
        <= blocks["subgoal"].start()
        < blocks["subgoal"].end()
        <= blocks["action"].start()
    ):
        error = "blocks out of order"
    return Decision(body["switch"] == "SWITCH", body["subgoal"], body["action"], not error, error)


def parse_flat(text):
    """Read <think> and <action> -> Decision without switch and subgoal. Never raises. Valid: both once, in order, not empty."""
    raw = text.encode("utf-8", "replace")
    action = BLOCK["action"].search(raw)
    body = action[1].decode("utf-8", "replace").strip() if action else ""
    tags = [b"<think>", b"</think>", b"<action>", b"</action>"]
    places = [raw.find(tag) for tag in tags]
    once = (
        [raw.count(tag) for tag in tags] == [1] * 4
        and places == sorted(places)
        and raw[places[0] + 7 : places[1]].strip()
    )
    error = (
        "no <action> block"
        if not action
        else "empty <action> block"
        if not body
        else ""
        if once
        else "<think> block not well-formed"
    )
    return Decision(False, "", body, not error, error)


# ---- decision masks ---------------------------------------------------------------------------------------------------


class Masks(NamedTuple):
    """Which response tokens belong to which decision; a token belongs to one at the most. Each bool [N, L]."""

    switch: torch.Tensor
    subgoal: torch.Tensor
    action: torch.Tensor


class Table(list):
    """A list that answers b"" past its end: Qwen2.5 models have 271 or 399 more ids than their tokenizer, and can sample them."""

    def __getitem__(self, i):
        return super().__getitem__(i) if i < len(self) else b""


_tables = weakref.WeakKeyDictionary()  # tokenizer -> its length, its id -> bytes table
_plain = weakref.WeakKeyDictionary()  # tokenizer -> that table, a list, its entries' lengths


def token_bytes(tokenizer):
    """list of bytes: what each id stands for, so that joining a sequence's entries gives its text exactly."""
    size, table = _tables.get(tokenizer, (None, None))
    if size == len(tokenizer):
        return table
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # byte-level BPE writes these bytes as themselves,
    others = [
        b for b in range(256) if b not in printable
    ]  # the others as the characters from 256 on
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    vocab = tokenizer.get_vocab()
    table = Table([b""] * (max(vocab.values()) + 1))  # a gap in the ids stands for nothing
    for token, i in vocab.items():
        if i in added:  # a special token: its own text
            table[i] = added[i].encode()
        elif "ByteLevel" in decoder:  # GPT-2, Qwen, Llama 3
            table[i] = bytes(byte_of[c] for c in token)
        elif decoder == "None":  # word level: decode joins with spaces
            table[i] = f" {token}".encode()
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # sentencepiece's byte fallback
            table[i] = bytes([int(token[3:5], 16)])
        else:  # sentencepiece writes a space as U+2581
            table[i] = token.replace("\u2581", " ").encode()
    _tables[tokenizer] = len(tokenizer), table
    return table


def response_text(ids, tokenizer):
    """The text of generated ids (a list), read from the same table as the masks."""
    table = token_bytes(tokenizer)
    return b"".join(table[i] for i in ids).decode("utf-8", "replace")


def decision_masks(ids, lengths, tokenizer):
    """Generated ids -> Masks. ids: int [N, L], right-padded; lengths: int [N]. ValueError on other shapes.

    A decision's tokens are its whole block, tags included; a token belongs to the block that holds its first character (of a
    merged `></` that is the block before). Only the first well-formed block of a kind counts. Without a readable action the
    whole response counts as action, so that what went wrong is what is trained.
    """
    ids, lengths = torch.as_tensor(ids), torch.as_tensor(lengths)
    if (
        ids.ndim != 2
        or lengths.shape != ids.shape[:1]
        or (lengths.numel() and int(lengths.max()) > ids.shape[1])
    ):
        raise ValueError(
            f"ids must be [N, L] and lengths [N], at most L: got {tuple(ids.shape)} and {tuple(lengths.shape)}"
        )
    table, size = _sizes(tokenizer)
    known = ids.clamp(max=len(table) - 1)  # the last entry, b"", for all ids beyond the tokenizer
    piece, (switch, subgoal, action) = table.__getitem__, (BLOCK[kind].search for kind in KINDS)
    spans = []  # N x 3 x 2: each decision's first byte, one past its last
    for row, length in zip(known.tolist(), lengths.tolist()):
        text = b"".join(map(piece, row[:length]))
        acts = action(text)
        if acts is None or not acts[1].decode("utf-8", "replace").strip():  # as `parse` reads it
            spans += 0, 0, 0, 0, 0, len(text) + 1
        else:
            for block in (switch(text), subgoal(text), acts):
                spans += block.span() if block else (0, 0)
    first, past = (
        torch.tensor(spans, device=ids.device).view(len(ids), 3, 1, 2).unbind(-1)
    )  # [N, 3, 1] each
    size = size.to(ids.device)[known]  # [N, L] bytes of each token
    starts = (size.cumsum(1) - size)[
        :, None
    ]  # [N, 1, L] byte offset of each token's first character
    inside = (
        torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
    )  # [N, L]
    return Masks(*((first <= starts) & (starts < past) & inside[:, None]).unbind(1))


def _sizes(tokenizer):
    """The table as a plain list that ends with b"", and the length of each entry, int [V + 1]."""
    table = token_bytes(tokenizer)
    if table is not _plain.get(tokenizer, (None,))[0]:
        _plain[tokenizer] = table, [*table, b""], torch.tensor([*map(len, table), 0])
    return _plain[tokenizer][1:]


# ---- actor-critic -----------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What one forward says of N turns."""

    logp: torch.Tensor  # [N, L] log pi of each response token, 0 on padding
    entropy: torch.Tensor  # [N, L] without gradient
    v_high: torch.Tensor  # [N] V_high(s)           read at the last prompt token
    v_low: torch.Tensor  # [N] V_low(s, o)         read at the last token of </subgoal>
    v_switch: torch.Tensor  # [N] V_switch(s, o_prev) read at the last prompt token

    def value(self, head):
        """[N] of head high, low or switch."""
        return getattr(self, f"v_{head}")


class ActorCritic(nn.Module):
    """A causal LM with three linear value heads, on its own backbone (`shared`) or on a second one (`separate`)."""

    def __init__(self, actor, critic="shared", temperature=1.0):
        super().__init__()
        if critic not in ("shared", "separate"):
            raise ValueError(f"critic must be shared or separate, not {critic!r}")
        self.actor, self.temperature = actor, temperature
        self.critic = deepcopy(actor.base_model) if critic == "separate" else None
        self.heads = nn.Linear(actor.config.hidden_size, 3)  # V_high, V_low, V_switch
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, ids, prompt_lengths, lengths, subgoal_end, parts=("logp", "values")):
        """Score N turns -> Scores (None for the parts not asked for).

        ids: int [N, P + L], each row prompt then response, right-padded (so causal attention needs no mask, and positions are
        those of generation); prompt_lengths, lengths: int [N] prompt and response tokens; subgoal_end: int [N] index *in the
        response* of the last token of </subgoal>, -1 (the last prompt token) where there is none.
        """
        logp = entropy = v_high = v_low = v_switch = None
        rows = torch.arange(len(ids), device=ids.device)
        last, acts = (
            prompt_lengths - 1,
            prompt_lengths + subgoal_end,
        )  # [N] each, where the heads read
        valued = torch.zeros_like(ids, dtype=torch.bool)  # [N, P + L]
        valued[rows, last] = valued[rows, acts] = True
        if "logp" in parts:
            where = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]  # [N, L]
            n, t = where.nonzero(as_tuple=True)  # [M] each: row and place of a response token
            at, read = prompt_lengths[n] - 1 + t, valued.clone()  # [M] one before it
            read[n, at] = True
            with reading(self.actor.base_model, read):
                hidden = self.actor.base_model(
                    input_ids=ids, use_cache=False
                ).last_hidden_state  # [N, P + L, H]
            flat = token_logp(
                hidden[n, at], ids[n, at + 1], self.actor.get_output_embeddings(), self.temperature
            )
            logp, entropy = (
                hidden.new_zeros(where.shape, dtype=torch.float32).index_put((where,), x)
                for x in flat
            )
        if "values" in parts:
            if self.critic is not None or logp is None:
                backbone, width = (
                    self.critic or self.actor.base_model,
                    int(acts.max()) + 1,
                )  # what comes after is not valued
                with reading(backbone, valued[:, :width]):
                    hidden = backbone(input_ids=ids[:, :width], use_cache=False).last_hidden_state
            v_high, _, v_switch = self.heads(hidden[rows, last]).float().unbind(1)  # [N] each
            v_low = self.heads(hidden[rows, acts]).float()[:, 1]
        return Scores(logp, entropy, v_high, v_low, v_switch)


def token_logp(hidden, targets, head, temperature=1.0, chunk=2**25):
    """Log-probability and entropy of M tokens without an [M, V] matrix in float32 at any time.

    hidden: [M, H]; targets: int [M]; head: the output projection; chunk: logits in memory at once. -> float32 [M], [M].
    """

    def part(h, y):
        logits = head(h).float() / temperature  # [m, V]
        log_z = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = log_z - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(-1, y[:, None]).squeeze(-1) - log_z, entropy

    rows = max(1, chunk // head.weight.shape[0])
    if len(hidden) <= rows:
        return part(hidden, targets)
    parts = [
        checkpoint(part, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), targets.split(rows))
    ]
    return tuple(map(torch.cat, zip(*parts)))


# ---- loss -------------------------------------------------------------------------------------------------------------


def token_advantages(masks, switch, adv_switch, adv_subgoal, adv_action):
    """Give every decision's tokens that decision's advantage.                                          # Thm 4.1

    masks: Masks [N, L]; switch: bool [N], True where a segment opens; adv_*: [N].
    -> (advantages [N, L], trained bool [N, L]). On KEEP turns the subgoal's tokens are not trained: q_t = 0.
    """
    opened = masks.subgoal & switch[:, None]  # q_t grad log pi(o_t)
    adv = (
        masks.switch * adv_switch[:, None]
        + opened * adv_subgoal[:, None]
        + masks.action * adv_action[:, None]
    )
    return adv, masks.switch | opened | masks.action


def policy_loss(logp, old_logp, adv, clip=0.2):
    """PPO's clipped surrogate, per token [N, L], to be minimised; and whether the clip was active."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * adv, clipped * adv), (clipped * adv < ratio * adv).detach()


def kl_k3(logp, ref_logp):
    """Schulman's k3 estimator of KL(pi || ref), per token [N, L]: exp(d) - d - 1 >= 0 with d = log ref - log pi."""
    d = ref_logp - logp
    return d.exp() - d - 1


def value_loss(value, old_value, target, clip=0.5):
    """Squared error [N] / 2, the worse of the free and the clipped value; clip 0 leaves the clip out."""
    loss = (value - target) ** 2
    if clip:
        near = old_value + (value - old_value).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - target) ** 2)
    return loss / 2
