"""What the LLM reads and writes: prompts, the blocks of a response, and their tokens.

    <switch>KEEP|SWITCH</switch><subgoal>...</subgoal><action>...</action>

`parse` reads a response as the environment loop needs it. `decision_masks` says which of its
tokens belong to which decision. Both use the same patterns on the same bytes, so they agree.

N responses, L tokens.
"""

import re
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from support.tokens import token_bytes

# ---- prompt ------------------------------------------------------------------------------------

PLAN_EXECUTE = """\
You act in a text world and work on a task by short-term subgoals, one action per turn.

Task: {task}
{history}Observation: {observation}
Subgoal you carry: {subgoal}
{actions}
First decide whether the subgoal still stands. Then name the subgoal, then act on it. \
Answer with these three blocks and nothing else:
<switch>KEEP</switch> while the subgoal stands, <switch>SWITCH</switch> when it is reached, \
hopeless or None
<subgoal>on KEEP the carried subgoal word for word; on SWITCH a new one, reachable in a few \
actions</subgoal>
<action>exactly one of the admissible actions</action>"""

FLAT = """\
You act in a text world and work on a task, one action per turn.

Task: {task}
{history}Observation: {observation}
{actions}
Think first, then act. Answer with these two blocks and nothing else:
<think>your reasoning</think>
<action>exactly one of the admissible actions</action>"""

# For a model that was cloned and needs no instructions.
SHORT_PROMPT = "Task: {task}.\n{history}{observation}\nSubgoal: {subgoal}.\n{actions}"
SHORT_FLAT = "Task: {task}.\n{history}{observation}\n{actions}"


def plan_execute_prompt(task, observation, subgoal="", history=(), admissible=(), short=False):
    """The text of one turn.

    subgoal: o_{t-1}, "" at turn 0; history: the last (observation, action) pairs, oldest first.
    """
    template = SHORT_PROMPT if short else PLAN_EXECUTE
    return _fill(template, task, observation, subgoal, history, admissible)


def flat_prompt(task, observation, history=(), admissible=(), short=False):
    """The baselines' prompt without a plan: <think> and <action>."""
    template = SHORT_FLAT if short else FLAT
    return _fill(template, task, observation, "", history, admissible)


def _fill(template, task, observation, subgoal, history, admissible):
    past = "".join(f"Earlier: {seen}\nYou did: {did}\n" for seen, did in history)
    actions = ""
    if admissible:
        quoted = ", ".join(f"'{action}'" for action in admissible)
        actions = f"Admissible actions: {quoted}\n"
    return template.format(
        task=task,
        observation=observation,
        subgoal=shown(subgoal),
        history=past,
        actions=actions,
    )


def shown(subgoal):
    """A subgoal as prompts and plans show it; "" is that of an agent that carries none."""
    return subgoal or "None"


def format_plan(subgoal, switch):
    """The switch and subgoal blocks as text."""
    word = "SWITCH" if switch else "KEEP"
    return f"<switch>{word}</switch><subgoal>{shown(subgoal)}</subgoal>"


def format_response(switch, subgoal, action):
    """A well-formed plan-execute response, as the demonstrator writes it."""
    return format_plan(subgoal, switch) + f"<action>{action}</action>"


def format_flat_response(thought, action):
    """A well-formed response to the flat prompt."""
    return f"<think>{thought}</think><action>{action}</action>"


# ---- parser ------------------------------------------------------------------------------------

KINDS = ("switch", "subgoal", "action")
SWITCH_WORDS = ("KEEP", "SWITCH")
# A well-formed block: the tags of one kind, and none of the three kinds' tags between them.
# Bytes, so that `parse` and `decision_masks` use the same pattern and cannot disagree.
_PATTERN = rb"<%s>([^<]*(?:<(?!/?(?:switch|subgoal|action)>)[^<]*)*)</%s>"
BLOCK = {kind: re.compile(_PATTERN % (kind.encode(), kind.encode())) for kind in KINDS}


class Decision(NamedTuple):
    """One parsed turn. Unreadable parts: switch False, subgoal and action ""."""

    switch: bool  # q: SWITCH (True) or KEEP (False)
    subgoal: str  # o
    action: str  # a
    valid: bool
    error: str  # "" when valid, else what is wrong, in a few words

    def drifts(self, carried):
        """Whether it is valid and names another subgoal than the carried one, as prompts show it.

        A flat response names none.
        """
        return self.valid and self.subgoal not in ("", shown(carried))


def parse(text):
    """Read the three blocks -> Decision. Never raises.

    Of several blocks of a kind the first well-formed one counts. Valid: each block once, in
    order, exactly KEEP or SWITCH, subgoal and action not empty. Text around the blocks is allowed.
    """
    raw = text.encode("utf-8", "replace")
    blocks = {kind: BLOCK[kind].search(raw) for kind in KINDS}
    body = {kind: _body(block) for kind, block in blocks.items()}
    errors = [_block_error(raw, kind, blocks[kind], body[kind]) for kind in KINDS]
    error = next((text for text in errors if text), "")
    if not error and body["switch"] not in SWITCH_WORDS:
        error = f"<switch> holds {body['switch'][:20]!r}, not KEEP or SWITCH"
    if not error:
        ends = [place for kind in KINDS for place in blocks[kind].span()]
        if ends != sorted(ends):
            error = "blocks out of order"
    switch = body["switch"] == "SWITCH"
    return Decision(switch, body["subgoal"], body["action"], not error, error)


def parse_flat(text):
    """Read <think> and <action> -> Decision without switch and subgoal. Never raises."""
    raw = text.encode("utf-8", "replace")
    block = BLOCK["action"].search(raw)
    action = _body(block)
    tags = [b"<think>", b"</think>", b"<action>", b"</action>"]
    places = [raw.find(tag) for tag in tags]
    once_in_order = [raw.count(tag) for tag in tags] == [1] * 4 and places == sorted(places)
    error = ""
    if block is None:
        error = "no <action> block"
    elif not action:
        error = "empty <action> block"
    elif not once_in_order or not raw[places[0] + len(tags[0]) : places[1]].strip():
        error = "<think> block not well-formed"
    return Decision(False, "", action, not error, error)


def _body(block):
    return block[1].decode("utf-8", "replace").strip() if block else ""


def _block_error(raw, kind, block, body):
    opening = raw.count(b"<%s>" % kind.encode())
    closing = raw.count(b"</%s>" % kind.encode())
    if block is None:
        return f"<{kind}> block not well-formed" if opening or closing else f"no <{kind}> block"
    if not body:
        return f"empty <{kind}> block"
    if (opening, closing) != (1, 1):
        return f"more than one <{kind}> tag"
    return ""


# ---- decision masks ----------------------------------------------------------------------------


class Masks(NamedTuple):
    """Which response tokens belong to which decision, at most one each. Each bool [N, L]."""

    switch: torch.Tensor
    subgoal: torch.Tensor
    action: torch.Tensor


def decision_masks(ids, lengths, tokenizer):
    """Generated ids -> Masks. ids: int [N, L], right-padded; lengths: int [N].

    A decision's tokens are its whole block, tags included. A token belongs to the block that
    holds its first character (a merged `></` belongs to the block before). Without a readable
    action the whole response counts as action: then what went wrong is trained.
    Raises ValueError for other shapes.
    """
    ids, lengths = torch.as_tensor(ids), torch.as_tensor(lengths)
    starts, texts = _byte_offsets(ids, lengths, tokenizer)
    spans = torch.tensor([_decision_spans(text) for text in texts], device=ids.device)
    spans = spans.view(len(ids), len(KINDS), 2)
    first, past = spans[:, :, :1], spans[:, :, 1:]  # [N, 3, 1] each
    in_response = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
    starts = starts[:, None]  # [N, 1, L]
    inside = (first <= starts) & (starts < past) & in_response[:, None]  # [N, 3, L]
    return Masks(*inside.unbind(1))


def subgoal_positions(ids, lengths, tokenizer):
    """Where V_low is read: int [N], the place in the response; -1 (last prompt token) for none.

    It is the last token that begins before the final `>` of </subgoal>. BPE may merge that `>`
    with what follows (`><`, `>\\n`), so the token of the `>` itself is not the same in a sampled
    response and in a block that ends there (`append_keep_block`). The token before it is.
    """
    ids, lengths = torch.as_tensor(ids), torch.as_tensor(lengths)
    starts, texts = _byte_offsets(ids, lengths, tokenizer)
    blocks = [BLOCK["subgoal"].search(text) for text in texts]
    closing = [block.end() - 1 if block else 0 for block in blocks]
    closing = torch.tensor(closing, device=ids.device)[:, None]
    return (starts < closing).sum(1) - 1  # padding begins after all blocks


def switch_words(ids, lengths, tokenizer):
    """bool [N, L]: the tokens that hold a part of the word KEEP or SWITCH.

    Their probability is pi(q). How the tags are written, and joined to what follows (`><`, `>\\n`),
    is style: a model that is sure to switch may be unsure of that. Another word is no decision.
    """
    ids, lengths = torch.as_tensor(ids), torch.as_tensor(lengths)
    starts, texts = _byte_offsets(ids, lengths, tokenizer)
    blocks = [BLOCK["switch"].search(text) for text in texts]
    spans = [block.span(1) if _body(block) in SWITCH_WORDS else (0, 0) for block in blocks]
    words = torch.tensor(spans)  # [N, 2]
    first, past = words.to(ids.device).view(len(ids), 2, 1).unbind(1)  # [N, 1] each
    in_response = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
    ends = pad(starts[:, 1:], (0, 1), value=2**31)  # [N, L]
    return (first < ends) & (starts < past) & in_response


def _byte_offsets(ids, lengths, tokenizer):
    """-> (int [N, L], the byte at which each token begins; N texts as bytes)."""
    one_length_per_row = ids.ndim == 2 and lengths.shape == ids.shape[:1]
    if not one_length_per_row or (len(lengths) and int(lengths.max()) > ids.shape[1]):
        raise ValueError(
            f"ids must be [N, L] and lengths [N], at most L: got {tuple(ids.shape)} "
            f"and {tuple(lengths.shape)}"
        )
    table = token_bytes(tokenizer)
    known = ids.clamp(max=len(table.pieces) - 1)
    pieces = table.pieces
    texts = [
        b"".join([pieces[i] for i in row[:length]])
        for row, length in zip(known.tolist(), lengths.tolist(), strict=True)
    ]
    sizes = table.lengths.to(ids.device)[known]  # [N, L] bytes of each token
    return sizes.cumsum(1) - sizes, texts


def _decision_spans(text):
    """The first byte of each decision's block and the one past its last, in the order of KINDS."""
    action = BLOCK["action"].search(text)
    if not _body(action):
        return [(0, 0), (0, 0), (0, len(text) + 1)]
    switch, subgoal = BLOCK["switch"].search(text), BLOCK["subgoal"].search(text)
    return [block.span() if block else (0, 0) for block in (switch, subgoal, action)]
