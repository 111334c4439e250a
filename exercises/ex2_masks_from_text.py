"""Exercise 2. Which tokens switch, which name the subgoal, which act? A fast tokenizer knows where each token of a text begins.

Symptom: right for every answer you type in. Of the answers that a model samples at temperature 1, a few per cent have the
subgoal's advantage on the switch, or the last tokens of the action untrained.
"""

import torch

from hiper import BLOCK, KINDS, Masks
from support.cloning import train_tokenizer


def decision_masks(ids, lengths, tokenizer):
    """Generated ids, int [N, L], right-padded, of `lengths` tokens -> Masks: to which decision's block each token belongs."""
    owner = torch.full(ids.shape, -1)  # [N, L] 0 switch, 1 subgoal, 2 action, -1 none
    for n, length in enumerate(lengths.tolist()):
        text = tokenizer.decode(ids[n, :length])
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for k, kind in enumerate(KINDS):
            block = BLOCK[kind].search(
                text.encode()
            )  # these answers are ASCII: a byte is a character
            for j, (start, _) in enumerate(tokens["offset_mapping"][:length]):
                if block and block.start() <= start < block.end():
                    owner[n, j] = k
    return Masks(*(owner == k for k in range(3)))


def test_masks_fit_the_tokens_that_were_sampled():
    blocks = (
        "<switch>SWITCH</switch>",
        "<subgoal>find a pan</subgoal>",
        "<action>go to drawer 1</action>",
    )
    tokenizer = train_tokenizer(["".join(blocks)] * 9, 400)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    typed = [encode(block) for block in blocks]
    sampled = [
        encode("<switch>") + encode("SW") + encode("IT") + encode("CH") + encode("</switch>"),
        *typed[1:],
    ]
    for row in (typed, sampled):  # the same text in other tokens
        ids = [i for block in row for i in block]
        masks = decision_masks(torch.tensor([ids]), torch.tensor([len(ids)]), tokenizer)
        owner = [kind for kind, block in zip(KINDS, row) for _ in block]
        for kind, mask in zip(KINDS, masks):
            assert mask[0].tolist() == [k == kind for k in owner], (
                f"{kind} of {[tokenizer.decode([i]) for i in ids]}"
            )
