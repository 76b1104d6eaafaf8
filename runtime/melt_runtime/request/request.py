"""One answer in the making: takes the tokens that were chosen for it and knows when it ends. Pure."""

from collections.abc import Sequence

from melt_runtime.memory.plan import Array
from melt_runtime.request.answer import AnswerText
from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.request.prompts import EncodedPrompt
from melt_runtime.request.result import FinishReason, GenerationResult, Timings
from melt_runtime.request.sampler import Sampler
from melt_runtime.request.settings import GenerationSettings
from melt_runtime.schedule.wave import Drafts
from melt_runtime.text.codec import TextCodec


class Request:
    """A checked prompt, how to continue it, and the answer so far.

    Attributes:
        prompt: token ids of all that the model is to see, at least one.
        settings: how to continue it.
        new_ids: tokens of the answer so far.
        loops: of each, those after which it was chosen.
        logprobs: of each, what the model made of it, where that is asked for.
        text: its text so far.
        is_finished: whether no more tokens come.
    """

    def __init__(self, prompt: EncodedPrompt, settings: GenerationSettings, codec: TextCodec):
        self.prompt, self.settings = prompt.ids, settings
        self.new_ids: list[int] = []
        self.loops: list[int] = []
        self.text = ""
        self.is_finished = self._is_cancelled = False
        self._codec = codec
        self._sampler = Sampler(settings, len(prompt.ids))
        self._seen: dict[int, TokenLogprob] = {}  # by place, of the last choice there
        self.logprobs: list[TokenLogprob] = []
        self._context = prompt.ids if prompt.continues else ()
        self._answer = self._new_text()
        self._piece = ""
        self._decodes = False
        self._prefill_seconds = self._decode_seconds = 0.0

    def choose(self, logits: Array, context: Sequence[int], ahead: int = 0) -> int:
        """The next token, by the settings.

        Args:
            logits: [V] float32; not changed.
            context: token ids so far.
            ahead: how many tokens of the answer that ``context`` ends with are only drafts.

        Raises:
            NumericalError: the logits hold NaN or infinity.
        """
        place = len(self.new_ids) + ahead
        token = self._sampler.choose(logits, context, place)
        if self.settings.logprobs is not None:
            self._seen[place] = TokenLogprob.of(logits, token, self.settings.logprobs)
        return token

    def accept(self, token: int, loops: int) -> None:
        """Takes the next token of the answer, which the token before gave after so many loops."""
        if self.settings.logprobs is not None:
            self.logprobs.append(self._seen.pop(len(self.new_ids)))
        self.new_ids.append(token)
        self.loops.append(loops)
        piece = self._answer.push(token)
        if self._answer.stopped or len(self.new_ids) == self.settings.max_new_tokens:
            piece += self._answer.finish()
            self.is_finished = True
        self.text += piece
        self._piece += piece

    def cancel(self) -> None:
        """Ends it with the text so far, what was held back included; nothing where it has ended."""
        if not self.is_finished:
            self.is_finished = self._is_cancelled = True
            piece = self._answer.finish()
            self.text += piece
            self._piece += piece

    def take_piece(self) -> str:
        """The text that came since this was last asked for."""
        piece, self._piece = self._piece, ""
        return piece

    @property
    def _finish_reason(self) -> FinishReason:
        if self._is_cancelled:
            return "cancelled"
        return "stop" if self._answer.stopped else "length"

    def text_so_far(self) -> str:
        """The text of the tokens so far, what was held back included, wherever the answer was left."""
        answer = self._new_text()
        return "".join([*map(answer.push, self.new_ids), answer.finish()])

    def _new_text(self) -> AnswerText:
        return AnswerText(self._codec, self.settings, self._context)

    def count_seconds(self, seconds: float) -> None:
        """Counts a pass: up to the one that gives the first token they are the prompt's."""
        if self._decodes:
            self._decode_seconds += seconds
        else:
            self._prefill_seconds += seconds
            self._decodes = bool(self.new_ids)

    def result(
        self, cached_tokens: int, prefilled: int, state_bytes: int, passes: int, drafts: Drafts | None = None
    ) -> GenerationResult:
        """The whole answer.

        Args:
            cached_tokens: of the prompt, those that were in the cache already.
            prefilled: of the prompt, those that were computed.
            state_bytes: bytes of the whole state.
            passes: that were run with tokens of the answer.
            drafts: of a wave, what became of them.
        """
        return GenerationResult(
            text=self.text,
            token_ids=tuple(self.new_ids),
            finish_reason=self._finish_reason,
            loops=self.settings.loops,
            loops_per_token=tuple(self.loops),
            prompt_tokens=len(self.prompt),
            cached_tokens=cached_tokens,
            timings=Timings(
                prefill_seconds=self._prefill_seconds,
                prefill_tokens=prefilled,
                decode_seconds=self._decode_seconds,
                decode_tokens=max(len(self.new_ids) - 1, 0),
            ),
            state_bytes=state_bytes,
            passes=passes,
            drafts=drafts,
            logprobs=None if self.settings.logprobs is None else tuple(self.logprobs),
        )
