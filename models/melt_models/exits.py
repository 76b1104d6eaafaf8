"""Ouro's exit rule (arXiv 2510.25741): after which loop a token leaves, by what the exit gate says of it.

``lambda_t = sigmoid(exit_logit_t)`` is the chance to leave after loop t for a token that is still there,
``p_t = lambda_t * prod_{s<t} (1 - lambda_s)`` that of leaving after t of all; the last loop takes the rest. A token
leaves after the first loop up to which the ``p`` add up to the threshold.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def exit_log_probabilities(exit_logits: Tensor) -> Tensor:
    """``log p`` of the below, finite where ``p`` rounds to 0."""
    leaves = F.pad(F.logsigmoid(exit_logits[..., :-1].float()), (0, 1))  # who is left leaves after the last loop
    stays = F.logsigmoid(-exit_logits[..., :-1].float()).cumsum(-1)
    return leaves + F.pad(stays, (1, 0))  # after t loops it is still there


def exit_probabilities(exit_logits: Tensor) -> Tensor:
    """The chance to leave after each loop.

    Args:
        exit_logits: of the gate, before its sigmoid, [..., T].

    Returns:
        ``p``, [..., T]; the sum over loops is 1.
    """
    return exit_log_probabilities(exit_logits).exp()


def exit_loops(exit_logits: Tensor, threshold: float) -> Tensor:
    """How many loops each token takes, 1 to T, [...] int64; ``exit_logits`` [..., T] as above."""
    left = exit_probabilities(exit_logits).cumsum(-1)
    left[..., -1] = torch.inf  # the last loop takes the rest, whatever rounding made of the sum
    return (left >= threshold).int().argmax(-1) + 1
