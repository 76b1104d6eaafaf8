"""What the exit gate learns, the model frozen: at each loop, whether a later one would have paid.

Step two of Ouro's training of its gate (arXiv 2510.25741): binary cross entropy at every token and loop but the last,
which takes whoever is left, against a target made of the token's losses after each loop. Knows nothing of models.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
