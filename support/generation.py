"""Text generation with HF `generate`: prompts to ids, and one sampled response per prompt."""

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from support.tokens import token_bytes


class StopAtTag(StoppingCriteria):
    """Ends each row whose response has closed `tag`. Answers bool [n], one per row."""

    def __init__(self, tokenizer, prompt_width, tag):
        self.table = token_bytes(tokenizer)
        self.prompt_width = prompt_width
        self.tag = tag

    def __call__(self, input_ids, scores, **kwargs):
        start = max(self.prompt_width, input_ids.shape[1] - len(self.tag))
        tails = input_ids[:, start:].tolist()
        closed = [closes_tag(tail, self.table, self.tag) for tail in tails]
        return torch.tensor(closed, device=input_ids.device)


def closes_tag(tail, table, tag):
    """Whether the last of these tokens closes `tag`. A token holds at least one byte, so the
    last len(tag) tokens are enough."""
    return tag[-1:] in table[tail[-1]] and tag in table.join(tail)


def generate(actor, tokenizer, prompts, *, temperature, max_new_tokens, tag="</action>"):
    """Sample one response per prompt (greedy at temperature 0), up to `tag` or an end token.

    prompts: id lists -> responses: id lists.
    """
    tag = tag.encode()
    pad = tokenizer.pad_token_id
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]  # left-padded
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    # `generate` fills what is not given from the checkpoint's generation config. So all fields are
    # given, as None where they are not needed: the model's own distribution is sampled.
    settings = dict.fromkeys(GenerationConfig().to_dict())
    settings.update(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=[tokenizer.eos_token_id, pad],
        pad_token_id=pad,
    )
    output = actor.generate(
        input_ids=torch.tensor(ids, device=actor.device),  # [n, P]
        attention_mask=torch.tensor(mask, device=actor.device),
        stopping_criteria=StoppingCriteriaList([StopAtTag(tokenizer, width, tag)]),
        synced_gpus=False,
        **settings,
    )
    ends = {tokenizer.eos_token_id, pad}
    table = token_bytes(tokenizer)
    return [_cut(row, table, tag, ends) for row in output[:, width:].tolist()]


def _cut(row, table, tag, ends):
    """The response without the padding that follows its tag or its end token."""
    for n, token in enumerate(row):
        tail = row[max(0, n + 1 - len(tag)) : n + 1]
        if token in ends or closes_tag(tail, table, tag):
            return row[: n + 1]
    return row


def tokenize_prompts(tokenizer, texts, max_tokens=None):
    """Prompt texts -> id lists, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [row[-max_tokens:] for row in ids] if max_tokens else ids
