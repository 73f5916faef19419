"Text-guided transformations: pairs, texts and draws."
import random
import re

import pytest
import torch

from fuselip_edu.transforms import EVAL_COUNT, KINDS, TRAIN_COUNT, WEIGHTS, crop, draw_kind, grayscale, jitter, rotate, transform_pairs

FORMS = {"crop": r"crop to (upper|center|lower) (left|center|right)",
         "rotate": r"rotate (\d0) degrees (clockwise|counter-clockwise)",
         "jitter": " and ".join(rf"(in|de)crease {name} by factor (\d\.\d)" for name in ("brightness", "contrast", "saturation")),
         "flip": r"(horizontal|vertical) flip",
         "colour": r"grayscale|colorize"}


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def apply(left, text):
    "The change that an instruction names; `colorize` cannot be computed."
    if found := re.fullmatch(FORMS["crop"], text):
        return crop(left, ("upper", "center", "lower").index(found[1]), ("left", "center", "right").index(found[2]))
    if found := re.fullmatch(FORMS["rotate"], text): return rotate(left, int(found[1]) * (1 if found[2] == "counter-clockwise" else -1))
    if found := re.fullmatch(FORMS["jitter"], text): return jitter(left, *map(float, found.group(2, 4, 6)))
    if found := re.fullmatch(FORMS["flip"], text): return left.flip(2 if found[1] == "horizontal" else 1)
    if text == "grayscale": return grayscale(left)
    raise AssertionError(f"no form fits {text!r}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_pairs_hold_what_the_text_says(image, kind, train):
    pairs = transform_pairs(image, kind, random.Random(3), train)
    assert len(pairs) == (TRAIN_COUNT if train else EVAL_COUNT)[kind]
    for pair in pairs:
        assert pair.right.text is None and pair.right.image.shape == image.shape
        if pair.left.text != "colorize": assert torch.equal(apply(pair.left.image, pair.left.text), pair.right.image)


def test_jitter_factors():
    image, factors = torch.zeros(3, 8, 8, dtype=torch.uint8), []
    for seed in range(200):
        for pair in transform_pairs(image, "jitter", random.Random(seed)):
            for word, factor in re.findall(r"(in|de)crease \w+ by factor (\d\.\d)", pair.left.text):
                factors.append(float(factor))
                assert (word == "in") == (float(factor) > 1)
    assert set(factors) == {round(tenth / 10, 1) for tenth in range(3, 21)} - {1.0}
    assert 1.5 < factors.count(1.1) / factors.count(1.2) < 2.5  # 1.0 becomes 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_a_function_of_the_seed(image, kind):
    def draw(seed): return [(pair.left.text, pair.left.image, pair.right.image) for pair in transform_pairs(image, kind, random.Random(seed))]
    for one, two in zip(draw(5), draw(5)): assert one[0] == two[0] and torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])
    assert len({tuple(text for text, _, _ in draw(seed)) for seed in range(20)}) > 1


def test_the_image_itself_is_not_changed(image):
    before = image.clone()
    for kind in KINDS: transform_pairs(image, kind, random.Random(0), train=False)
    assert torch.equal(image, before)


def test_weights():
    assert [round(WEIGHTS[kind], 4) for kind in KINDS] == [0.1176, 0.1765, 0.1765, 0.2647, 0.2647]
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    rng = random.Random(0)
    drawn = [draw_kind(rng) for _ in range(20_000)]
    for kind in KINDS: assert drawn.count(kind) / 20_000 == pytest.approx(WEIGHTS[kind], abs=0.015)


def test_errors(image):
    with pytest.raises(ValueError, match="no transformation 'zoom'; the kinds are crop, rotate"): transform_pairs(image, "zoom", random.Random(0))
    for wrong in (image[:, :16], image[0], image[:2], image / 255):
        with pytest.raises(ValueError, match=r"needs a square \(3, s, s\) image of torch.uint8, not"): transform_pairs(wrong, "flip", random.Random(0))
