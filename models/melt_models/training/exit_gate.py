"""What the exit gate learns, in Ouro's two steps (arXiv 2510.25741). Knows nothing of models.

Step one, model and gate together: the loss that a token is expected to have where the gate lets it leave, and a reward
for the entropy of where that is, without which all tokens soon leave after one and the same loop.

Step two, the model frozen: at each loop, whether a later one would have paid. Binary cross entropy at every token and
loop but the last, which takes whoever is left, against a target made of the token's losses after each loop.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from melt_models.exits import exit_log_probabilities, exit_probabilities


def joint_terms(losses: Tensor, exit_logits: Tensor) -> dict[str, Tensor]:
    """Step one: ``expected_cross_entropy``, ``sum_t p_t L_t``, and ``entropy``, ``-sum_t p_t log p_t``.

    Args:
        losses: cross entropy of the token that follows, after every loop, in nats, [T, tokens].
        exit_logits: of the gate, before its sigmoid, [T, tokens].

    Returns:
        Sums over tokens, in nats.
    """
    logs = exit_log_probabilities(exit_logits.T)
    chances = logs.exp()
    return {"expected_cross_entropy": (chances * losses.float().T).sum(), "entropy": -(chances * logs).sum()}


def expected_loops(exit_logits: Tensor) -> Tensor:
    """How many loops the probabilities make a token take, summed over tokens; ``exit_logits`` [T, tokens] as above."""
    loops = torch.arange(1, len(exit_logits) + 1, device=exit_logits.device)
    return (exit_probabilities(exit_logits.detach().T) * loops).sum()


def continue_targets(losses: Tensor, margin: float, sharpness: float) -> Tensor:
    """How much a token should go on after each loop: ``sigmoid(sharpness * g_t)``, where

        g_t = max_{s>t} (L_t - L_s - margin * (s - t))

    is what going on can still save, each further loop costing ``margin`` nats. It is positive exactly where some later
    loop has the smaller ``L_s + margin * s``, so that leaving at the first t where it is not is the best that could be
    done, seen from the end.

    Our choice: Ouro looks one loop ahead, ``g_t = L_t - L_{t+1} - margin``, and the two are the same one loop before
    the last. Further from it, Ouro's says "leave" wherever one loop alone improves nothing. A question of three hops
    has a wrong name after loops 1 and 2 and the right one after loop 3: it would be left after loop 1.

    Args:
        losses: cross entropy of the token that follows, after every loop, in nats, [T, ...].
        margin: nats that a further loop must save.
        sharpness: how fast the target turns from leaving to going on, in 1 / nats.

    Returns:
        Targets in [0, 1], [T - 1, ...].
    """
    loops = len(losses)
    cost = margin * torch.arange(loops, device=losses.device).reshape(-1, *(1,) * (losses.ndim - 1))
    charged = losses.float() + cost
    best_later = charged.flip(0).cummin(0).values.flip(0)[1:]  # of the loops from t + 1 on
    return torch.sigmoid(sharpness * (charged[:-1] - best_later))


def gate_loss(exit_logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of leaving, ``1 - targets``, summed; both [T - 1, ...]. Of soft targets it is not 0."""
    return F.binary_cross_entropy_with_logits(exit_logits.float(), 1 - targets, reduction="sum")
