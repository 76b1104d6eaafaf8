"""melt-tiny's tokenizer: byte-level BPE, so that any text has tokens, in which each word of the task is one token."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from melt_models.tiny.task import DOMAINS, MIXED, make_problem

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|user|>{{ message.content }}
{%- elif message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|end|>
{%- else -%}{{ raise_exception('melt-tiny knows the roles user and assistant, got ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on problems drawn with ``seed``; the same seed gives the same tokenizer.

    Raises:
        RuntimeError: a name of the task is not a single token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # Text gets a space in front when it is encoded and loses it when it is decoded.
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    problems = [make_problem(rng, held_out=False, kinds=MIXED) for _ in range(4000)]
    bpe.train_from_iterator((m["content"] for p in problems for m in p.messages()), trainer)
    for name in sorted({name for domain in DOMAINS for name in domain.entities}):
        if len(bpe.encode(name).ids) != 1:
            raise RuntimeError(f"{name!r} is {len(bpe.encode(name).ids)} tokens, expected 1")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
