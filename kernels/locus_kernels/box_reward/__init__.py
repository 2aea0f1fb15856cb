"""Box reward: token ids of replies in; boxes, format flags, IoU, rewards and group advantages out."""

from locus_kernels.box_reward.reference import (
    REWARD_SHAPES,
    BoxReading,
    BoxReward,
    box_reward,
    giou,
    group_advantage,
    iou,
    read_boxes,
)
from locus_kernels.box_reward.table import TokenTable, build_token_table

__all__ = [
    "REWARD_SHAPES",
    "BoxReading",
    "BoxReward",
    "TokenTable",
    "box_reward",
    "build_token_table",
    "giou",
    "group_advantage",
    "iou",
    "read_boxes",
]
