"""The kernels in a loop that is not ours: a reward function as TRL's `GRPOTrainer` calls it, and a loss from
hidden states to the mean over tokens. Nothing of `locus_fast` is used but its small model."""

import torch
from locus_kernels.box_reward import box_reward, build_token_table, group_advantage
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob import linear_logprob
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoTokenizer

from locus_fast.weights.checkpoint import TINY_BASE

TARGET = [10.0, 10.0, 50.0, 50.0]
REPLIES = ["[10, 10, 50, 50]", "[10, 10, 30, 50]", "[60, 60, 90, 90]", "no box"]
BOUNDS = {"clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": 0.0}

tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
model = AutoModelForImageTextToText.from_pretrained(TINY_BASE)
table = build_token_table(tokenizer, vocab_size=model.lm_head.weight.shape[0])


def box_iou(prompts, completions, completion_ids, target, **kwargs) -> list[float]:
    """The IoU of each completion's first box with its target, a column of the data set."""
    ids = pad_sequence([torch.tensor(row) for row in completion_ids], batch_first=True)
    lengths = torch.tensor([len(row) for row in completion_ids])
    options = {"group_size": 1, "which": "first", "grammar": "direct", "format_weight": 0.0}
    return box_reward(ids, lengths, table, torch.tensor(target), **options).reward.tolist()


def hidden_of(ids: Tensor, prompt_length: int) -> Tensor:
    """The states [rows * L, D] that predict the completions in ids, int64 [rows, prompt_length + L]."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, prompt_length - 1 : -1].flatten(0, 1)


def main() -> None:
    prompt, completion_ids = tokenizer.encode("Where is it?"), [tokenizer.encode(text) for text in REPLIES]
    rewards = box_iou([], REPLIES, completion_ids, target=[TARGET] * len(REPLIES))
    print("rewards", *(f"{reward:.4f}" for reward in rewards))
    advantage, _ = group_advantage(torch.tensor(rewards), group_size=len(REPLIES))
    padded = pad_sequence([torch.tensor(row) for row in completion_ids], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in completion_ids])
    whole = torch.cat([torch.tensor(prompt).expand(len(REPLIES), -1), padded], 1)
    head, tokens = model.lm_head.weight, padded.flatten()
    old, _ = linear_logprob(hidden_of(whole, len(prompt)).detach(), head.detach(), tokens)
    vectors = (advantage.repeat_interleave(padded.shape[1]), old, None, mask.flatten().float())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss, logprob, _ = grpo_loss(hidden_of(whole, len(prompt)), head, tokens, *vectors, **BOUNDS)
        (loss / mask.sum()).backward()
        optimizer.step()
        best = (logprob.view(padded.shape) * mask).sum(1)[0].item()
        print(f"loss {loss.item() / mask.sum().item():.4f}, log-prob of the best reply {best:.4f}")


if __name__ == "__main__":
    main()
