"""What an export measured, as it stands in the manifest: parity with torch, and what rounding costs.

Exporter and runtime share this module. Plain frozen dataclasses, so that any reader of JSON can check them.
"""

from dataclasses import dataclass, field

from melt_runtime.bundle.contract import KVCacheKind


@dataclass(frozen=True)
class Difference:
    """Of all comparisons of one kind of tensor the one that came closest to what is allowed.

    Attributes:
        error: largest difference of an element from torch.
        magnitude: largest magnitude of torch's tensor.
        allowed: largest difference that would have passed; grows with the magnitude.
    """

    error: float
    magnitude: float
    allowed: float


@dataclass(frozen=True)
class ParityRun:
    """Every loop of a prompt and of decoded tokens, through ONNX Runtime and through torch with the same weights.

    Attributes:
        kv_cache: over which kind of KV cache; torch rounds keys and values of the quantized ones with their scales.
        loops: loops that every token went through, each compared.
        chunk: most tokens processed in parallel.
        prompt_tokens: tokens in chunks.
        decode_tokens: tokens after them, one by one.
        greedy_tokens: first choices compared, one after every chunk and every decoded token.
        greedy_tokens_equal: those of them that are torch's; of the others torch had both within the tolerance.
        tensors: by kind of tensor: ``latent``, ``key``, ``value``, ``hidden``, ``exit_logit``, ``logits``.
        hidden_by_loop: by number of the loop, error over magnitude of the hidden state.
        codes_equal: fraction of a quantized cache's codes that torch rounds to as well; the others are next to them,
            where torch's value lies on the boundary within the tolerance. None over a float cache.
    """

    kv_cache: KVCacheKind
    loops: int
    chunk: int
    prompt_tokens: int
    decode_tokens: int
    greedy_tokens: int
    greedy_tokens_equal: int
    tensors: dict[str, Difference]
    hidden_by_loop: dict[str, float]
    codes_equal: float | None


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime was from torch when the bundle was made.

    Attributes:
        activations: type of activations in which the graphs ran; another than the bundle's where the exporting
            machine cannot run that one.
        runs: one for every kind of KV cache that was made, each over all layers.
    """

    activations: str
    runs: tuple[ParityRun, ...]


@dataclass(frozen=True)
class LossLimit:
    """What rounding may cost; beyond it an export stops, or leaves the KV cache out, unless loss is allowed.

    Attributes:
        kl: largest mean KL divergence, in nats.
        greedy_agreement: smallest fraction of equal first choices.
    """

    kl: float
    greedy_agreement: float


@dataclass(frozen=True)
class CacheQuality:
    """The bundle over one kind of KV cache beside the float32 checkpoint: its own loop, whatever a pass's rows.

    Attributes:
        perplexity: of the tokens that count.
        kl: mean KL divergence of the next token's distribution from the checkpoint's, in nats.
        greedy_agreement: fraction of the tokens with the same first choice.
        hidden_error_by_loop: by number of the loop, norm of the hidden state's difference over its norm.
        exact_match: fraction of examples answered exactly, by loops, then by group, by the bundle as it ships, whose
            prompts run its copy for them; empty without an evaluation.
        limit: what was allowed; None where nothing is: random tokens do not say what a text costs.
    """

    perplexity: float
    kl: float
    greedy_agreement: float
    hidden_error_by_loop: dict[str, float]
    exact_match: dict[str, dict[str, float]]
    limit: LossLimit | None

    @property
    def within_limit(self) -> bool:
        """Whether no limit is exceeded; a value that is not a number exceeds it."""
        limit = self.limit
        return limit is None or (self.kl <= limit.kl and self.greedy_agreement >= limit.greedy_agreement)


@dataclass(frozen=True)
class WaveQuality:
    """Waves of one lag beside plain decoding, both over a float KV cache and token by token; every draft is right.

    Attributes:
        agreement: fraction of the tokens that count whose first choice is plain decoding's.
        held: fraction of them whose first choice after ``lag`` loops is the one after the last: drafts that would hold.
        perplexity: of them; at the longest lag that of plain decoding, but for rounding.
    """

    agreement: float
    held: float
    perplexity: float


@dataclass(frozen=True)
class PromptQuality:
    """The graphs for passes of several rows beside the bundle's own, on the same tokens, over a float KV cache.

    Attributes:
        loss: beside the float32 checkpoint, as for the bundle's own graphs; without exact answers.
        kl: mean KL divergence of the next token's distribution from the bundle's own, in nats.
        greedy_agreement: fraction of the tokens with the same first choice.
        hidden_error_by_loop: by number of the loop, norm of the hidden state's difference over its norm.
    """

    loss: CacheQuality
    kl: float
    greedy_agreement: float
    hidden_error_by_loop: dict[str, float]


@dataclass(frozen=True)
class Quality:
    """What rounding costs: the bundle beside the float32 checkpoint.

    Attributes:
        text: what it was measured on.
        tokens: tokens of it that count.
        loops: depth.
        chunk: most tokens processed in parallel.
        examples: of the model's own evaluation, whose answers are counted.
        perplexity_of_float32: of the checkpoint.
        kv_cache: by kind of KV cache; one that the bundle has no loop for was measured, and left out for its cost.
        waves: by lag; empty where a wave is plain decoding or refused, and in bundles made before it was measured.
    """

    text: str
    tokens: int
    loops: int
    chunk: int
    examples: int
    perplexity_of_float32: float
    kv_cache: dict[KVCacheKind, CacheQuality]
    waves: dict[str, WaveQuality] = field(default_factory=dict)

    def most_lost(self, kind: KVCacheKind) -> tuple[float, str, str] | None:
        """Where a KV cache costs the most exact answers against a float one.

        Returns:
            Percentage points lost, loops and group; None where nothing was asked, or nothing is lost.
        """
        exact, given = self.kv_cache["float"].exact_match, self.kv_cache[kind].exact_match
        lost = [
            (100 * (share - given[loops][group]), loops, group)
            for loops, groups in exact.items()
            for group, share in groups.items()
        ]
        most = max(lost, default=None)
        return most if most is not None and most[0] > 0 else None

    def describe_waves(self) -> list[str]:
        """What waves change, in one line; none where nothing was measured."""
        if not self.waves:
            return []
        agreements = ", ".join(f"lag {lag} {100 * found.agreement:.1f} %" for lag, found in self.waves.items())
        held = ", ".join(f"lag {lag} {100 * found.held:.1f} %" for lag, found in self.waves.items())
        perplexities = ", ".join(f"lag {lag} {found.perplexity:.4g}" for lag, found in self.waves.items())
        return [
            f"waves (float KV cache), first choice as in plain decoding: {agreements}; drafts that hold: {held}; "
            f"perplexity: {perplexities}"
        ]
