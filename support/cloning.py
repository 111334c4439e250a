"""From nothing: a tokenizer from the world's own words, a tiny Qwen2, and cloning of the scripted expert.

Where no pretrained weights are given (`--model` left out), this stands in for them: a byte-level BPE tokenizer that keeps
`drawer 1` as one token, a Qwen2 of about half a million parameters, and demonstrations of an expert who errs.
"""

import random
import re
from collections import Counter

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import envs
import hiper
from rollout import Seat, encode, micro_batches, samples_of


def demonstrations(
    runner,
    tasks,
    *,
    plan_noise,
    act_noise=0.0,
    slips,
    blunders=0.0,
    style,
    seed,
    slots=64,
    disguises=0,
):
    """Episodes of the scripted expert -> list of (prompt text, response text, turns to victory or None), turn by turn.

    He is a poor planner: with probability `plan_noise` he switches to any subgoal that one could have (`info["subgoals"]`, where
    the world lists them), and that is what is shown. As an executor he knows what to do, but with probability `act_noise` does and
    shows anything admissible. With probability `slips` another action happens instead, admissible here or earlier: shown is what he
    meant, so that the clone has seen how to go on after a mistake. With probability `blunders` it is something that could be done in
    another episode and mostly cannot here: a clone that errs so must not have learnt to repeat itself. Then come all of them again,
    `disguises` times, each time under other names. RuntimeError where the world has no expert, or no `disguise`.
    """
    rng, shown, tasks = random.Random(seed), [], list(tasks)
    for start in range(0, len(tasks), slots):
        part = dict(enumerate(tasks[start : start + slots]))
        seats = {
            slot: Seat(part[slot], *reset, style) for slot, reset in runner.reset(part).items()
        }
        stray, told, won = {}, {slot: [] for slot in seats}, set()
        while seats:
            try:
                advice = runner.expert({slot: seat.subgoal for slot, seat in seats.items()})
            except AttributeError:
                raise RuntimeError(
                    f"world {runner.name!r} has no expert to clone: give --model, or --demos 0"
                ) from None
            seats = {
                slot: seat for slot, seat in seats.items() if advice[slot]
            }  # he may not know how to go on
            whims = {
                slot: rng.choice(seat.info["subgoals"])
                for slot, seat in seats.items()
                if advice[slot][0] and seat.info.get("subgoals") and rng.random() < plan_noise
            }
            whims = {
                slot: (True, *reply[1:]) for slot, reply in runner.expert(whims).items() if reply
            }  # None: lost on the way
            said, done = {}, {}
            for slot, seat in seats.items():
                switch, subgoal, action = whims.get(slot, advice[slot])
                action = (
                    rng.choice(seat.info["admissible"])
                    if act_noise and rng.random() < act_noise
                    else action
                )
                said[slot] = hiper.Decision(switch, subgoal, action, True, "")
                stray.setdefault(slot, []).extend(seat.info["admissible"])
                done[slot] = rng.choice(stray[slot]) if rng.random() < slips else action
                if blunders and rng.random() < blunders:
                    done[slot] = rng.choice(rng.choice(list(seats.values())).info["admissible"])
                told[slot].append(
                    (
                        seat.prompt(),
                        hiper.flat_response(subgoal, action)
                        if style.prompt == "flat"
                        else hiper.response(switch, subgoal, action),
                    )
                )
            outcomes = runner.step(done)
            seats = {
                slot: seat
                for slot, seat in seats.items()
                if not seat.answer([], [], said[slot], outcomes[slot])
            }
            won.update({slot for slot in outcomes if outcomes[slot][-1]["won"]})
        shown += [
            [(*turn, len(turns) - 1 - t if slot in won else None) for t, turn in enumerate(turns)]
            for slot, turns in told.items()
        ]
    if disguises and not hasattr(envs.world(runner.name), "disguise"):
        raise RuntimeError(
            f"world {runner.name!r} has no other names for its things: --disguises 0"
        )
    copies = [envs.world(runner.name).disguise(shown, rng) for _ in range(disguises)]
    return [turn for episodes in [shown, *copies] for turns in episodes for turn in turns]


def train_tokenizer(texts, vocab_size=2048):
    """Qwen2's own tokenizer class, its byte-level BPE learnt from `texts` (no text is unknown); a tag or a name such as
    ` drawer 1`, a product's number or an option of its is one token of its own. -> Qwen2Tokenizer, which AutoTokenizer finds again beside a
    Qwen2 model."""
    end = "<|endoftext|>"
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate([end, *sorted(letters)])}, [])
    tokenizer = tokenizer.train_new_from_iterator(
        texts, vocab_size, initial_alphabet=letters, show_progress=False
    )
    names = Counter(
        name
        for text in texts
        for name in re.findall(r"</?[a-z]+>|KEEP|SWITCH|go to| [a-z]+ \d+|\bB[0-9A-Z]{9}\b", text)
    )
    options = Counter(
        name for text in texts for name in re.findall(r"click\[([a-z0-9][^][]+)\]", text)
    )
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False) for name, _ in names.most_common(vocab_size)]
    )
    tokenizer.add_tokens(
        [
            AddedToken(name, normalized=False, single_word=True)
            for name, _ in options.most_common(vocab_size)
        ]
    )
    return tokenizer


def tiny_model(tokenizer, attention="eager", hidden=128, layers=2):
    """A Qwen2 built from a config, random weights, float32; `drawer 1` starts near `drawer` and `1`, which halves cloning."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.08,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation=attention,
        )
    )
    texts = [piece.decode("utf-8", "replace") for piece in hiper.token_bytes(tokenizer)]
    ids, table = (
        {text: i for i, text in enumerate(texts)},
        model.get_input_embeddings().weight.data,
    )  # [V, H]
    for i, text in enumerate(texts):
        kind, _, number = text.rpartition(" ")
        if kind in ids and number in ids and number.isdigit():
            table[i] = (table[ids[kind]] + table[ids[number]]) / 2**0.5 + 0.3 * table[i]
    return model


def clone(
    policy,
    tokenizer,
    shown,
    *,
    epochs,
    lr,
    seed,
    gamma,
    success_reward,
    batch=32,
    value_weight=0.002,
    max_prompt=None,
    tokens=2**14,
    progress=iter,
):
    """Supervised learning of the demonstrations, in place: the actor their responses, the value heads their returns.

    max_prompt: tokens, a longer prompt loses its left end; tokens: in one forward, padding included.
    -> mean loss of the responses over the last twenty steps, nats per token. The clone acts as the demonstrator did, so his
    returns are the clone's too, or nearly, and the critic need not start blind.
    """
    samples = samples_of(
        encode(tokenizer, [prompt for prompt, _, _ in shown], max_prompt),
        tokenizer([said for _, said, _ in shown], add_special_tokens=False)["input_ids"],
        tokenizer,
    )
    device = policy.heads.weight.device
    returns = torch.tensor(
        [0.0 if left is None else success_reward * gamma**left for *_, left in shown], device=device
    )  # [N]
    rng, losses = random.Random(seed), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.01)
    order = [rng.sample(range(len(shown)), len(shown)) for _ in range(epochs)]
    steps = [list(rows) for epoch in order for rows in zip(*[iter(epoch)] * min(batch, len(shown)))]
    ramp = lambda n: (
        min(1.0, (n + 1) / 30) * (1 - 0.95 * n / len(steps))
    )  # warm-up, then down to a twentieth
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    for rows in progress(steps):
        sizes, spoken = (
            [len(samples.prompts[n]) + len(samples.responses[n]) for n in rows],
            samples.lengths[rows].sum(),
        )
        whole, total = (
            max(sizes) * len(rows) <= tokens,
            0.0,
        )  # then unsorted: sums in another order, another clone
        optimizer.zero_grad()
        for part in [range(len(rows))] if whole else micro_batches(sizes, tokens):
            index = [rows[i] for i in part]
            scores = policy(*samples.rows(index, device))
            loss = -scores.logp.sum() / spoken
            values = sum(
                ((v - returns[index]) ** 2).sum() / len(rows)
                for v in (scores.v_high, scores.v_low, scores.v_switch)
            )
            (loss + value_weight * values).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(total)
    return float(torch.stack(losses[-20:]).mean())
