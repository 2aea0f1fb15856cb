"""Box reward: token ids of replies in; boxes, format flags, IoU, rewards and group advantages out."""

from locus_kernels.box_reward.op import box_reward, read_boxes
from locus_kernels.box_reward.overlaps import giou, iou
from locus_kernels.box_reward.records import BoxReading, BoxReward
from locus_kernels.box_reward.reference import group_advantage
from locus_kernels.box_reward.shapes import REWARD_SHAPES
from locus_kernels.box_reward.stopping import CLOSED, START, closing_table
from locus_kernels.box_reward.table import TokenTable, build_token_table

__all__ = [
    "CLOSED",
    "REWARD_SHAPES",
    "START",
    "BoxReading",
    "BoxReward",
    "TokenTable",
    "box_reward",
    "build_token_table",
    "closing_table",
    "giou",
    "group_advantage",
    "iou",
    "read_boxes",
]
