"""Replies from a plain `transformers` model by the shared-prefix decoder: vision tower and prompt run once,
however many replies are drawn. Prints the greedy reply's token ids, and sampled replies."""

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from locus_fast.model.attention import use_attention
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import prefill
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.prompts import Prompt, Prompter
from locus_fast.step.rollout import Decoder, Sampling, Vocabulary
from locus_fast.tiny.scenes import SceneCues
from locus_fast.weights.checkpoint import TINY_BASE

LONGEST = 16  # tokens of a reply


def scene_prompt(config, tokenizer) -> Prompt:
    """A drawn scene, a crop of it, and the question where the crop lies."""
    limits = {"image_pixels": (96 * 96, 160 * 160), "cue_pixels": (32 * 32, 48 * 48)}
    prompter = Prompter(tokenizer, config, PatchSpec.of(config, TINY_BASE), style="direct", **limits)
    return prompter(SceneCues(seed=0, held_out=1).held_out(0))


def main() -> None:
    model = AutoModelForImageTextToText.from_pretrained(TINY_BASE).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    use_attention(model)  # prompts and replies in packed rows, for this model from here on
    decoder = Decoder(model, Vocabulary.of(model, tokenizer))
    batch = PromptBatch.of([scene_prompt(model.config, tokenizer)], model.config, "cpu")
    with torch.no_grad():
        prefix = prefill(model, batch)
        greedy = decoder.generate(prefix, Sampling(1, LONGEST, temperature=0.0, top_p=1), seed=0, groups=[0])
        sampled = decoder.generate(prefix, Sampling(4, LONGEST, temperature=1.0, top_p=1), seed=0, groups=[0])
    print("greedy", *greedy.ids[0, : greedy.lengths[0]].tolist())
    for ids, length in zip(sampled.ids, sampled.lengths, strict=True):
        print("sampled", tokenizer.decode(ids[:length], skip_special_tokens=True))


if __name__ == "__main__":
    main()
