"""The fused GRPO loss gives the loss and the gradients of Liger's fused loss and of TRL's `GRPOTrainer` on
equal inputs.

Each peer's test is skipped by its name where that library is not installed.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch
from locus_kernels.grpo_loss import grpo_loss
from torch import Tensor, nn

from tests.kernels.grpo_loss.cases import case
from tests.kernels.readme import examples

ROWS, L, D, V = 3, 7, 24, 131
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def inputs() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """([hidden [ROWS * L, D], weight, ids], advantages [ROWS], [old, reference] [ROWS * L]): ratios on both
    sides of both bounds."""
    head, vectors = case(ROWS * L, D, V)
    return (
        [t.contiguous() for t in head],
        torch.tensor([1.3, -0.4, 0.6]),
        [t for t in vectors[1:3] if t is not None],
    )


def by_us(
    head, advantages, old, reference, mask, beta: float
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """(mean loss over the tokens of the mask [ROWS, L], metrics, gradients of hidden and weight)."""
    numbers = {"clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": beta, "temperature": 0.9}
    leaves = [t.clone().requires_grad_() for t in head[:2]]
    total, _, metrics = grpo_loss(
        *leaves, head[2], advantages.repeat_interleave(L), old, reference, mask.flatten(), **numbers
    )
    loss = total / mask.sum()
    loss.backward()
    return loss, metrics, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_equals_liger(beta: float) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    head, advantages, (old, reference) = inputs()
    leaves = [t.clone().requires_grad_() for t in head[:2]]
    liger = chunked.LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=True,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type="bnpo",
        temperature=0.9,
    )
    mask = torch.ones(ROWS, L)
    mask[1, 4:] = 0
    loss, _ = liger(
        leaves[0].view(ROWS, L, D), leaves[1], head[2].view(ROWS, L), mask, advantages,
        ref_per_token_logps=reference.view(ROWS, L), old_per_token_logps=old.view(ROWS, L),
    )  # fmt: skip
    loss.backward()
    ours, _, gradients = by_us(head, advantages, old, reference, mask, beta)
    torch.testing.assert_close(ours, loss, **CLOSE)
    torch.testing.assert_close(gradients, [leaf.grad for leaf in leaves], **CLOSE)


class OnlyHead(nn.Module):
    """What TRL needs of a causal language model: a backbone (here hidden states [ROWS, 1 + L, D] as they
    are), a head and a config."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden)
        self.lm_head = nn.Linear(*weight.T.shape, bias=False)
        self.lm_head.weight.data.copy_(weight)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="only_head"))

    def base_model(self, **_):
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize(
    ("on_policy", "lengths"), [(False, [7, 4, 1]), (True, [7, 4, 1]), (False, [7, 7, 7])]
)
def test_equals_trl(beta: float, on_policy: bool, lengths: list[int]) -> None:
    """All of TRL's arithmetic from hidden states to the loss: its chunked log-prob head, and
    `GRPOTrainer._compute_loss` with the token mean.

    What stands in is the trainer around it: the attributes that the method reads, for one process and no
    accumulation.
    """
    trl = pytest.importorskip("trl", minversion="1.16")
    head, advantages, (old, reference) = inputs()
    model = OnlyHead(torch.cat([head[0].view(ROWS, L, D), torch.zeros(ROWS, 1, D)], 1), head[1])
    trl.trainer.utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    accelerator = SimpleNamespace(
        gather=lambda t: t,
        reduce=lambda t, reduction: t,
        num_processes=1,
        is_main_process=True,
        autocast=contextlib.nullcontext,
    )
    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, temperature=0.9,
        beta=beta, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo", importance_sampling_level="token",
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = MethodType(
        trl.GRPOTrainer._get_per_token_logps_and_entropies, trainer
    )
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    before = torch.ones(ROWS, 1, dtype=torch.int64)  # a prompt of one token
    batch = {
        "prompt_ids": before, "prompt_mask": before,
        "completion_ids": head[2].view(ROWS, L), "completion_mask": mask.long(), "advantages": advantages,
        "old_per_token_logps": None if on_policy else old.view(ROWS, L),
        "ref_per_token_logps": reference.view(ROWS, L),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(trainer, model, batch)
    loss.backward()
    names: dict = {"torch": torch, "grpo_loss": grpo_loss}
    exec(next(code for code in examples() if "import GRPOTrainer" in code), names)  # the README's subclass
    torch.testing.assert_close(names["FusedGRPOTrainer"]._compute_loss(trainer, model, batch), loss, **CLOSE)
    ours, metrics, gradients = by_us(
        head, advantages, None if on_policy else old, reference if beta else None, mask.float(), beta
    )
    torch.testing.assert_close(ours, loss, **CLOSE)
    assert model.hidden.grad is not None
    torch.testing.assert_close(
        gradients, [model.hidden.grad[:, :L].reshape(-1, D), model.lm_head.weight.grad], **CLOSE
    )
    if mask.all():  # TRL's metrics leave out tokens without weight, ours do not
        names = {
            "clip_low": "clip_ratio/low_mean",
            "clip_high": "clip_ratio/high_mean",
            "entropy": "entropy",
        } | ({"kl": "kl"} if beta else {})
        for name, theirs in names.items():
            assert float(metrics[name]) / mask.sum() == pytest.approx(
                trainer._metrics["train"][theirs][0], rel=1e-5
            )
        assert metrics["clip_low"] > 0
        assert metrics["clip_high"] > 0
