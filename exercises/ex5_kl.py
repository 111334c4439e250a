"""Exercise 5. Schulman's k3 estimates KL(pi || ref) from tokens that pi sampled: never negative, and zero where the two agree.

Symptom: both are true of this one. Yet the penalty explodes on tokens that the start model finds unlikely, and hardly sees a policy
that has stopped saying half of what the start model says.
"""

import torch


def kl_k3(logp, ref_logp):
    """log pi and log ref of sampled tokens, any one shape -> an estimate for each, whose mean under pi is KL(pi || ref)."""
    d = logp - ref_logp
    return d.exp() - d - 1


def test_its_mean_under_pi_is_the_kl():
    pi, ref = (
        torch.tensor([0.7, 0.2, 0.09, 0.01]).double(),
        torch.tensor([0.25, 0.25, 0.3, 0.2]).double(),
    )
    kl = (pi * (pi / ref).log()).sum()  # over four tokens the sum is exact
    k3 = kl_k3(pi.log(), ref.log())
    assert (k3 >= 0).all() and (kl_k3(pi.log(), pi.log()) == 0).all()
    assert abs((pi * k3).sum() - kl) < 1e-6, (
        f"its mean is {(pi * k3).sum():.3f}, KL(pi || ref) is {kl:.3f}"
    )
