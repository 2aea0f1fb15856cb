"""The 8-bit codes of AdamW's moments, and its random bits, by their definitions; what torchao keeps."""

from __future__ import annotations

import math

import pytest
import torch
from locus_kernels.adamw8bit import adamw8bit_, dequantize, from_dynamic_codes, new_state
from locus_kernels.adamw8bit.reference import key, quantize, random_bits, round_to_bfloat16, second_draw

SHAPE = (16, 256)


# ------------------------------------------------------------------------------------------------------ codes
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_codes_by_their_definition(spread: float) -> None:
    """What is kept of a block lies within a code of what was given; zeros are zeros; nothing else becomes
    zero."""
    rng = torch.Generator().manual_seed(1)
    root = torch.randn(8, 256, generator=rng).mul(spread).exp()
    root[:, 7] = 0
    exp_avg = root * (torch.rand(8, 256, generator=rng) * 2 - 1)
    draw = torch.rand(8, 256, generator=rng)
    (parts, scale), (codes, low, high) = quantize(exp_avg, root, (torch.full_like(draw, 0.5), draw))
    state = {"exp_avg_codes": parts, "exp_avg_scale": scale, "exp_avg_sq_codes": codes}
    kept, square = dequantize(state | {"exp_avg_sq_low": low, "exp_avg_sq_high": high})
    positive = root > 0
    raised = root.maximum(1e-8 * root.amax(1, keepdim=True))
    span = (root.amax(1) / raised.masked_fill(~positive, math.inf).amin(1)).log()
    apart = (square.sqrt() / raised)[positive].log().abs()
    assert (apart <= (span / 254 * 1.001 + 1e-6)[:, None].expand(8, 256)[positive]).all()
    assert (square == 0).equal(~positive)
    assert ((kept - exp_avg).abs() <= scale[:, None] / 254 * 1.01 * square.sqrt()).all()


def test_second_moments_are_rounded_right_on_average() -> None:
    """20,000 roundings of 254 values between the ends of a block: the mean's error is within 4 standard
    errors."""
    root = torch.cat([torch.tensor([1e-3, 1.0]), torch.logspace(-2.9, -0.1, 254)]).expand(20_000, 256)
    draw = torch.rand(root.shape, generator=torch.Generator().manual_seed(2))
    _, (codes, low, high) = quantize(root, root, (draw, draw))
    zeros = torch.zeros(root.shape, dtype=torch.int8)
    state = {"exp_avg_codes": zeros, "exp_avg_scale": low, "exp_avg_sq_codes": codes}
    kept = dequantize(state | {"exp_avg_sq_low": low, "exp_avg_sq_high": high})[1].sqrt().double()
    error, deviation = kept.mean(0) / root[0].double() - 1, kept.std(0) / root[0].double()
    assert (error.abs() <= 4 * deviation / math.sqrt(20_000) + 1e-5).all()


def test_first_moments_are_rounded_right_on_average() -> None:
    """20,000 roundings of 256 shares of the largest quotient: each to one of its two codes, the mean's error
    within 5 standard errors; the largest is never past its code."""
    root = torch.ones(20_000, 256)
    share = torch.linspace(-1, 1, 256).expand(20_000, 256)
    draw = torch.rand(root.shape, generator=torch.Generator().manual_seed(3))
    (parts, _), _ = quantize(share * 0.3, root, (draw, draw))
    code = share[0].double() * 127
    assert ((parts.double() - code).abs() < 1 + 1e-4).all()
    assert ((parts.double().mean(0) - code).abs() <= 5 * 0.5 / math.sqrt(20_000)).all()
    (parts, _), _ = quantize(share * 0.3, root, (torch.full_like(draw, 65535 / 65536), draw))
    assert parts[:, -1].eq(127).all()
    assert parts[:, 0].eq(-127).all()


def test_a_root_far_below_its_blocks_largest_is_raised_and_never_0() -> None:
    root = torch.ones(1, 256)
    root[0, :3] = torch.tensor([1e-30, 1e-12, 0.0])
    _, (codes, low, _) = quantize(root, root, (torch.zeros(1, 256),) * 2)
    assert codes[0, :4].tolist() == [1, 1, 0, 255]
    assert low.item() == pytest.approx(1e-8)


def test_states_of_dynamic_codes_are_read() -> None:
    """Against what torchao, whose form it is, reads from them."""
    peer = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    rng = torch.Generator().manual_seed(3)
    first = torch.randn(16, 512, generator=rng)
    states = [peer.zeros((16, 512), signed) for signed in (True, False)]
    for state, value in zip(states, (first, first.square()), strict=True):
        state.copy_(value)
    ours = from_dynamic_codes(*((state.codes, state.scale) for state in states))
    exp_avg, exp_avg_sq = dequantize(ours)
    theirs, square = (state.dequantize() for state in states)
    lost = (square == 0) & (theirs != 0)  # rounded to 0 there: between 0 and the smallest code
    torch.testing.assert_close(exp_avg_sq[~lost], square[~lost], rtol=0.08, atol=1e-12)
    assert (exp_avg_sq[lost] > 0).all()
    assert (
        exp_avg_sq[lost]
        <= (square.view(-1, 256).amax(1, keepdim=True) * 1e-6).expand(-1, 256)[lost.view(-1, 256)]
    ).all()
    tolerance = ours["exp_avg_scale"].max() / 250 * exp_avg_sq.sqrt()
    assert ((exp_avg - theirs).abs() <= tolerance).all()


def test_the_step_is_torchaos_where_that_is_right() -> None:
    """Gradients of one size and one sign a block, which dynamic codes hold exactly: the same weights after 20
    steps."""
    peer = pytest.importorskip("torchao.optim").AdamW8bit
    ours = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = peer([theirs], lr=torch.tensor(1e-2), weight_decay=0.1)
    state, one = new_state(ours), torch.ones(())
    for step in range(20):
        gradient = torch.full(SHAPE, 0.5 + 0.1 * step)
        rate = torch.tensor(1e-2)
        adamw8bit_(
            [ours], [gradient], [state], lr=[rate], gradient_scale=one, weight_decay=0.1, seed=0, streams=[0]
        )
        theirs.grad = gradient
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------------ random bits
def test_random_bits_are_uniform_and_tell_everything_apart() -> None:
    streams = [
        random_bits(key(seed, number), 0, 2**16, torch.device("cpu"))
        for seed in (0, 1)
        for number in (0, 1, 2)
    ]
    for bits in streams:
        assert ((bits >= 0) & (bits < 2**32)).all()
        for shift in range(0, 32, 8):
            counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
            # 99.999% of uniform ones, 255 degrees of freedom
            assert ((counts - 256).square() / 256).sum() < 360
        share = bits.double() / 2**32 - 0.5
        for lag in (1, 2, 255, 256):
            assert abs((share[lag:] * share[:-lag]).mean().item() * 12) < 0.02
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert (one == other).sum() < 3
            assert abs(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]) < 0.02
    later = random_bits(key(0, 0), 1000, 24, torch.device("cpu"))
    assert torch.equal(later, streams[0][1000:1024])


def test_the_three_draws_of_an_element_are_uniform_and_unrelated() -> None:
    """Those of the weight, of the second moment and of the first: 16 x 16 cells of each pair."""
    bits = random_bits(key(3, 4), 0, 2**18, torch.device("cpu"))
    draws = bits & 0xFFFF, bits >> 16, second_draw(bits)
    for i, one in enumerate(draws):
        assert ((one >= 0) & (one < 2**16)).all()
        for other in draws[:i]:
            counts = torch.bincount((one >> 12) * 16 + (other >> 12), minlength=256).double()
            # 99.999% of uniform ones, 255 degrees of freedom
            assert ((counts - 1024).square() / 1024).sum() < 360
            assert abs(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]) < 0.01


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_bfloat16_rounding_keeps_what_is_not_a_number(pattern: int) -> None:
    """Whatever its pattern: a GPU's own is 0x7fffffff."""
    value = torch.full((2**16,), pattern, dtype=torch.int32).view(torch.float32)
    assert round_to_bfloat16(value, torch.arange(2**16)).isnan().all()
    endless = torch.tensor([math.inf, -math.inf]).repeat_interleave(2**16)
    assert torch.equal(round_to_bfloat16(endless, torch.arange(2**16).repeat(2)).float(), endless)


@pytest.mark.parametrize("sign", [1, -1])
def test_bfloat16_rounding_is_right_on_average(sign: int) -> None:
    """0.02 + a third of the distance to its neighbour is rounded up a third of the time, in magnitude."""
    low, high = torch.tensor([0.02]).bfloat16().float(), torch.tensor([0.02]).bfloat16().float() + 2.0**-13
    assert high.bfloat16().float() == high
    value = sign * (low + (high - low) / 3).expand(2**16)
    rounded = round_to_bfloat16(value, torch.arange(2**16)).float()
    assert set(rounded.tolist()) == {(sign * low).item(), (sign * high).item()}
    assert (rounded == sign * high).double().mean().item() == pytest.approx(1 / 3, abs=1e-4)
    exact = (sign * low).expand(2**16)
    assert torch.equal(round_to_bfloat16(exact, torch.arange(2**16)).float(), exact)


def test_a_parameters_bits_do_not_depend_on_what_is_stepped_beside_it() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    gradient, one = torch.randn_like(weight), torch.ones(())
    ends = []
    for beside in (0, 2):
        parameters = [weight.clone() for _ in range(beside + 1)]
        states, streams = [new_state(p) for p in parameters], [*range(10, 10 + beside), 3]
        gradients, rates = [gradient] * len(parameters), [torch.tensor(1e-3)] * len(parameters)
        adamw8bit_(parameters, gradients, states, lr=rates, gradient_scale=one, seed=7, streams=streams)
        ends.append(parameters[-1])
        assert beside == 0 or not torch.equal(parameters[0], parameters[1])
    assert torch.equal(*ends)
