"""The graphs that choose the next token where the logits are, for bundles that run on a device: see the contract.

As ``melt_runtime.request.sampler`` does on the host, without repetition penalty and min-p. Traced, and runnable in
torch. Sums are the ends of cumulative sums and the largest is the first of a top-k: ONNX Runtime reduces through cuDNN,
which takes hundreds of megabytes and nothing else here needs.
"""

import torch
from torch import Tensor, nn


class GreedyGraph(nn.Module):
    """The token of the largest logit."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, V] -> ids [B, 1] int64, token [B, 1] int32."""
        top, largest = logits.topk(1, dim=-1)
        return _checked(largest.squeeze(-1), logits, top)


class SampleGraph(nn.Module):
    """A token drawn after temperature, top-k and top-p."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.register_buffer("ranks", torch.arange(vocab_size), persistent=False)

    def forward(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, 1, V], three scalars, [B, 1] in [0, 1) -> ids [B, 1] int64, token [B, 1] int32."""
        ranked, order = logits.topk(len(self.ranks), dim=-1)
        weights = ((ranked - ranked[..., :1]) / temperature).exp()
        weights = weights * (self.ranks < top_k)
        weights = weights / _sum(weights)
        before = weights.cumsum(-1) - weights  # the token that crosses top_p stays
        weights = weights * (before < top_p)
        drawn = uniform.unsqueeze(-1) * _sum(weights)
        place = _sum((weights.cumsum(-1) <= drawn).float()).long()
        # Beyond the last candidate only rounding leads: the first is then as good as any that is allowed.
        place = place * (place < len(self.ranks))
        return _checked(order.gather(-1, place).squeeze(-1), logits, ranked[..., :1])


def _checked(ids: Tensor, logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """``ids``, and for the host the same in 4 bytes, or -1 where a logit is not a number or the largest is infinite."""
    broken = _sum(logits.isnan().float()) + (top - top)  # infinity less itself is not a number either
    return ids, torch.where(broken.squeeze(-1) == 0, ids, -1).to(torch.int32)


def _sum(x: Tensor) -> Tensor:
    """Sum over the last axis, [..., V] -> [..., 1]."""
    return x.cumsum(-1)[..., -1:]
