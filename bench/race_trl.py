"""The peer: TRL's GRPOTrainer on the same model, prompts, images and number of rollouts, at the settings that
suit it best on a CPU.

No gradient checkpointing, no logging, no saving; the head scores reply tokens only, as it does where Triton
runs. Image processor and tokenizer are joined by hand, because the stock processor asks for torchvision's
video processor, which a CPU installation does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.race_case import GROUP, KL, LEARNING_RATE, LENGTH, PIXELS, PROMPTS, Case, luck
from locus_fast.model.prompts import PROMPT_STYLES

ROWS = PROMPTS * GROUP
PROCESSORS = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}


def processor_of(case: Case) -> Any:
    """The family's processor without videos."""
    spec = case.spec
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]},
        patch_size=spec.patch,
        temporal_patch_size=spec.frames,
        merge_size=spec.merge,
        image_mean=spec.mean,
        image_std=spec.std,
    )
    family = PROCESSORS[case.family]
    proper = family.check_argument_for_proper_class

    def without_video(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else proper(self, name, argument)

    with patch.object(family, "check_argument_for_proper_class", without_video):
        return family(images, case.tokenizer, None, chat_template=case.tokenizer.chat_template)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """A cheap stand-in for reading boxes in Python: the shares that our side adds."""
    return luck(len(completions)).tolist()


class Peer:
    """A GRPOTrainer driven by hand; `step()` is one optimizer update on fresh replies of every prompt.

    rows_at_once: replies of a forward and backward pass. On a CPU two are quickest: sixteen, four and one
    took 1.5, 1.1 and 1.3 times as long.
    """

    def __init__(self, case: Case, kl: bool, out: Path, rows_at_once: int = 2):
        import trl.trainer.utils
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        # score reply tokens only; the tiles stay PyTorch's
        trl.trainer.utils._use_triton = lambda device: True
        suppressed = (~case.allowed).nonzero()[:, 0].tolist()
        config = GRPOConfig(
            str(out),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=ROWS // rows_at_once,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            generation_kwargs={"suppress_tokens": suppressed},
            beta=KL if kl else 0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        text = PROMPT_STYLES["direct"].text.format(units=case.prompter.frame.units)
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
        examples = [
            [Image.fromarray(np.ascontiguousarray(p)) for p in (e.image, e.cue)] for e in case.examples
        ]
        data = Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": content}]] * PROMPTS, "images": examples}
        )
        self.trainer = GRPOTrainer(
            case.load(), reward, config, train_dataset=data, processing_class=processor_of(case)
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = self.microbatches = ROWS // rows_at_once
        # read once: its image decoding is left out of the race
        self.batch = next(iter(self.trainer.get_train_dataloader()))

    def step(self) -> None:
        """What Trainer's loop does between two optimizer steps, without its callbacks."""
        trainer = self.trainer
        for _ in range(self.microbatches):  # the first one generates for all of them
            trainer.training_step(trainer.model, [dict(row) for row in self.batch], None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        assert trainer._metrics["train"]["completions/min_length"][-1] == LENGTH
