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

import hiper
from envs import Runner
from rollout import Seat, encode, micro_batches, prompts_of


def demonstrations(runner, tasks, *, plan_noise, action_noise, style, seed, slots=64):
    """Episodes of the scripted expert, who errs in both his offices -> list of (prompt text, response text), turn by turn.

    As a planner, with probability `plan_noise`, he switches to any subgoal that one could have (`info["subgoals"]`, where the
    world lists them); as an executor, with probability `action_noise`, he takes any admissible action. What was done is what
    is shown, mistakes included. RuntimeError where the world has no expert.
    """
    rng, shown, tasks = random.Random(seed), [], list(tasks)
    for start in range(0, len(tasks), slots):
        part = dict(enumerate(tasks[start:start + slots]))
        seats = {slot: Seat(part[slot], *reset, style) for slot, reset in runner.reset(part).items()}
        while seats:
            try:
                advice = runner.expert({slot: seat.subgoal for slot, seat in seats.items()})
            except AttributeError:
                raise RuntimeError(f"world {runner.name!r} has no expert to clone: give --model, or --demos 0") from None
            seats = {slot: seat for slot, seat in seats.items() if advice[slot]}        # he may not know how to go on
            whims = {slot: rng.choice(seat.info["subgoals"]) for slot, seat in seats.items()
                     if advice[slot][0] and seat.info.get("subgoals") and rng.random() < plan_noise}
            whims = {slot: (True, subgoal, action) for slot, (_, subgoal, action) in runner.expert(whims).items()}
            said = {}
            for slot, seat in seats.items():
                switch, subgoal, action = whims.get(slot, advice[slot])
                if rng.random() < action_noise:
                    action = rng.choice(seat.info["admissible"])
                said[slot] = hiper.Decision(switch, subgoal, action, True, "")
                shown.append((seat.prompt(), hiper.response(switch, subgoal, action)))
            outcomes = runner.step({slot: d.action for slot, d in said.items()})
            seats = {slot: seat for slot, seat in seats.items() if not seat.answer([], [], said[slot], outcomes[slot])}
    return shown


def train_tokenizer(texts, vocab_size=2048):
    """Qwen2's own tokenizer class, its byte-level BPE learnt from `texts` (no text is unknown); a tag or a name such as
    ` drawer 1` is one token of its own. -> Qwen2Tokenizer, which AutoTokenizer finds again beside a Qwen2 model."""
    end = "<|endoftext|>"
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate([end, *sorted(letters)])}, [])
    tokenizer = tokenizer.train_new_from_iterator(texts, vocab_size, initial_alphabet=letters, show_progress=False)
    names = Counter(name for text in texts for name in re.findall(r"</?[a-z]+>|KEEP|SWITCH|go to| [a-z]+ \d+", text))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name, _ in names.most_common(vocab_size)])
    return tokenizer


def tiny_model(tokenizer, hidden=128, layers=2):
    """A Qwen2 built from a config, random weights, float32; `drawer 1` starts near `drawer` and `1`, which halves cloning."""
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=0.08, use_sliding_window=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, attn_implementation="eager"))
    texts = [piece.decode("utf-8", "replace") for piece in hiper.token_bytes(tokenizer)]
    ids, table = {text: i for i, text in enumerate(texts)}, model.get_input_embeddings().weight.data           # [V, H]
    for i, text in enumerate(texts):
        kind, _, number = text.rpartition(" ")
        if kind in ids and number in ids and number.isdigit():
            table[i] = (table[ids[kind]] + table[ids[number]]) / 2 ** 0.5 + 0.3 * table[i]
    return model


def clone(policy, tokenizer, shown, *, epochs, lr, seed, batch=32, prompt_weight=0.1, progress=iter):
    """Supervised learning of the demonstrations, in place; the prompt's own tokens count a little. -> last loss."""
    prompts = encode(tokenizer, [p for p, _ in shown])
    answers = tokenizer([r for _, r in shown], add_special_tokens=False)["input_ids"]
    rng, device = random.Random(seed), policy.heads.weight.device
    optimizer = torch.optim.AdamW(policy.actor.parameters(), lr=lr, weight_decay=0.01)
    order = [rng.sample(range(len(shown)), len(shown)) for _ in range(epochs)]
    steps = [rows for epoch in order for rows in zip(*[iter(epoch)] * batch)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(steps) + 1, pct_start=0.1)
    for rows in progress(steps):
        seqs = [prompts[n] + answers[n] for n in rows]
        width = max(map(len, seqs))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in seqs], device=device)                  # [n, P + L]
        weight = torch.tensor([[prompt_weight] * (len(prompts[n]) - 1) + [1.0] * len(answers[n])
                               + [0.0] * (width - len(prompts[n]) - len(answers[n])) for n in rows], device=device)
        hidden = policy.actor.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logp, _ = hiper.token_logp(hidden.flatten(0, 1), ids[:, 1:].flatten(), policy.actor.get_output_embeddings())
        loss = -(logp.view_as(weight) * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.actor.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss)
