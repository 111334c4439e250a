"""Exercise 4. The batch does not fit into memory, so the loss is computed in micro-batches.

Their gradients are added. Symptom: another micro-batch size gives another loss, hence another
gradient, from the same turns. So do two GPUs instead of one.
"""

import torch


def batch_loss(losses, trained, size):
    """Mean loss of all trained tokens, a scalar.

    losses: float [N, L] per token; trained: bool [N, L]; size: turns per micro-batch.
    """
    parts = []
    for loss, where in zip(losses.split(size), trained.split(size), strict=True):
        parts.append((loss * where).sum() / where.sum().clamp(min=1))
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
        [
            [True, True, True, True, True],
            [True, False, False, False, False],
            [True, True, False, False, False],
            [False, False, False, False, False],  # nothing is trained in the last turn
        ]
    )
    for size in (4, 3, 2, 1):
        loss = batch_loss(losses, trained, size).item()
        assert abs(loss - 25 / 8) < 1e-6, f"{size} turns at a time: {loss}, not {25 / 8}"
