"""Exercise 4. The batch does not fit into memory, so the loss is computed in micro-batches, whose gradients add up.

Symptom: another micro-batch size gives another loss, hence another gradient, from the same turns. So do two GPUs instead of one.
"""

import torch


def batch_loss(losses, trained, size):
    """Mean loss of all trained tokens, scalar. losses: float [N, L] per token; trained: bool [N, L]; size: turns per micro-batch."""
    parts = [
        (loss * where).sum() / where.sum().clamp(min=1)
        for loss, where in zip(losses.split(size), trained.split(size))
    ]
    return torch.stack(parts).mean()


def test_the_micro_batch_size_does_not_matter():
    losses = torch.tensor(
        [
            [4.0, 4.0, 4.0, 4.0, 4.0],
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [2.0, 2.0, 0.0, 0.0, 0.0],
            [7.0, 7.0, 7.0, 7.0, 0.0],
        ]
    )
    trained = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    ).bool()  # of the last turn nothing
    for size in (4, 3, 2, 1):
        loss = batch_loss(losses, trained, size).item()
        assert abs(loss - 25 / 8) < 1e-6, f"{size} turns at a time: {loss}, and not {25 / 8}"
