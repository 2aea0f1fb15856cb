"""What is asked, and a task's tokens, positions and pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locus_fast.data.example import Example
from locus_fast.errors import UserError, reason
from locus_fast.model.families import Frame, family_of, frame_of
from locus_fast.model.preprocess import PatchSpec, patches_of

# The recipe's wording is a fact of the paper; "{units}" is "pixel coordinates" there.
THINK = (
    "Image 1 is a full scene image. Image 2 is a cropped region from Image 1. Please find where Image 2 is "
    "located in Image 1, and output the bounding box as [x1, y1, x2, y2] in {units}. First think inside "
    "<think> </think>, then give the answer inside <answer> </answer>, that is: <think> reasoning "
    "</think><answer> [x1, y1, x2, y2] </answer>."
)
DIRECT = "Answer with the bounding box [x1, y1, x2, y2] of the second image in the first, in {units}."


@dataclass(frozen=True)
class PromptStyle:
    """A way to ask, and how its replies are read: see `locus_kernels.box_reward` for the last two."""

    text: str
    thinks: bool  # the answer comes after a thinking
    grammar: str  # the reply structure that the format reward asks for
    which: str  # the box of a reply that counts


PROMPT_STYLES = {
    "think": PromptStyle(THINK, thinks=True, grammar="think_answer", which="answer"),
    "direct": PromptStyle(DIRECT, thinks=False, grammar="direct", which="first"),
}


@dataclass(frozen=True)
class Prompt:
    """One example as the model reads it."""

    ids: Tensor  # int64 [P], image placeholders expanded
    position: Tensor  # int64 [3, P]: temporal, row and column rotary positions
    pixels: Tensor  # uint8, the bytes [height, width, 3] of image and cue as resized, end to end
    grids: Tensor  # int64 [images, 3]: frames, rows, columns of patches
    spec: PatchSpec  # how patches are made of them
    target: Tensor  # float32 [4]: the true box in the family's coordinate frame
    scale: Tensor  # float32 [4]: frame units per pixel of the original image
    size_class: str
    source: str
    skipped: tuple[str, ...] = ()

    @property
    def patches(self) -> Tensor:
        """What a plain model takes, made on the host at every call: float32 [patches, 3 * frames * patch**2].
        A batch makes its own on its device."""
        return patches_of(self.pixels, self.grids, self.spec)


def template_pieces(tokenizer: Any, text: str, images: int, placeholder: int) -> list[list[int]]:
    """The token ids around `images` images and the text behind them, by the tokenizer's chat template: images
    + 1 pieces. UserError if it fails or has no place for them."""
    where, remedy = (
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}",
        "copy the base model's chat_template.jinja or chat_template.json",
    )
    message = [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]
    try:
        ids = list(
            tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        )
    except Exception as error:  # templates raise what they like
        fails = "there is none" if not tokenizer.chat_template else reason(error)
        raise UserError(f"{where} cannot be used for {images} images ({fails}): {remedy}.") from None
    at = [i for i, token in enumerate(ids) if token == placeholder]
    if len(at) != images:
        raise UserError(
            f"{where} gives {len(at)} image placeholders (token {placeholder}) for {images} images, and "
            f"must give one each: {remedy}."
        )
    return [ids[start + 1 : end] for start, end in zip([-1, *at], [*at, len(ids)], strict=True)]


def question_pieces(
    tokenizer: Any, style: PromptStyle, frame: Frame, placeholder: int
) -> tuple[list[int], list[int], list[int]]:
    """The token ids before, between and after the two images. UserError if the chat template has no place for
    two images."""
    before, between, after = template_pieces(tokenizer, style.text.format(units=frame.units), 2, placeholder)
    return before, between, after


class Prompter:
    """Turns examples into prompts for one model. The question is the same every time, so its tokens are made
    once."""

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        spec: PatchSpec,
        *,
        style: str,
        image_pixels: tuple[int, int],
        cue_pixels: tuple[int, int],
        answer_prefix: str = "",
    ):
        """style: a name in `PROMPT_STYLES`. image_pixels, cue_pixels: fewest and most pixels of the resized
        image and cue. answer_prefix: text that every reply begins with; it is part of the prompt, so it is
        neither sampled nor trained on, and `opening` has its ids for the reader."""
        self.family, self.frame, self.spec = family_of(config), frame_of(config), spec
        self.pixels = (image_pixels, cue_pixels)
        self.placeholder: int = getattr(config, self.family.placeholder)
        self.style = PROMPT_STYLES[style]
        self.pieces = question_pieces(tokenizer, self.style, self.frame, self.placeholder)
        start, end = self.family.thinking, self.family.thinking.replace("<", "</")
        # a thinking model's template may begin the reply itself
        opened = tokenizer.decode(self.pieces[2]).rstrip().endswith(start)
        self.is_thinking = opened and end not in answer_prefix  # what a reply says at first is no answer yet
        said = [start, answer_prefix] if opened else [answer_prefix]
        if opened and not (self.style.thinks or self.is_thinking):
            # the reply to such a question begins where the thinking has ended
            said = [answer_prefix.partition(end)[2]]
        self.opening: list[int] = [
            id for text in said for id in tokenizer.encode(text, add_special_tokens=False)
        ]
        self.pieces = (
            *self.pieces[:2],
            [*self.pieces[2], *tokenizer.encode(answer_prefix, add_special_tokens=False)],
        )

    def check_style(self) -> None:
        """Raises UserError for a question whose answer is read from the first word on, if the prompt has
        begun a thinking: a box said in it would count, and the format could never be earned."""
        start = self.family.thinking
        if self.is_thinking and not self.style.thinks:
            raise UserError(
                f"--prompt-style direct: the model's chat template begins every reply with {start}, where a "
                "box is no answer yet; ask with --prompt-style think, or end the thinking at once with "
                f"--answer-prefix '{start.replace('<', '</')}'."
            )

    def __call__(self, example: Example) -> Prompt:
        """The prompt of an example; for a loader's thread, as resizing releases the GIL. Its pixels stay
        bytes, an eighth of their patches."""
        images = [
            self.family.resize(pixels, factor=self.spec.factor, min_pixels=least, max_pixels=most)
            for pixels, (least, most) in zip((example.image, example.cue), self.pixels, strict=True)
        ]
        grids = [
            (1, image.shape[0] // self.spec.patch, image.shape[1] // self.spec.patch) for image in images
        ]
        cells = [(rows // self.spec.merge, columns // self.spec.merge) for _, rows, columns in grids]
        ids, position = self.family.positions(self.pieces, cells, self.placeholder)
        size = (example.image.shape[1], example.image.shape[0])
        scale = self.frame.scale(size, (images[0].shape[1], images[0].shape[0]))
        return Prompt(
            ids=ids,
            position=position,
            pixels=torch.from_numpy(np.concatenate([image.ravel() for image in images])),
            grids=torch.tensor(grids),
            spec=self.spec,
            target=torch.tensor(np.array(example.box) * scale, dtype=torch.float32),
            scale=torch.tensor(scale, dtype=torch.float32),
            size_class=example.size_class,
            source=example.source,
            skipped=example.skipped,
        )
