"""Rollouts: many episodes at once with HF `generate`, and what training needs of them.

    collect(...) -> list of Episode            play: prompt, generate, parse, step, until the task queue is empty
    batch_of(episodes, ...) -> Batch           the same as ids, masks and padded [B, T] arrays
    score(policy, samples, ...) -> Scores      log-probs and values with the forward that training uses

A slot holds one episode. Only unfinished episodes are in the batch that generates, and in it only unfinished answers; a slot that
falls free takes the next task of the queue at once, so a long episode does not hold back the rest.

Old log-probs are not taken from generation: `score` computes them on the same rows, positions and micro-batching as training,
so that in the first PPO step the ratio is 1 (generation itself agrees to 1e-4 in float32, far less in bf16).

B episodes, T turns of the longest, N turns in all, L response tokens, P prompt tokens.
"""

from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from transformers import GenerationConfig

import hiper
from hiper import Decision, Masks, Scores
from support.last_layer import reading
from support.sharding import even


@dataclass(frozen=True)
class Turn:
    prompt: list  # prompt ids, P of them
    response: list  # sampled ids, up to and with </action> or the end token
    decision: Decision
    opened: bool  # a segment opens here: SWITCH was written, or turn 0
    subgoal: str  # the subgoal in force from here on
    observation: str  # what the agent saw before it answered
    reward: float  # scaled, penalties included
    carried: str = ""  # o_{t-1}, the subgoal the agent came with


@dataclass(frozen=True)
class Episode:
    index: int  # task index in its split
    task: str
    task_type: str
    turns: list  # of Turn
    won: bool
    score: float
    truncated: bool  # cut off by the step limit; otherwise the task itself ended
    end_prompt: list  # prompt ids of the state after the last turn: what a truncated episode bootstraps from
    lost: int = 0  # times it was begun and lost with its environment process; nothing of these is in `turns`


@dataclass(frozen=True)
class Style:
    """How turns are shown, sampled and paid; the same in training and evaluation but for the temperature."""

    history: int = 2
    brief: bool = False
    show_admissible: bool = True
    max_prompt: int = 2048  # tokens; a longer prompt loses its history, then its left end
    max_response: int = 512  # tokens
    success_reward: float = 10.0
    invalid_penalty: float = 0.1
    prompt: str = "plan-execute"  # or "flat": <think> and <action>
    segments: str = (
        "learned"  # or "single", "every-turn", "fixed:k": the switch is written for the agent
    )
    keep_penalty: float = 0.0  # taken off on a KEEP turn
    drift_penalty: float = 0.0  # taken off where KEEP's subgoal is not the carried one
    page: bool = (
        False  # read `info["page"]`, which sums up what was seen so far, in the observation's stead
    )
    checklist: float = 0.0  # the share of the success reward that is paid for subtasks, as `info["progress"]` grows


# ---- playing ----------------------------------------------------------------------------------------------------------


def draw(p):
    """One index for each row of probabilities, [n, V] -> int [n, 1], from one random number a row: torch.multinomial takes V of them."""
    cdf = p.cumsum(
        -1, dtype=torch.float if p.device.type == "mps" else torch.double
    )  # Apple's GPUs know no double
    u = torch.rand(len(p), 1, dtype=cdf.dtype, device=p.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(
        max=p.shape[1] - 1
    )  # should u be rounded up to the sum


def decode(model, input_ids, *, mask, temperature, longest, ended, past_key_values, **_):
    """The inner loop of HF's `generate`, handed to it as `custom_generate`: a row that has ended leaves the batch, its cache with it.

    mask: int [N, P], 0 on the padding, which is on the left; ended: function of a row's ids so far. -> N id lists, each sampled from
    softmax(logits / temperature) and nothing else: no top_k, no penalty that a checkpoint's generation config may ask for.
    """
    said, rows, takes = (
        [[] for _ in input_ids],
        list(range(len(input_ids))),
        signature(model.forward).parameters,
    )
    new, positions = input_ids, (mask.cumsum(1) - 1).clamp(min=0)  # [n, P]; later [n, 1]
    for _ in range(longest):
        more = {
            name: x
            for name, x in (("position_ids", positions), ("logits_to_keep", 1))
            if name in takes
        }
        logits = (
            model(
                input_ids=new,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=True,
                **more,
            )
            .logits[:, -1]
            .float()
        )
        new = (
            draw((logits / temperature).softmax(-1))
            if temperature > 0
            else logits.argmax(-1, keepdim=True)
        )
        for row, token in zip(rows, new[:, 0].tolist()):
            said[row].append(token)
        live = [n for n, row in enumerate(rows) if not ended(said[row])]
        if not live:
            break
        if len(live) < len(rows):
            rows, index = [rows[n] for n in live], torch.tensor(live, device=new.device)
            new, mask, positions = new[index], mask[index], positions[index]
            past_key_values.batch_select_indices(index)
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
    return said


def generate(actor, tokenizer, prompts, *, temperature, max_response, tag=b"</action>"):
    """Sample one response per prompt (greedy at temperature 0), up to `tag` or an end token. Lists of ids -> lists of ids."""
    table, width, pad = hiper.token_bytes(tokenizer), max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor(
        [[pad] * (width - len(p)) + p for p in prompts], device=actor.device
    )  # [N, P] left-padded
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=actor.device
    )  # from lengths
    ends, last = {tokenizer.eos_token_id, pad}, tag[-1:]

    def ended(said):  # a token is a byte or more
        return (
            said[-1] in ends
            or last in table[said[-1]]
            and tag in b"".join(table[i] for i in said[-len(tag) :])
        )

    loop = partial(decode, mask=mask, temperature=temperature, longest=max_response, ended=ended)
    config = GenerationConfig(max_new_tokens=max_response, pad_token_id=pad)
    own, actor.generation_config = (
        actor.generation_config,
        config,
    )  # HF fills what `config` leaves open from the checkpoint's own
    try:
        with reading(actor.base_model):
            return actor.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                custom_generate=loop,
                synced_gpus=False,
            )
    finally:
        actor.generation_config = own


def encode(tokenizer, texts, max_prompt=None):
    """Prompt texts -> id lists, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": t}], add_generation_prompt=True, tokenize=False
            )
            for t in texts
        ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [row[-max_prompt:] for row in ids] if max_prompt else ids


class Seat:
    """One running episode: what the agent remembers between turns, and how that becomes a prompt."""

    def __init__(self, index, observation, info, style):
        self.index, self.task, self.task_type, self.style = (
            index,
            info["task"],
            info["task_type"],
            style,
        )
        self.past, self.turns, self.progress, self.subgoal = (
            deque(maxlen=style.history),
            [],
            0.0,
            "",
        )
        self.see(observation, info)

    def see(self, observation, info):
        self.observation, self.info = info["page"] if self.style.page else observation, info

    def prompt(self, history=True):
        past, actions = (
            self.past if history else (),
            self.info["admissible"] if self.style.show_admissible else (),
        )
        if self.style.prompt == "flat":
            return hiper.flat_prompt(self.task, self.observation, past, actions, self.style.brief)
        return hiper.plan_execute_prompt(
            self.task, self.observation, self.subgoal, past, actions, self.style.brief
        )

    def prefix(self):
        """What is written for the agent, where segments are imposed: SWITCH, or KEEP with the carried subgoal; else nothing."""
        if self.style.segments == "learned":
            return ""
        every = {"single": 10**9, "every-turn": 1}.get(self.style.segments) or int(
            self.style.segments.removeprefix("fixed:")
        )
        return (
            hiper.keep_block(self.subgoal) if len(self.turns) % every else "<switch>SWITCH</switch>"
        )

    def answer(self, prompt_ids, response_ids, decision, outcome):
        """Record a turn; -> True at the episode's end."""
        observation, reward, terminated, truncated, info = outcome
        style, carried = self.style, self.subgoal
        opened = decision.switch or not self.turns  # turn 0 opens a segment whatever was written
        if opened and decision.subgoal:
            self.subgoal = decision.subgoal  # on KEEP the carried one stays
        if style.checklist:  # a subtask pays once
            gain = max(0.0, info["progress"] - self.progress)
            self.progress += gain
            reward = (1 - style.checklist) * reward + style.checklist * gain
        reward = style.success_reward * reward - style.invalid_penalty * (not decision.valid)
        if decision.valid and not opened and style.prompt != "flat":
            reward -= style.keep_penalty + style.drift_penalty * (decision.subgoal != carried)
        self.turns.append(
            Turn(
                prompt_ids,
                response_ids,
                decision,
                opened,
                self.subgoal,
                self.observation,
                reward,
                carried,
            )
        )
        self.past.append((self.observation, decision.action))
        self.see(observation, info)
        self.ended, self.truncated = terminated or truncated, truncated and not terminated
        return self.ended


def prompts_of(seats, tokenizer):
    """The seats' prompts as ids; one that is too long is written without its history."""
    ids = encode(tokenizer, [seat.prompt() for seat in seats])
    return [
        row
        if len(row) <= seat.style.max_prompt
        else encode(tokenizer, [seat.prompt(history=False)], seat.style.max_prompt)[0]
        for seat, row in zip(seats, ids)
    ]


def collect(
    actor,
    tokenizer,
    runner,
    tasks,
    *,
    slots,
    temperature,
    style=Style(),
    progress=None,
    planner=None,
    executor=None,
):
    """Play the tasks (indices of the runner's split) -> Episodes in the order of `tasks`.

    slots: episodes in play at once. progress: called with each Episode as it ends. planner({slot: Seat}, prompts) -> the text each
    response begins with, executor({slot: Seat}, prompts, decisions) -> the action each does: who plays these parts in the agent's stead.
    An episode lost with its environment process begins anew; RuntimeError for a task that ends a second process.
    """
    queue, seats, done, lost, culprits = deque(enumerate(tasks)), {}, {}, Counter(), set()
    planner = planner or (lambda playing, prompts: [seat.prefix() for seat in playing.values()])
    while queue or seats:
        fresh = {
            slot: queue.popleft() for slot in range(slots) if slot not in seats and queue
        }  # refill at once
        for slot, (observation, info) in runner.reset(
            {slot: index for slot, (_, index) in fresh.items()}
        ).items():
            seats[slot] = fresh[slot][0], Seat(fresh[slot][1], observation, info, style)
        order = list(seats)
        prompts = prompts_of([seats[slot][1] for slot in order], tokenizer)
        playing = {slot: seats[slot][1] for slot in order}
        begun = [
            tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            for text in planner(playing, prompts)
        ]
        responses = generate(
            actor,
            tokenizer,
            [p + b for p, b in zip(prompts, begun)],
            temperature=temperature,
            max_response=style.max_response,
        )
        responses = [b + r for b, r in zip(begun, responses)]
        parse = hiper.parse_flat if style.prompt == "flat" else hiper.parse
        decisions = [parse(hiper.response_text(r, tokenizer)) for r in responses]
        actions = (
            executor(playing, prompts, decisions) if executor else [d.action for d in decisions]
        )
        outcomes = runner.step(dict(zip(order, actions)))
        for slot in [slot for slot in order if "lost" in outcomes[slot][-1]]:
            (place, seat), info = seats.pop(slot), outcomes[slot][-1]
            if info["culprit"]:
                if place in culprits:
                    raise RuntimeError(runner.twice(seat.index, info["lost"]))
                culprits.add(place)
            lost[place] += 1
            queue.appendleft((place, seat.index))
        ended = [
            slot
            for slot, *turn in zip(order, prompts, responses, decisions)
            if slot in seats and seats[slot][1].answer(*turn, outcomes[slot])
        ]
        if ended:
            ends = prompts_of([seats[slot][1] for slot in ended], tokenizer)
        for slot, end_prompt in zip(ended, ends if ended else ()):
            place, seat = seats.pop(slot)
            done[place] = Episode(
                seat.index,
                seat.task,
                seat.task_type,
                seat.turns,
                seat.info["won"],
                seat.info["score"],
                seat.truncated,
                end_prompt,
                lost[place],
            )
            if progress:
                progress(done[place])
    return [done[place] for place in sorted(done)]


# ---- from episodes to tensors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """N (prompt, response) pairs; what `ActorCritic` scores."""

    prompts: list  # N id lists
    responses: list  # N id lists
    masks: Masks  # bool [N, L] each
    lengths: torch.Tensor  # int [N] response tokens

    def rows(self, index, device):
        """The forward's arguments for the rows `index`: ids right-padded, lengths, the end of the subgoal block."""
        seqs = [self.prompts[n] + self.responses[n] for n in index]
        width = max(map(len, seqs))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in seqs], device=device)  # [n, P + L]
        prompt_lengths = torch.tensor([len(self.prompts[n]) for n in index], device=device)  # [n]
        block = self.masks.subgoal[index]  # [n, L]
        last = torch.where(block, torch.arange(block.shape[1]), -1).amax(1)  # [n] or -1
        return ids, prompt_lengths, self.lengths[index].to(device), last.to(device)


def samples_of(prompts, responses, tokenizer):
    """Id lists -> Samples, with the decision masks read off the sampled ids."""
    lengths = torch.tensor([len(r) for r in responses])
    ids = torch.tensor([r + [0] * (int(lengths.max()) - len(r)) for r in responses])  # [N, L]
    return Samples(prompts, responses, hiper.decision_masks(ids, lengths, tokenizer), lengths)


@dataclass(frozen=True)
class Batch:
    """Episodes as hae.py wants them. All arrays [B, T] but where it says otherwise; `row`, `col` say where turn n lies in them."""

    samples: Samples  # the N turns, episode after episode
    row: torch.Tensor  # int [N]
    col: torch.Tensor  # int [N]
    mask: torch.Tensor  # bool: the turn exists
    rewards: torch.Tensor  # float
    switch: torch.Tensor  # bool: a segment opens
    truncated: torch.Tensor  # bool [B]
    group: torch.Tensor  # int [B] the task: equal numbers for episodes of one task
    state: torch.Tensor  # int [B, T] equal numbers for equal observations
    ends: Samples  # [B] the states after the last turns, with the carried subgoal kept

    def grid(self, x):
        """[N] -> [B, T], zero off the mask."""
        return x.new_zeros(self.mask.shape).index_put((self.row, self.col), x)

    def flat(self, x):
        """[B, T] -> [N]"""
        return x[self.row, self.col]


def batch_of(episodes, tokenizer):
    """Episodes -> Batch."""
    turns = [turn for e in episodes for turn in e.turns]
    row = torch.tensor([b for b, e in enumerate(episodes) for _ in e.turns])
    col = torch.tensor([t for e in episodes for t in range(len(e.turns))])
    empty = torch.zeros(len(episodes), int(col.max()) + 1)
    put = lambda values, like: like.index_put((row, col), torch.tensor(values, dtype=like.dtype))
    seen = {}  # observation -> its number
    states = [seen.setdefault(turn.observation, len(seen)) for turn in turns]
    return Batch(
        samples_of([t.prompt for t in turns], [t.response for t in turns], tokenizer),
        row,
        col,
        put([True] * len(turns), empty.bool()),
        put([t.reward for t in turns], empty),
        put([t.opened for t in turns], empty.bool()),
        torch.tensor([e.truncated for e in episodes]),
        torch.tensor([e.index for e in episodes]),
        put(states, empty.long()),
        kept([e.end_prompt for e in episodes], [e.turns[-1].subgoal for e in episodes], tokenizer),
    )


def kept(prompts, subgoals, tokenizer):
    """KEEP and the carried subgoal, as if written, as Samples: V_high is read after the prompt, V_low after the subgoal."""
    blocks = tokenizer(
        [hiper.keep_block(subgoal) for subgoal in subgoals], add_special_tokens=False
    )["input_ids"]
    samples = samples_of(prompts, blocks, tokenizer)
    closed = torch.arange(samples.masks.subgoal.shape[1]) < samples.lengths[:, None]  # [B, L]
    return Samples(prompts, blocks, samples.masks._replace(subgoal=closed), samples.lengths)


def micro_batches(lengths, tokens):
    """Rows sorted by length and cut so that rows x longest <= tokens (one row at the least) -> list of index lists."""
    cuts, batch = [], []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[n] > tokens:
            cuts.append(batch)
            batch = []
        batch.append(n)
    return cuts + [batch] if batch else cuts


@torch.no_grad()
def score(policy, samples, *, tokens=16384, parts=("logp", "values")):
    """Forward all of `samples` through an ActorCritic in micro-batches -> Scores on the CPU, in the samples' order."""
    sizes = [len(p) + len(r) for p, r in zip(samples.prompts, samples.responses)]
    n, width = samples.masks.switch.shape
    out = [
        torch.zeros(n, width),
        torch.zeros(n, width),
        torch.zeros(n),
        torch.zeros(n),
        torch.zeros(n),
    ]
    for index in even(policy, micro_batches(sizes, tokens)):
        scores = policy(
            *samples.rows(index or [0], policy.heads.weight.device), parts=parts
        )  # of [] nothing is kept
        for whole, part in zip(out, scores):
            if part is not None and part.ndim == 2:
                whole[index, : part.shape[1]] = part.cpu()
            elif part is not None:
                whole[index] = part.cpu()
    return Scores(*out)
