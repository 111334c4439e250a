"""Exercise 5. Schulman's k3 estimates KL(pi || ref) from tokens that pi sampled.

It is never negative, and zero where the two agree. Symptom: both are true of this one. But the
penalty explodes on tokens that the start model finds unlikely. And it stays small on a token that
the policy has almost stopped writing.
"""

import torch


def kl_k3(logprobs, ref_logprobs):
    """An estimate of KL(pi || ref) for each token, whose mean under pi is the KL.

    logprobs, ref_logprobs: log pi and log ref of the sampled tokens, any one shape.
    """
    d = logprobs - ref_logprobs
    return d.exp() - d - 1


def test_its_mean_under_pi_is_the_kl():
    """With only four tokens, the sum over all of them is exact."""
    pi = torch.tensor([0.7, 0.2, 0.09, 0.01]).double()
    ref = torch.tensor([0.25, 0.25, 0.3, 0.2]).double()
    kl = (pi * (pi / ref).log()).sum()
    k3 = kl_k3(pi.log(), ref.log())
    mean = (pi * k3).sum()
    assert (k3 >= 0).all()
    assert (kl_k3(pi.log(), pi.log()) == 0).all()
    assert abs(mean - kl) < 1e-6, f"its mean is {mean:.3f}, KL(pi || ref) is {kl:.3f}"
