"The contrastive losses and the masked loss: against written-out loops, and where numbers are extreme."
import math

import pytest
import torch
import torch.nn.functional as F

from fuselip_edu.contrastive import sigmoid_loss, softmax_loss
from fuselip_edu.masking import mask_tokens, masked_loss
from fuselip_edu.vocab import Vocab


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1).to(dtype)


def value_and_gradients(loss, *inputs, **options):
    leaves = [torch.as_tensor(x).clone().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    return value.detach(), torch.autograd.grad(value, leaves)


# ---- written-out loops

def softmax_loop(left, right, scale):
    b, total = len(left), 0.0
    for i in range(b):
        row = [torch.exp(scale * left[i] @ right[j]) for j in range(b)]
        column = [torch.exp(scale * left[j] @ right[i]) for j in range(b)]
        total = total - torch.log(row[i] / sum(row)) - torch.log(column[i] / sum(column))
    return total / (2 * b)


def sigmoid_loop(left, right, scale, bias):
    total = 0.0
    for i in range(len(left)):
        for j in range(len(left)):
            yes = 1 / (1 + torch.exp(-(scale * left[i] @ right[j] + bias)))
            total = total - torch.log(yes if i == j else 1 - yes)
    return total / len(left)


@pytest.mark.parametrize("b, scale, bias", [(1, 10.0, -10.0), (2, 1.0, 0.0), (7, 10.0, -10.0), (7, 15.0, -4.0)])
@pytest.mark.parametrize("loss, loop", [(softmax_loss, softmax_loop), (sigmoid_loss, sigmoid_loop)])
def test_equal_to_the_loop_in_float64(loss, loop, b, scale, bias):
    scalars = [torch.tensor(x, dtype=torch.float64) for x in ((scale,) if loss is softmax_loss else (scale, bias))]
    inputs = (unit(b, 5), unit(b, 5, seed=1), *scalars)
    value, gradients = value_and_gradients(loss, *inputs)
    expected, expected_gradients = value_and_gradients(loop, *inputs)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-10)


def test_the_order_of_the_pairs_and_of_the_sides_does_not_matter():
    left, right, order = unit(9, 6), unit(9, 6, seed=1), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    for loss, scalars in ((softmax_loss, (12.0,)), (sigmoid_loss, (12.0, -7.0))):
        value = loss(left, right, *scalars)
        torch.testing.assert_close(loss(left[order], right[order], *scalars), value)
        torch.testing.assert_close(loss(right, left, *scalars), value)
        assert not torch.isclose(loss(left, right[order], *scalars), value)


# ---- chunks

@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, 99])
def test_chunks_change_neither_value_nor_gradient(chunk):
    inputs = (unit(13, 6), unit(13, 6, seed=1), torch.tensor(10.0).double(), torch.tensor(-10.0).double())
    whole, parts = value_and_gradients(sigmoid_loss, *inputs), value_and_gradients(sigmoid_loss, *inputs, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_of_no_rows_is_refused(chunk):
    with pytest.raises(ValueError, match="chunk must be at least 1"): sigmoid_loss(unit(4, 3), unit(4, 3), 10.0, -10.0, chunk)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_sides_that_are_not_pairs_are_refused(shapes):
    left, right = map(torch.ones, shapes)
    with pytest.raises(ValueError, match=r"both be \(b, d\)"): sigmoid_loss(left, right, 10.0, -10.0)
    with pytest.raises(ValueError, match=r"both be \(b, d\)"): softmax_loss(left, right, 10.0)


# ---- twins: combinations that are no negatives

def twins_of(*pairs, b=7):
    same = torch.zeros(b, b, dtype=torch.bool)
    for i, j in pairs: same[i, j] = same[j, i] = True
    return same


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_twins_are_left_out_of_the_sigmoid_loss(chunk):
    left, right, same = unit(7, 5), unit(7, 5, seed=1), twins_of((0, 4), (2, 3))
    value, gradients = value_and_gradients(sigmoid_loss, left, right, 10.0, -3.0, chunk=chunk, same=same)
    logits = 10.0 * left @ right.T - 3.0
    expected = sum(-F.logsigmoid(logits[i, j] if i == j else -logits[i, j]) for i in range(7) for j in range(7) if not same[i, j]) / 7
    torch.testing.assert_close(value, expected)
    push = 10.0 / 7 * (logits.sigmoid() - torch.eye(7)).masked_fill(same, 0.0)
    torch.testing.assert_close(gradients[0], push @ right)


def test_twins_are_left_out_of_the_softmax_loss():
    left, right, same = unit(7, 5), unit(7, 5, seed=1), twins_of((0, 4), (2, 3))
    value, gradients = value_and_gradients(softmax_loss, left, right, 10.0, same=same)
    logits, total = 10.0 * left @ right.T, 0.0
    for i in range(7):
        others = [j for j in range(7) if not same[i, j]]
        total += logits[i, others].logsumexp(0) + logits[others, i].logsumexp(0) - 2 * logits[i, i]
    torch.testing.assert_close(value, total / 14)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_twins_change_nothing():
    left, right = unit(7, 5), unit(7, 5, seed=1)
    assert sigmoid_loss(left, right, 10.0, -3.0, same=twins_of()) == sigmoid_loss(left, right, 10.0, -3.0)
    assert softmax_loss(left, right, 10.0, twins_of()) == softmax_loss(left, right, 10.0)


# ---- half precision and extreme numbers

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [100.0, 1e6])
@pytest.mark.parametrize("chunk", [None, 5])
def test_finite_and_as_exact_as_fp32(dtype, scale, chunk):
    left, right = unit(16, 8, dtype=dtype), unit(16, 8, seed=1, dtype=dtype)
    for value, exact in ((softmax_loss(left, right, scale), softmax_loss(left.double(), right.double(), scale)),
                         (sigmoid_loss(left, right, scale, -50.0, chunk), sigmoid_loss(left.double(), right.double(), scale, -50.0))):
        assert value.dtype == torch.float32 and value.isfinite()
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("chunk", [None, 5])
def test_gradients_of_half_vectors(dtype, tolerance, chunk):
    left, right = unit(16, 8, dtype=dtype), unit(16, 8, seed=1, dtype=dtype)
    _, gradients = value_and_gradients(sigmoid_loss, left, right, 100.0, -50.0, chunk=chunk)
    _, exact = value_and_gradients(sigmoid_loss, left.double(), right.double(), 100.0, -50.0)
    for side in (0, 1):
        assert gradients[side].dtype == dtype
        torch.testing.assert_close(gradients[side].double(), exact[side], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [None, 5])
def test_autocast_does_not_lower_the_logits(chunk):
    def autocast_loss(*inputs):
        with torch.autocast("cpu", torch.bfloat16): return sigmoid_loss(*inputs, chunk=chunk) + softmax_loss(*inputs[:3])

    inputs = unit(16, 8, dtype=torch.float32), unit(16, 8, seed=1, dtype=torch.float32), torch.tensor(100.0), torch.tensor(-50.0)
    expected = value_and_gradients(lambda *inputs: sigmoid_loss(*inputs) + softmax_loss(*inputs[:3]), *inputs)
    torch.testing.assert_close(value_and_gradients(autocast_loss, *inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_perfect_batch_costs_nothing_and_a_reversed_one_costs_its_logits():
    left = torch.eye(4)
    assert sigmoid_loss(left, left, 100.0, -50.0) < 1e-12 and softmax_loss(left, left, 100.0) < 1e-12
    torch.testing.assert_close(softmax_loss(left, left.flip(0), 100.0), torch.tensor(100.0))
    torch.testing.assert_close(sigmoid_loss(left, left.flip(0), 100.0, -50.0), torch.tensor(100.0))  # a no at 50 and a yes at -50 in each row


# ---- masking

VOCAB = Vocab(n_text=40, sot=38, eot=39, n_codes=24, context=32)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 32, (400,), generator=generator)
    ids = torch.randint(0, VOCAB.size, (400, 31), generator=generator)  # 0, the padding's id, is a word among others
    ids[torch.arange(31) >= lengths[:, None]] = VOCAB.pad
    ids[ids == VOCAB.eot] = 1
    ids[torch.arange(400), lengths - 1] = VOCAB.eot
    return ids, lengths


def test_mask_tokens_never_hides_what_it_must_not():
    ids, lengths = batch()
    masked, labels = mask_tokens(ids, lengths, VOCAB, probability=1.0)
    inside, exempt = torch.arange(31) < lengths[:, None], (ids == VOCAB.eot) | (ids == VOCAB.mask)
    assert (ids == VOCAB.mask).any() and ((ids == VOCAB.pad) & inside).any() and ((ids == VOCAB.first_code) & inside).any()
    assert torch.equal(labels >= 0, inside & ~exempt)  # so a word with the padding's id, and image code 0, can be hidden
    assert torch.equal(masked[~inside | exempt], ids[~inside | exempt]) and (masked[inside & ~exempt] == VOCAB.mask).all()


def test_masked_ids_and_labels_hold_the_sequence():
    ids, lengths = batch()
    masked, labels = mask_tokens(ids, lengths, VOCAB, 0.3, torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.where(labels == -100, masked, labels), ids)
    assert torch.equal(labels != -100, (masked == VOCAB.mask) & (ids != VOCAB.mask))
    assert torch.equal(ids, batch()[0])  # its input is left alone


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_share_of_hidden_tokens_is_the_probability(probability):
    ids, lengths = batch()
    maskable = (mask_tokens(ids, lengths, VOCAB, 1.0)[1] >= 0).sum().item()
    hidden = (mask_tokens(ids, lengths, VOCAB, probability, torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)))[1] >= 0).sum().item()
    assert abs(hidden / maskable - probability) < 4 * math.sqrt(probability * (1 - probability) / maskable)


def test_masks_are_a_function_of_the_generator():
    ids, lengths = batch()
    draw = lambda seed: mask_tokens(ids, lengths, VOCAB, 0.1, torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)))[0]
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert torch.equal(mask_tokens(ids, lengths, VOCAB, 0.0)[0], ids)


@pytest.mark.parametrize("probability", [-0.1, 1.5, 10, math.nan])
def test_a_probability_outside_0_to_1_is_refused(probability):
    with pytest.raises(ValueError, match="between 0 and 1"): mask_tokens(*batch(), VOCAB, probability)


def test_nothing_hidden_costs_nothing_and_pulls_nothing():
    hidden, table = torch.zeros(0, 6, requires_grad=True), torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = masked_loss(hidden @ table.T, torch.zeros(0, dtype=torch.int64))
    gradients = torch.autograd.grad(loss, [hidden, table])
    assert loss == 0 and gradients[0].shape == (0, 6) and torch.equal(gradients[1], torch.zeros(10, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_loss_is_the_mean_in_fp32(dtype):
    logits = (300 * torch.randn(50, 2000, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(50)
    loop = sum(-row.double().log_softmax(0)[target] for row, target in zip(logits, targets)) / 50
    loss = masked_loss(logits, targets)
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss.double(), loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [softmax_loss, lambda *sides, **more: sigmoid_loss(*sides, -10.0, **more)])
def test_no_pairs_and_twins_of_another_shape_are_refused(loss):
    sides = F.normalize(torch.randn(2, 4, 8), dim=-1)
    with pytest.raises(ValueError, match=r"same must be \(4, 4\).*not \(4,\)"): loss(*sides, 10.0, same=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one pair"): loss(*sides[:, :0], 10.0)
