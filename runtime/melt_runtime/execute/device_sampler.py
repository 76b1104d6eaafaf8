"""Chooses the next token on the device that holds the logits: 4 bytes come back, and the token is there already.

Greedy, temperature, top-k and top-p; everything else is the host sampler's. One sequence. A seed gives
the same answers again, but not those of the host sampler, which draws in another order.
"""

import numpy as np

from melt_runtime.device.ort import ort
from melt_runtime.device.providers import DeviceKind
from melt_runtime.errors import NumericalError
from melt_runtime.memory.buffers import Buffer
from melt_runtime.request.settings import GenerationSettings


class DeviceSampler:
    """The graphs ``greedy`` and ``sample`` over buffers of their own.

    Attributes:
        logits: [1, 1, V] float32, where the head writes.
    """

    def __init__(
        self,
        greedy: ort.InferenceSession,
        sample: ort.InferenceSession,
        vocab_size: int,
        device: DeviceKind,
        number: int,
    ):
        self._greedy, self._sample = greedy, sample
        self._vocab_size = vocab_size
        self.logits = Buffer((1, 1, vocab_size), "float32", device, number)
        self._token = Buffer((1, 1), "int32", "cpu")
        self._uniform = Buffer((1, 1), "float32", device, number)
        self._temperature, self._top_p = (Buffer((1,), "float32", device, number) for _ in range(2))
        self._top_k = Buffer((1,), "int64", device, number)
        self._random = np.random.default_rng()
        self._is_greedy = True

    @staticmethod
    def can_draw(settings: GenerationSettings) -> bool:
        """Whether these graphs do what ``settings`` ask for."""
        return settings.is_plain_choice

    def start(self, settings: GenerationSettings) -> None:
        """Takes the settings of one answer to the device."""
        self._is_greedy = settings.temperature == 0
        if self._is_greedy:
            return
        self._random = np.random.default_rng(settings.seed)
        self._temperature.write(np.array([settings.temperature], dtype=np.float32))
        self._top_p.write(np.array([settings.top_p], dtype=np.float32))
        self._top_k.write(np.array([settings.top_k or self._vocab_size], dtype=np.int64))

    def bind(self, ids: Buffer) -> tuple[ort.IOBinding, ort.IOBinding]:
        """Bindings of both graphs that leave the token in ``ids`` [1, 1] int64, for the next step."""
        greedy, sample = self._greedy.io_binding(), self._sample.io_binding()
        for binding in (greedy, sample):
            self.logits.bind_input(binding, "logits")
            ids.bind_output(binding, "ids", (1, 1))
            self._token.bind_output(binding, "token")
        for name, buffer in (("temperature", self._temperature), ("top_k", self._top_k), ("top_p", self._top_p)):
            buffer.bind_input(sample, name, ())
        self._uniform.bind_input(sample, "uniform")
        return greedy, sample

    def draw(self, bindings: tuple[ort.IOBinding, ort.IOBinding]) -> int:
        """The next token, from the logits that lie on the device.

        Raises:
            NumericalError: the logits hold NaN or infinity, or nothing above minus infinity.
        """
        if self._is_greedy:
            self._greedy.run_with_iobinding(bindings[0])
        else:
            self._uniform.write(self._random.random((1, 1), dtype=np.float32))
            self._sample.run_with_iobinding(bindings[1])
        token = int(self._token.value.numpy()[0, 0])
        if token < 0:
            raise NumericalError("the model gave NaN or infinite logits: export it again with --activations bfloat16")
        return token
