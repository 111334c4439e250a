"""Exercise 2. Which tokens belong to the switch, which to the subgoal, which to the action?

A fast tokenizer knows where each token of a text begins. Symptom: the masks are right for every
response you type. For a few per cent of the responses that a model samples at temperature 1, the
switch is trained with the subgoal's advantage, or the last tokens of the action are not trained.
"""

import torch

from support.cloning import train_tokenizer
from support.protocol import BLOCK, KINDS, Masks


def decision_masks(ids, lengths, tokenizer):
    """Generated ids -> Masks, which say to which decision's block each token belongs.

    ids: int [N, L], right-padded; lengths: int [N], the tokens of each row. Responses are ASCII, so
    that a byte is a character.
    """
    owner = torch.full(ids.shape, -1)  # [N, L] 0 switch, 1 subgoal, 2 action, -1 none
    for n, length in enumerate(lengths.tolist()):
        text = tokenizer.decode(ids[n, :length])
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for k, kind in enumerate(KINDS):
            block = BLOCK[kind].search(text.encode())
            for j, (start, _) in enumerate(tokens["offset_mapping"][:length]):
                if block and block.start() <= start < block.end():
                    owner[n, j] = k
    return Masks(*(owner == k for k in range(3)))


def test_masks_fit_the_tokens_that_were_sampled():
    """The same text twice: as the tokenizer splits it, and in other tokens."""
    blocks = [
        "<switch>SWITCH</switch>",
        "<subgoal>find a pan</subgoal>",
        "<action>go to drawer 1</action>",
    ]
    tokenizer = train_tokenizer(["".join(blocks)] * 9, 400)
    typed = [ids_of(tokenizer, block) for block in blocks]
    pieces = ["<switch>", "SW", "IT", "CH", "</switch>"]
    sampled_switch = [i for piece in pieces for i in ids_of(tokenizer, piece)]
    sampled = [sampled_switch, *typed[1:]]
    for response in (typed, sampled):
        ids = [i for block in response for i in block]
        masks = decision_masks(torch.tensor([ids]), torch.tensor([len(ids)]), tokenizer)
        owner = [kind for kind, block in zip(KINDS, response, strict=True) for _ in block]
        for kind, mask in zip(KINDS, masks, strict=True):
            message = f"{kind} of {[tokenizer.decode([i]) for i in ids]}"
            assert mask[0].tolist() == [k == kind for k in owner], message


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
