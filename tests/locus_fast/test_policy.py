"""The one-prefill step is exact: log-probs and the gradient of every parameter equal the naive loop that repeats the prompt G times."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from locus_fast.packing import PromptBatch, Replies
from locus_fast.policy import checkpoint_activations, prefill, reply_logprob, use_attention
from locus_fast.rollout import Decoder, Sampling, Vocabulary
from locus_fast.types import Rollout
from tests.small_models import IMAGE, VOCABULARY, naive_logprob, small_model, small_prompt

GRIDS = [[(8, 12), (4, 4)], [(4, 4), (6, 4)], [(10, 4), (4, 8)]]  # patches of image and cue: three prompts of different sizes
LENGTHS = [[5, 1, 9], [3, 7, 2], [1, 1, 1]]  # unequal reply lengths, replies of one token, a group of nothing else


def rollout_of(replies: list[list[torch.Tensor]]) -> tuple[Rollout, list[int]]:
    flat = [reply for group in replies for reply in group]
    lengths = [len(reply) for reply in flat]
    ids = torch.full((len(flat), max(lengths)), 2)
    for row, reply in zip(ids, flat, strict=True):
        row[: len(reply)] = reply
    return Rollout(ids, torch.tensor(lengths), torch.zeros(ids.shape)), lengths


def case(family: str, grids=GRIDS, lengths=LENGTHS):
    model = small_model(family)
    prompts = [small_prompt(model, grid, words=4 + 3 * i, seed=i) for i, grid in enumerate(grids)]
    rng = torch.Generator().manual_seed(7)
    replies = [[torch.randint(3, 290, (n,), generator=rng) for n in group] for group in lengths]
    return model, prompts, replies


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_prefill_equals_the_naive_loop(family: str, checkpointing: bool) -> None:
    model, prompts, replies = case(family)
    weight = torch.randn(sum(map(sum, LENGTHS)), generator=torch.Generator().manual_seed(1))
    expected = torch.cat(naive_logprob(model, prompts, replies))
    expected_gradient = gradients(model, (expected * weight).sum())

    if checkpointing:
        checkpoint_activations(model)
    rollout, lengths = rollout_of(replies)
    prefix = prefill(model, PromptBatch.of(prompts, model.config, "cpu"))
    logprob, entropy = reply_logprob(model, prefix, Replies.of(prefix.batch, rollout, lengths, range(3)), temperature=1.0)
    gradient = gradients(model, (logprob * weight).sum())

    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-5)
    assert ((entropy > 0) & (entropy < torch.tensor(VOCABULARY).log() + 1e-5)).all()
    assert gradient.keys() == expected_gradient.keys()
    for name, value in gradient.items():
        reference = expected_gradient[name]
        assert (value - reference).norm() <= 1e-5 * reference.norm().clamp(min=1e-7), name
    assert sum(bool(value.norm() > 0) for value in gradient.values()) > 0.9 * len(gradient)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("grids", "lengths", "groups"),
    [
        (GRIDS, LENGTHS, [1]),  # one live group among three
        (GRIDS, LENGTHS, [0, 2]),
        ([[]], [[3, 2]], [0]),  # a prompt without images
        ([[(4, 4)], []], [[2], [4]], [0, 1]),  # with and without, one reply each
    ],
)
def test_some_groups(family: str, grids, lengths, groups) -> None:
    model, prompts, replies = case(family, grids, lengths)
    rollout, flat = rollout_of(replies)
    G = len(lengths[0])
    with torch.no_grad():
        expected = naive_logprob(model, prompts, replies)
        prefix = prefill(model, PromptBatch.of(prompts, model.config, "cpu"))
        logprob, _ = reply_logprob(model, prefix, Replies.of(prefix.batch, rollout, flat, groups), temperature=1.0)
    torch.testing.assert_close(logprob, torch.cat([expected[r] for b in groups for r in range(b * G, b * G + G)]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sampler_logprob_equals_the_training_forward(family: str) -> None:
    model, prompts, _ = case(family)
    batch = PromptBatch.of(prompts, model.config, "cpu")
    vocabulary = Vocabulary(torch.arange(VOCABULARY) < IMAGE, torch.arange(2, 40))  # many stop tokens, so that lengths differ
    prefix = prefill(model, batch)
    rollout = Decoder(model, vocabulary).generate(prefix, Sampling(6, 12, 0.7, 1.0), seed=3, groups=[0, 1, 2])
    lengths = rollout.lengths.tolist()
    assert len(set(lengths)) > 2
    logprob, _ = reply_logprob(model, prefix, Replies.of(prefix.batch, rollout, lengths, range(3)), temperature=0.7)
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
            prefill(model, PromptBatch.of(prompts, model.config, "cpu")), Sampling(4, 10, 1.0, 1.0), seed=3, groups=[5, 6, 7]
        )
        alone = Decoder(model, vocabulary).generate(
            prefill(model, PromptBatch.of(prompts[1:2], model.config, "cpu")), Sampling(4, 10, 1.0, 1.0), seed=3, groups=[6]
        )
    width = min(together.ids.shape[1], alone.ids.shape[1])
    assert torch.equal(together.ids[4:8, :width], alone.ids[:, :width])


def test_greedy_equals_transformers_generate() -> None:
    model, prompts, _ = case("qwen3_vl")
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    vocabulary = Vocabulary(torch.ones(VOCABULARY, dtype=torch.bool), torch.tensor([2]))
    with torch.no_grad():
        rollout = Decoder(model, vocabulary).generate(
            prefill(model, PromptBatch.of(prompts, model.config, "cpu")), Sampling(1, 8, 0.0, 1.0), seed=0, groups=range(3)
        )
    use_attention(model, "sdpa")
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
        expected, delta = model.model.get_rope_index(prompt.ids[None], mm_token_type_ids=is_image, image_grid_thw=prompt.grids)
        assert torch.equal(prompt.position, expected[:, 0])
        assert int(prompt.position[0, -1]) + 1 == len(prompt.ids) + int(delta)
