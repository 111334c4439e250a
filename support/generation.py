"""Text generation with HF `generate`: prompts to ids, and one sampled response per prompt."""

import re

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from support.tokens import token_bytes
from support.world_guard import replace_surrogates


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


# ---- text to ids -------------------------------------------------------------------------------

PLACE = "4c0f7b1e59"  # stands for the content, to see what a chat template writes around it


def tokenize_prompts(tokenizer, texts, max_tokens=None, shorter=None):
    """Prompt texts -> id lists, through the chat template where the tokenizer has one.

    One of more than max_tokens is replaced by its text in `shorter` ("": it has none), then loses
    its left end.
    The template's special tokens are special. One that a text names (`<|im_end|>` on a page, say)
    stays text: a world cannot end the user's turn, nor write the system's.
    """
    texts = [replace_surrogates(text) for text in texts]
    chats = [_chat(tokenizer, text) for text in texts]
    ids = tokenizer(chats, add_special_tokens=False)["input_ids"]
    names = _special_names(tokenizer)
    for n, text in enumerate(texts):
        if any(name in text for name in names):
            ids[n] = tokenize_around(tokenizer, chats[n])
    if not max_tokens:
        return ids
    for n, row in enumerate(ids):
        if shorter and shorter[n] and len(row) > max_tokens:
            [ids[n]] = tokenize_prompts(tokenizer, [shorter[n]])
    return [row[-max_tokens:] for row in ids]


def tokenize_texts(tokenizer, texts):
    """Parts of responses -> id lists, without a template; names of special tokens stay text."""
    texts = [replace_surrogates(text) for text in texts]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def tokenize_around(tokenizer, chat):
    """The ids of one templated prompt: special tokens only where the template itself has them.

    The template's text beside the content is encoded together with it, as BPE may join the two.
    ValueError for a template that does not write the content in one place.
    """
    before, _, after = _chat(tokenizer, PLACE).partition(PLACE)
    if not (chat.startswith(before) and chat.endswith(after)):
        raise ValueError("the chat template does not write a message's content in one place")
    special = re.compile("|".join(map(re.escape, _special_names(tokenizer))))
    start = max((match.end() for match in special.finditer(before)), default=0)
    first = special.search(after)
    end = len(chat) - len(after) + (first.start() if first else len(after))
    ids = []
    for part, as_text in ((chat[:start], False), (chat[start:end], True), (chat[end:], False)):
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]
    return ids


def _chat(tokenizer, text):
    if not tokenizer.chat_template:
        return text
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )


def _special_names(tokenizer):
    """The special tokens' texts, the longest first."""
    tokens = tokenizer.added_tokens_decoder.values()
    return sorted((str(token) for token in tokens if token.special), key=len, reverse=True)
