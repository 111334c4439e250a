"""The last layer, computed where it is read: half of a model of two layers, three per cent of one of 28."""

from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def reading(backbone, where=None):
    """Meanwhile the backbone's last layer computes no more than what is read of it: keys and values everywhere, but queries, attention's
    output and the MLP, which are no other position's business, only `where` they are read. Elsewhere the hidden states mean nothing.

    where: bool [N, S]; None: the last of each row. Layers with other names than Llama's and Qwen's are left alone, and so are those
    with gradient checkpointing, which recompute their activations when this is over.
    """
    at = None if where is None else where.flatten().nonzero()[:, 0]  # [M]

    def some(forward, x):  # x: [N, S, H]
        n, s = x.shape[:2]
        if s == 1:
            return forward(x)
        there = torch.arange(s - 1, n * s, s, device=x.device) if at is None else at
        made = forward(x.flatten(0, 1)[there][None])[0]
        return made.new_zeros(n * s, made.shape[1]).index_copy(0, there, made).unflatten(0, (n, s))

    layer = getattr(backbone, "layers", [None])[-1]
    parts = (
        ()
        if getattr(layer, "gradient_checkpointing", False) or layer is None
        else layer.named_modules()
    )
    modules = [
        module for name, module in parts if name in ("mlp", "self_attn.q_proj", "self_attn.o_proj")
    ]
    own = [vars(module).get("forward") for module in modules]  # accelerate sets some
    for module in modules:
        module.forward = partial(some, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, own):
            vars(module).pop("forward") if forward is None else setattr(module, "forward", forward)
