"""Each operator once, with torch and triton alone; test_install.py runs it far from this repository."""

import torch
from locus_kernels.box_reward import box_reward, build_token_table
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob import linear_logprob
from locus_kernels.patchify import patchify_images
from locus_kernels.sample import sample


class Characters:
    """The least tokenizer: id n is the character n."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))

    def decode_batch(self, batch, skip_special_tokens):
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def get_vocab(self):
        return {chr(n): n for n in range(128)}

    backend_tokenizer = property(lambda self: self)


texts = [b"[1,2,30,40]", b"[1,2,30,44]", b"I see none", b"[1,2,30,  "]
ids, lengths = torch.stack([torch.tensor(list(t.ljust(12))) for t in texts]), torch.full((4,), 12)
target = torch.tensor([[1.0, 2.0, 30.0, 44.0]]).repeat(4, 1)
earned = box_reward(
    ids, lengths, build_token_table(Characters(), 128), target, 2, which="first", grammar="direct"
)
assert earned.valid.tolist() == [True, True, False, False]
assert earned.reward[1] == 1

hidden, weight = torch.randn(4, 16, requires_grad=True), torch.randn(128, 16, requires_grad=True)
logprob, entropy = linear_logprob(hidden, weight, ids[:, 0])
loss, again, metrics = grpo_loss(
    hidden, weight, ids[:, 0], earned.advantage, clip_low=0.2, clip_high=0.2, kl_coefficient=0.0
)
loss.backward()
assert torch.equal(again, logprob)
token, _ = sample((hidden @ weight.T).detach(), seed=0, row=torch.arange(4), position=0, top_p=0.9)
assert token.shape == (4,)
patches, grid = patchify_images(
    [torch.zeros(30, 40, 3, dtype=torch.uint8)],
    [(28, 56)],
    patch=14,
    frames=2,
    merge=2,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)
assert patches.shape == (int(grid.prod()), 1176)
print("all operators ran")
