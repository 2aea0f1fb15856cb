"""The embedded default's tokenizer: byte-level BPE of a few hundred tokens, one token a digit, Qwen's special
tokens and chat layout.

Merges are learned from the questions of `prompts.py` and from replies, so that a question is a handful of
tokens and a box is 13.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from locus_fast.model.families import Frame
from locus_fast.model.prompts import PROMPT_STYLES

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% "
    "endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Any:
    """Train the tokenizer; deterministic, a second or less."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"(?<![xy])\d|\[|\]|\n|<[^>]*>"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    texts = [
        style.text.format(units=Frame(extent).units)
        for style in PROMPT_STYLES.values()
        for extent in (None, 99)
    ]
    replies = [
        "user\n",
        "assistant\n",
        "system\n",
        "[10, 20, 30, 40]",
        "<think>the cue is here</think><answer>[10, 20, 30, 40]</answer>",
    ]
    tokenizer.train_from_iterator((texts[:2] * 20 + texts + replies) * 50, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
