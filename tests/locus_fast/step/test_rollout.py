"""The decoder: compaction, fixed buffers, when a reply ends, and how often the host may ask."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.box_reward import build_token_table, closing_table

from locus_fast.config import parse
from locus_fast.errors import UserError
from locus_fast.model.packing import PromptBatch, best_fit, pack
from locus_fast.model.policy import next_logits, prefill
from locus_fast.run.setup import set_up
from locus_fast.step import rollout
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from tests.small_models import IMAGE, VOCABULARY, small_model, small_prompt

# many stop tokens, so that replies end at different times
WORDS = Vocabulary(torch.arange(VOCABULARY) < IMAGE, torch.arange(2, 40))
SAMPLING = Sampling(group_size=7, max_new_tokens=12, temperature=0.8, top_p=0.95)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def prefix(request):
    model = small_model(request.param)
    prompts = [
        small_prompt(model, grids, words=5, seed=seed)
        for seed, grids in enumerate([[(8, 12), (4, 4)], [], [(4, 8)]])
    ]
    with torch.no_grad():
        return model, prefill(model, PromptBatch.of(prompts, model.config, "cpu"))


def played(prefix, **choices) -> tuple[Decoder, rollout.Rollout]:
    model, kept = prefix
    decoder = Decoder(model, WORDS, **choices)
    return decoder, decoder.generate(kept, SAMPLING, seed=4, groups=[3, 0, 9])


def same(a: rollout.Rollout, b: rollout.Rollout) -> None:
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.lengths, b.lengths)
    torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-5)


def test_finished_rows_are_moved_out_and_nothing_changes(prefix, monkeypatch) -> None:
    decoder, compacted = played(prefix)
    assert decoder.slots is not None
    assert decoder.slots.rows < 21
    assert len(set(compacted.lengths.tolist())) > 3
    monkeypatch.setattr(rollout, "rung", lambda rows: 21)
    decoder, whole = played(prefix)
    assert decoder.slots is not None
    assert decoder.slots.rows == 21
    same(compacted, whole)


def test_fixed_buffers_that_are_used_again(prefix, monkeypatch) -> None:
    """What a CUDA graph sees: buffers larger than needed, left as the last microbatch left them, and no
    number from the host."""
    monkeypatch.setattr(rollout, "Graph", lambda function, other: function)
    _, expected = played(prefix)
    decoder, first = played(prefix, static=True)
    same(expected, first)
    assert decoder.slots is not None
    before = decoder.slots.ids.data_ptr(), decoder.prompt_kv[0][0].data_ptr()
    for keys, values in decoder.slots.own.values():
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    again = decoder.generate(prefix[1], SAMPLING, seed=4, groups=[3, 0, 9])
    same(expected, again)
    assert (decoder.slots.ids.data_ptr(), decoder.prompt_kv[0][0].data_ptr()) == before


def test_a_late_count_ends_the_rollout_all_the_same(prefix, monkeypatch) -> None:
    """The host hears of finished rows some steps later: it compacts and stops later, and the replies are the
    same."""

    _, expected = played(prefix)
    count = rollout.Count
    monkeypatch.setattr(rollout, "Count", lambda lag, on_cuda: count(rollout.LAG, on_cuda))
    decoder, late = played(prefix)
    same(expected, late)
    assert decoder.slots is not None
    assert decoder.slots.rows < 21


def test_replies_end_with_their_box() -> None:
    """Nothing is sampled after the box that counts; the reader finds it in what was sampled."""
    setup = set_up(parse(["--max-new-tokens", "16", "--eval-cues", "1"]))
    batch = PromptBatch.of(
        [setup.inputs.prompter(setup.inputs.cues.train(i)) for i in range(4)],
        setup.engine.model.config,
        "cpu",
    )
    with torch.no_grad():
        out = setup.engine.decoder.generate(
            prefill(setup.engine.model, batch), Sampling(8, 16, 1.0, 1.0), seed=0, groups=range(4)
        )
    closing = closing_table(
        build_token_table(setup.origin.source.tokenizer, setup.engine.model.lm_head.weight.shape[0]), "first"
    )
    texts = [
        setup.origin.source.tokenizer.decode(row[:n])
        for row, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True)
    ]
    boxes = [text for text in texts if "]" in text]
    assert len(boxes) > 24
    assert all(text.endswith("]") for text in boxes)
    assert int(closing[0, 0]) == 0


def test_a_forced_prefix_is_given_and_read(tmp_path) -> None:
    """`[` stands in the prompt: it is not sampled, the reply starts with the first number, and the box is
    read whole."""
    setup = set_up(parse(["--answer-prefix", "[", "--max-new-tokens", "16", "--eval-cues", "1"]))
    plain = set_up(parse(["--eval-cues", "1"]))
    prompt, without = (s.inputs.prompter(s.inputs.cues.train(0)) for s in (setup, plain))
    assert setup.origin.source.tokenizer.decode(setup.inputs.prompter.opening) == "["
    assert prompt.ids.tolist() == without.ids.tolist() + setup.inputs.prompter.opening
    assert prompt.position[:, -1].tolist() == (without.position[:, -1] + 1).tolist()
    with torch.no_grad():
        prefix = prefill(setup.engine.model, PromptBatch.of([prompt], setup.engine.model.config, "cpu"))
        out = setup.engine.decoder.generate(prefix, Sampling(1, 16, 0.0, 1.0), seed=0, groups=[0])
        plain_prefix = prefill(
            plain.engine.model, PromptBatch.of([without], plain.engine.model.config, "cpu")
        )
        expected = plain.engine.decoder.generate(plain_prefix, Sampling(1, 16, 0.0, 1.0), seed=0, groups=[0])
    ids, lengths = setup.scoring._whole(out.ids, out.lengths)
    assert ids[0, : lengths[0]].tolist() == expected.ids[0, : expected.lengths[0]].tolist()


def test_best_fit() -> None:
    assert best_fit([5, 4, 3, 2, 2], 8) == [[0, 2], [1, 3, 4]]
    assert best_fit([], 8) == []
    assert best_fit([8, 8], 8) == [[0], [1]]
    rng = torch.Generator().manual_seed(0)
    costs = torch.randint(1, 50, (200,), generator=rng).tolist()
    bins = best_fit(costs, 100)
    assert sorted(item for items in bins for item in items) == list(range(200))
    assert all(sum(costs[item] for item in items) <= 100 for items in bins)
    assert sum(costs) / (100 * len(bins)) > 0.95  # the fill
    assert bins == best_fit(costs, 100)


def test_packing_weighs_images_and_names_what_does_not_fit() -> None:
    setup = set_up(parse(["--eval-cues", "1"]))
    prompts = [setup.inputs.prompter(setup.inputs.cues.train(i)) for i in range(6)]
    costs = [setup.engine.cost(prompt, 8 * setup.config.max_new_tokens) for prompt in prompts]
    assert all(cost > len(prompt.ids) + 8 * 16 for cost, prompt in zip(costs, prompts, strict=True))
    assert len(pack(prompts, costs, 2 * max(costs))) == 3
    with pytest.raises(
        UserError, match=r"scene 0: its prompt of .* more than a microbatch of 100; raise --microbatch-tokens"
    ):
        pack(prompts, costs, 100)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_logits_of_a_bfloat16_model_stay_in_float32(family: str) -> None:
    """From the head's product to the draw: the sampler's log-probs are those of float64 arithmetic on the
    very states that it sampled from. Logits rounded to bfloat16 would be off by 0.01 and more."""
    model = small_model(family).bfloat16()
    states: list[torch.Tensor] = []
    with torch.no_grad():
        prefix = prefill(
            model, PromptBatch.of([small_prompt(model, [(4, 8)], words=5, seed=0)], model.config, "cpu")
        )
        states.append(prefix.last_hidden.expand(7, -1))
        hook = model.model.language_model.register_forward_hook(
            lambda *call: states.append(call[-1].last_hidden_state[:, 0])
        )
        sampling = Sampling(group_size=7, max_new_tokens=6, temperature=0.8, top_p=0.95)
        played = Decoder(model, Vocabulary(torch.arange(VOCABULARY) < IMAGE, torch.tensor([2]))).generate(
            prefix, sampling, seed=4, groups=[3]
        )
        hook.remove()
    assert played.lengths.tolist() == [6] * 7  # no row was moved
    head = model.lm_head.weight.double()
    for at, hidden in enumerate(states):
        truth = (hidden.double() @ head.T / 0.8).log_softmax(-1).gather(-1, played.ids[:, at, None])[:, 0]
        assert hidden.dtype == torch.bfloat16
        torch.testing.assert_close(played.logprob[:, at].double(), truth, rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_on_cuda_are_the_products_sums() -> None:
    model = small_model("qwen2_5_vl").bfloat16().to("cuda")
    hidden = torch.randn(5, 64, device="cuda").bfloat16()
    logits = next_logits(model, hidden)
    assert logits.dtype == torch.float32
    truth = hidden.double() @ model.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-4)
