"""The dimensions of a model and of its work, as plain numbers: what the cost and memory ledgers count from,
without weights.

Legend: N patches of an image, P prompt tokens, G replies a group, n tokens of a reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from locus_fast.data.resize import grid_size

# numbers of rows that a decoder runs with
LADDER = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
)
PROMPT_STEP = 1024  # the tokens that static prompt buffers grow by


def rung(rows: int) -> int:
    """The least number of rows that a decoder runs so many replies with."""
    return next((n for n in LADDER if n >= rows), rows)


def recomputed(layers: int, checkpointing: int) -> int:
    """How many of so many layers are recomputed in backward: none for 0, else every `checkpointing`-th, the
    first included."""
    return -(-layers // checkpointing) if checkpointing else 0


@dataclass(frozen=True)
class VisionShape:
    """A vision tower. `gated` blocks have three MLP matrices, others two; `normed_twice` blocks keep a
    float32 copy in each norm (RMSNorm)."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    out: int  # the language model's hidden size
    patch: int  # pixels of a patch's side
    merge: int  # patches of a language token's side
    frames: int = 2
    channels: int = 3
    gated: bool = False
    window: int = 0  # pixels of an attention window's side; 0: every block attends to the whole image
    full: tuple[int, ...] = ()  # with windows, the blocks that attend to the whole image
    deepstack: tuple[int, ...] = ()  # blocks whose states are merged and added to the first language layers
    positions: int = 0  # rows of a learned position table

    @property
    def factor(self) -> int:
        """Pixels of a language token's side."""
        return self.patch * self.merge

    @property
    def patch_values(self) -> int:
        return self.channels * self.frames * self.patch**2

    @property
    def block_parameters(self) -> int:
        h, norm = self.hidden, self.hidden * (1 if self.gated else 2)  # LayerNorm has a bias
        mlp = (
            3 * h * self.intermediate + 2 * self.intermediate + h
            if self.gated
            else 2 * h * self.intermediate + self.intermediate + h
        )
        return 2 * norm + 3 * h * h + 3 * h + h * h + h + mlp

    @property
    def parameters(self) -> int:
        embed = self.patch_values * self.hidden + (0 if self.gated else self.hidden)
        return (
            embed
            + self.positions * self.hidden
            + self.depth * self.block_parameters
            + self.projector_parameters
        )

    @property
    def projector_parameters(self) -> int:
        """Of the mergers, DeepStack's included."""
        wide = self.hidden * self.merge**2
        merger = wide * wide + wide + wide * self.out + self.out
        return self.hidden * (1 if self.gated else 2) + merger + len(self.deepstack) * (2 * wide + merger)

    def sequences(self, rows: int, columns: int) -> list[int]:
        """Patches of each attention window of an image of rows x columns patches, cut as Qwen2.5-VL cuts it
        (arXiv 2502.13923, section 2.1.1)."""
        side = self.window // self.factor

        def cuts(patches: int) -> list[int]:
            cells = patches // self.merge
            return [side] * (cells // side) + [cells % side] * (cells % side > 0)

        return [h * w * self.merge**2 for h in cuts(rows) for w in cuts(columns)]

    def pairs(self, rows: int, columns: int, every: int = 1) -> int:
        """Query-key pairs of one image over every `every`-th block."""
        whole, blocks = (rows * columns) ** 2, range(0, self.depth, every)
        if not self.window:
            return len(blocks) * whole
        full = len([block for block in blocks if block in self.full])
        return full * whole + (len(blocks) - full) * sum(n * n for n in self.sequences(rows, columns))


@dataclass(frozen=True)
class TextShape:
    """A language model with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Elements of one layer's weight matrices."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    def adapters(self, rank: int) -> int:
        """Elements of one layer's adapters of that rank: two matrices beside each of its seven."""
        return rank * (7 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    @property
    def layer_parameters(self) -> int:
        bias = (self.queries + 2 * self.keys) * self.qkv_bias
        return self.matrices + bias + 2 * self.head_dim * self.qk_norm + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return (
            self.layers * self.layer_parameters + self.hidden + self.head_parameters * (1 if self.tied else 2)
        )


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model. `model.families.shape_of` makes it of a config."""

    architecture: str  # a name in `cost.traffic.LAUNCHES`
    vision: VisionShape
    text: TextShape

    @property
    def parameters(self) -> int:
        return self.vision.parameters + self.text.parameters


@dataclass(frozen=True)
class Trained:
    """What a run trains: whole parts of the model; or adapters of a rank beside the language layers'
    matrices, and then nothing else."""

    vision: bool = True
    projector: bool = True
    language: bool = True
    rank: int = 0

    @staticmethod
    def adapters(rank: int) -> Trained:
        return Trained(vision=False, projector=False, language=False, rank=rank)

    @property
    def tower(self) -> bool:
        """Whether the vision tower, its projector included, has a backward."""
        return self.vision or self.projector

    def parameters(self, shape: ModelShape) -> int:
        """How many parameters of the model are trained; adapters are not of the model."""
        vision, projector = shape.vision.parameters, shape.vision.projector_parameters
        return (
            (vision - projector) * self.vision
            + projector * self.projector
            + shape.text.parameters * self.language
        )


EVERYTHING = Trained()

QWEN25_VISION = VisionShape(
    32, 1280, 16, 3420, 3584, patch=14, merge=2, gated=True, window=112, full=(7, 15, 23, 31)
)
QWEN3_VISION = VisionShape(24, 1024, 16, 4096, 2560, patch=16, merge=2, deepstack=(5, 11, 17), positions=2304)

# The published dimensions of the presets' models, from their config.json.
PUBLISHED = {
    "qwen2.5-vl-7b": ModelShape(
        "qwen2_5_vl", QWEN25_VISION, TextShape(28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True)
    ),
    "qwen3-vl-4b": ModelShape(
        "qwen3_vl", QWEN3_VISION, TextShape(36, 2560, 32, 8, 128, 9728, 151936, tied=True, qk_norm=True)
    ),
    "mimo-vl-7b": ModelShape(
        "qwen2_5_vl",
        replace(QWEN25_VISION, intermediate=3456, out=4096),
        TextShape(36, 4096, 32, 8, 128, 11008, 151680, qkv_bias=True),
    ),
}


@dataclass(frozen=True)
class Group:
    """The work of one prompt and its replies."""

    grids: tuple[tuple[int, int], ...]  # (rows, columns) of patches of each image
    prompt: int  # tokens, those of the images included
    replies: tuple[int, ...]  # tokens of each reply, the end-of-sequence token included; at least 1
    active: bool = True  # False: it has no gradient

    @property
    def fed(self) -> list[int]:
        """Reply tokens that go through the model: all but each last, since the prompt's last state predicts
        the first."""
        return [n - 1 for n in self.replies]

    @cached_property
    def scored(self) -> int:
        """Tokens of all its replies."""
        return sum(self.replies)

    @cached_property
    def longest(self) -> int:
        """Tokens of its longest reply."""
        return max(self.replies)

    @cached_property
    def own_pairs(self) -> int:
        """Query-key pairs of its replies with themselves, over the tokens that are fed."""
        return sum(n * (n + 1) // 2 for n in self.fed)

    @property
    def patches(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)


def group_of(
    shape: ModelShape,
    sizes: Sequence[tuple[int, int]],
    pixels: Sequence[tuple[int, int]],
    *,
    text_tokens: int,
    replies: int,
    reply_tokens: int,
) -> Group:
    """The work of one prompt with images of these sizes.

    sizes: (width, height) of image and cue in pixels; pixels: fewest and most pixels each is resized to;
    text_tokens: of the prompt, the chat template and the image marks included.
    """
    vision = shape.vision
    grids = []
    for (width, height), (least, most) in zip(sizes, pixels, strict=True):
        rows, columns = grid_size(height, width, factor=vision.factor, min_pixels=least, max_pixels=most)
        grids.append((rows // vision.patch, columns // vision.patch))
    tokens = sum(rows * columns for rows, columns in grids) // vision.merge**2
    return Group(tuple(grids), tokens + text_tokens, (reply_tokens,) * replies)
