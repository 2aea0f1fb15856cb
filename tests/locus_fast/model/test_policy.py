"""The one-prefill step is exact: log-probs and the gradient of every parameter equal the naive loop that
repeats the prompt G times."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLForConditionalGeneration

from locus_fast.model.attention import use_attention, use_plain_attention
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import checkpoint_activations, prefill, reply_logprob
from locus_fast.step.rollout import Decoder, Rollout, Sampling
from locus_fast.step.vocabulary import Vocabulary
from tests.small_models import IMAGE, VOCABULARY, naive_logprob, small_model, small_prompt

# patches of image and cue: three prompts of different sizes
GRIDS = [
    [(8, 12), (4, 4)],
    [(4, 4), (6, 4)],
    [(10, 4), (4, 8)],
]
# unequal reply lengths, replies of one token, a group of nothing else
LENGTHS = [
    [5, 1, 9],
    [3, 7, 2],
    [1, 1, 1],
]


def rollout_of(replies: list[list[torch.Tensor]]) -> Rollout:
    flat = [reply for group in replies for reply in group]
    lengths = [len(reply) for reply in flat]
    ids = torch.full((len(flat), max(lengths)), 2)
    for row, reply in zip(ids, flat, strict=True):
        row[: len(reply)] = reply
    return Rollout(
        ids, torch.tensor(lengths), torch.zeros(ids.shape), torch.zeros(len(ids), dtype=torch.bool)
    )


def case(family: str, grids=GRIDS, lengths=LENGTHS):
    model = small_model(family)
    prompts = [small_prompt(model, grid, words=4 + 3 * i, seed=i) for i, grid in enumerate(grids)]
    rng = torch.Generator().manual_seed(7)
    replies = [[torch.randint(3, 290, (n,), generator=rng) for n in group] for group in lengths]
    return model, prompts, replies


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


CASES = {  # grids of each prompt, reply lengths of each group
    "three sizes, unequal replies": (GRIDS, LENGTHS),
    "groups of different sizes": (GRIDS, [[4], [2, 6, 3, 1], [5, 2]]),
    "a prompt without images": ([[(4, 4)], [], [(4, 6), (4, 4)]], [[2, 3], [4, 1], [1, 1]]),
    "no images at all": ([[]], [[3, 2]]),
    "one group alone": ([[(8, 8), (4, 4)]], [[3] * 8]),
    "64 groups": ([[(4, 4)]] * 64, [[1 + i % 3] for i in range(64)]),
}


@pytest.mark.parametrize(
    ("backend", "checkpointing"), [("torch", 0), ("torch", 1), ("torch", 2), ("plain", 0), ("plain", 1)]
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", CASES)
def test_one_prefill_equals_the_naive_loop(name: str, family: str, checkpointing: int, backend: str) -> None:
    grids, lengths = CASES[name]
    model, prompts, replies = case(family, grids, lengths)
    weight = torch.randn(sum(map(sum, lengths)), generator=torch.Generator().manual_seed(1))
    expected = torch.cat(naive_logprob(model, prompts, replies))
    expected_gradient = gradients(model, (expected * weight).sum())

    use_attention(model, backend=backend)
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    prefix = prefill(model, PromptBatch.of(prompts, model.config, "cpu"))
    replies_T = Replies.of(prefix.batch, rollout_of(replies).ids, lengths, range(len(lengths)))
    logprob, entropy = reply_logprob(model, prefix, replies_T, temperature=1.0)
    gradient = gradients(model, (logprob * weight).sum())

    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-5)
    assert ((entropy > 0) & (entropy < torch.tensor(VOCABULARY).log() + 1e-5)).all()
    assert gradient.keys() == expected_gradient.keys()
    for parameter, value in gradient.items():
        reference = expected_gradient[parameter]
        assert (value - reference).norm() <= 1e-5 * reference.norm().clamp(min=1e-7), parameter
    if all(grids):
        assert sum(bool(value.norm() > 0) for value in gradient.values()) > 0.9 * len(gradient)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("groups", [[1], [0, 2], [2]])
def test_some_groups(family: str, groups: list[int]) -> None:
    """Live groups among others, whose replies are left out."""
    model, prompts, replies = case(family)
    with torch.no_grad():
        expected = naive_logprob(model, prompts, replies)
        prefix = prefill(model, PromptBatch.of(prompts, model.config, "cpu"))
        logprob, _ = reply_logprob(
            model, prefix, Replies.of(prefix.batch, rollout_of(replies).ids, LENGTHS, groups), temperature=1.0
        )
    torch.testing.assert_close(
        logprob, torch.cat([expected[r] for b in groups for r in range(b * 3, b * 3 + 3)]), rtol=0, atol=1e-5
    )


def test_a_frozen_tower_sees_for_the_reference_too() -> None:
    """Its features are handed over; without a gradient there is no graph behind them."""
    model, prompts, _ = case("qwen3_vl")
    model.model.visual.requires_grad_(False)
    batch = PromptBatch.of(prompts, model.config, "cpu")
    prefix = prefill(model, batch)
    assert prefix.features.image is not None
    assert not prefix.features.image.requires_grad
    model.model.visual.forward = None  # not called again
    again = prefill(model, batch, prefix.features)
    assert torch.equal(prefix.last_hidden, again.last_hidden)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sampler_logprob_equals_the_training_forward(family: str) -> None:
    model, prompts, _ = case(family)
    batch = PromptBatch.of(prompts, model.config, "cpu")
    # many stop tokens, so that lengths differ
    vocabulary = Vocabulary(torch.arange(VOCABULARY) < IMAGE, torch.arange(2, 40))
    prefix = prefill(model, batch)
    rollout = Decoder(model, vocabulary).generate(prefix, Sampling(6, 12, 0.7, 1.0), seed=3, groups=[0, 1, 2])
    lengths = rollout.lengths.tolist()
    assert len(set(lengths)) > 2
    replies = Replies.of(batch, rollout.ids, rollout.lengths.view(3, 6).tolist(), range(3))
    logprob, _ = reply_logprob(model, prefix, replies, temperature=0.7)
    sampled = torch.cat([rollout.logprob[r, :n] for r, n in enumerate(lengths)])
    torch.testing.assert_close(logprob, sampled, rtol=0, atol=1e-5)
    for row, n in zip(rollout.ids.tolist(), lengths, strict=True):
        assert all(token >= 40 or token < 2 for token in row[: n - 1])
        assert n == 12 or 2 <= row[n - 1] < 40
        assert all(token == 2 for token in row[n:])


def test_a_prompts_replies_do_not_depend_on_its_microbatch() -> None:
    model, prompts, _ = case("qwen3_vl")
    vocabulary = Vocabulary(torch.arange(VOCABULARY) < IMAGE, torch.tensor([2]))
    with torch.no_grad():
        together = Decoder(model, vocabulary).generate(
            prefill(model, PromptBatch.of(prompts, model.config, "cpu")),
            Sampling(4, 10, 1.0, 1.0),
            seed=3,
            groups=[5, 6, 7],
        )
        alone = Decoder(model, vocabulary).generate(
            prefill(model, PromptBatch.of(prompts[1:2], model.config, "cpu")),
            Sampling(4, 10, 1.0, 1.0),
            seed=3,
            groups=[6],
        )
    width = min(together.ids.shape[1], alone.ids.shape[1])
    assert torch.equal(together.ids[4:8, :width], alone.ids[:, :width])


def test_greedy_equals_transformers_generate() -> None:
    model, prompts, _ = case("qwen3_vl")
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    vocabulary = Vocabulary(torch.ones(VOCABULARY, dtype=torch.bool), torch.tensor([2]))
    with torch.no_grad():
        rollout = Decoder(model, vocabulary).generate(
            prefill(model, PromptBatch.of(prompts, model.config, "cpu")),
            Sampling(1, 8, 0.0, 1.0),
            seed=0,
            groups=range(3),
        )
    use_plain_attention(model, "sdpa")
    for prompt, row, length in zip(prompts, rollout.ids, rollout.lengths.tolist(), strict=True):
        expected = model.generate(
            input_ids=prompt.ids[None],
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
            pixel_values=prompt.patches,
            image_grid_thw=prompt.grids,
            mm_token_type_ids=(prompt.ids == IMAGE).int()[None],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )[0, len(prompt.ids) :]
        assert row[:length].tolist() == expected[:length].tolist()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_equal_the_familys_own(family: str) -> None:
    model, prompts, _ = case(family)
    for prompt in prompts:
        is_image = (prompt.ids == IMAGE).int()[None]
        expected, delta = model.model.get_rope_index(
            prompt.ids[None], mm_token_type_ids=is_image, image_grid_thw=prompt.grids
        )
        assert torch.equal(prompt.position, expected[:, 0])
        assert int(prompt.position[0, -1]) + 1 == len(prompt.ids) + int(delta)


class Convolutions(TorchDispatchMode):
    """How many convolutions were run, forward or backward."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_patches_are_embedded_by_a_matrix_product(family: str) -> None:
    """The same numbers and gradients as transformers' convolution, which cuDNN computes in TF32 for float32
    models."""
    model, prompts, _ = case(family)
    batch = PromptBatch.of(prompts, model.config, "cpu")
    embed = model.model.visual.patch_embed
    ours = embed(batch.patches)
    theirs = type(embed).forward(embed, batch.patches)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    slopes = [torch.autograd.grad((out * weight).sum(), list(embed.parameters())) for out in (ours, theirs)]
    for mine, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    with Convolutions() as seen:
        prefix = prefill(model, batch)
        prefix.last_hidden.sum().backward()
    assert seen.count == 0
