"""From nothing: a tokenizer from the world's own words, a tiny Qwen2, and cloning of the scripted expert.

Where no pretrained weights are given (`--model` left out), this stands in for them: a byte-level BPE tokenizer that keeps
`drawer 1` as one token, a Qwen2 of about half a million parameters, and demonstrations of an expert who errs.
"""
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import hiper
from envs import Runner
from rollout import Seat, encode, micro_batches, prompts_of

WORDS = r"</?[a-z]+>|go to| ?[A-Za-z]+ \d+| ?[A-Za-z]+| ?\d+|\s|[^\sA-Za-z0-9<]+|<"


def demonstrations(runner, tasks, *, noise, style, seed, slots=64):
    """Episodes of the scripted expert, who errs: with probability `noise` a turn's action is any admissible one.

    -> list of (prompt text, response text), turn by turn; what was done is what is shown, mistakes included.
    RuntimeError where the world has no expert.
    """
    rng, shown, tasks = random.Random(seed), [], list(tasks)
    for start in range(0, len(tasks), slots):
        part = dict(enumerate(tasks[start:start + slots]))
        seats = {s: Seat(part[s], *reset, style) for s, reset in runner.reset(part).items()}
        while seats:
            try:
                advice = runner.expert({slot: seat.subgoal for slot, seat in seats.items()})
            except AttributeError:
                raise RuntimeError(f"world {runner.name!r} has no expert to clone: give --model, or --demos 0") from None
            seats = {slot: seat for slot, seat in seats.items() if advice[slot] is not None}
            said = {}
            for slot, seat in seats.items():
                switch, subgoal, action = advice[slot]
                if rng.random() < noise:
                    action = rng.choice(seat.info["admissible"])
                said[slot] = hiper.Decision(switch, subgoal, action, True, "")
                shown.append((seat.prompt(), hiper.response(switch, subgoal, action)))
            outcomes = runner.step({slot: d.action for slot, d in said.items()})
            seats = {slot: seat for slot, seat in seats.items() if not seat.answer([], [], said[slot], outcomes[slot])}
    return shown


def train_tokenizer(texts, vocab_size=2048):
    """Byte-level BPE (no text is unknown) whose merges stay within words, tags and `kind number` names."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", padding_side="left",
                                   clean_up_tokenization_spaces=False)


def tiny_model(tokenizer, hidden=128, layers=2):
    """A Qwen2 built from a config, random weights, float32."""
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=0.08, use_sliding_window=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def clone(policy, tokenizer, shown, *, epochs, lr, seed, batch=64, prompt_weight=0.1, progress=iter):
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
