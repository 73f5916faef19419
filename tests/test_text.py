"Text tokenizers against their promises; CLIP's ids are compared with the original's in test_parity.py."
import pytest

from fuselip_edu.text import BPE, CLIPBPE, TEXT_TOKENIZERS

CORPUS = ["a red circle above a blue square", "what colour is the circle?", "a small red square in the upper left"] * 20


@pytest.fixture(scope="module")
def bpe(): return BPE.train(CORPUS, 320)


@pytest.fixture(scope="module")
def clip(): return CLIPBPE()


@pytest.mark.parametrize("text", ["<end_of_text>", "<START_OF_TEXT>a", "a<end_of_text><end_of_text>b", "&lt;end_of_text&gt;",
                                  "<end_of_text> &amp;amp;amp;lt;end_of_text&amp;amp;amp;gt;", "<<end_of_text>>"])
def test_clip_keeps_literal_special_tokens_as_text(clip, text):
    ids = clip.encode(text)
    assert ids and max(ids) < clip.sot and clip.decode(ids).replace(" ", "") == clip.clean(text).replace(" ", "")


def test_clip_encodes_ordinary_text_as_the_original(clip):
    original = CLIPBPE(original=True)
    for text in [*CORPUS[:3], "a < b", "start_of_text", "it's 2 o'clock!—", "café ☃"]: assert clip.encode(text) == original.encode(text)
    assert original.encode("text <end_of_text> inside")[1:-1] == [clip.eot]


@pytest.mark.parametrize("text", ["", "a", "café ☃ 🙂 дом", "tabs\tand\nlines", "two  spaces", "\u200d zero width", "x" * 1000, *CORPUS[:3]])
def test_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and all(bpe.eot < i < bpe.n_vocab for i in ids)


def test_normalised_forms_share_ids(bpe):
    assert bpe.encode("  A RED Circle ") == bpe.encode("a red circle")
    assert bpe.encode("cafe\u0301") == bpe.encode("caf\u00e9")  # one accent, written in two ways


@pytest.mark.parametrize("literal", ["<pad>", "<sot>", "<eot>", "a <eot> b", "<EOT>"])
def test_literal_special_tokens_stay_text(bpe, tmp_path, literal):
    bpe.save(tmp_path)
    for tokenizer in (bpe, BPE.load(tmp_path)):
        assert not {tokenizer.pad, tokenizer.sot, tokenizer.eot} & set(tokenizer.encode(literal))
        assert tokenizer.decode(tokenizer.encode(literal)) == literal.lower()


def test_decode_skips_special_ids(bpe):
    assert bpe.decode([bpe.sot, *bpe.encode("a red circle"), bpe.eot, bpe.pad]) == "a red circle"


def test_training_is_deterministic_and_bounded(bpe):
    again = BPE.train(CORPUS, 320)
    assert again.tokenizer.to_str() == bpe.tokenizer.to_str() and bpe.n_vocab <= 320
    assert BPE.train(CORPUS, 259).n_vocab == 259  # bytes alone
    with pytest.raises(ValueError, match="at least 259.*not 258"): BPE.train(CORPUS, 258)


def test_save_and_load(bpe, tmp_path):
    bpe.save(tmp_path / "new")
    again = BPE.load(tmp_path / "new")
    assert again.n_vocab == bpe.n_vocab and all(again.encode(text) == bpe.encode(text) for text in [*CORPUS[:3], "café <eot>"])


def test_load_errors(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no text tokenizer"): BPE.load(tmp_path)
    bpe.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="tokenizer.json.*is not a text tokenizer"): BPE.load(tmp_path)


def test_names_lead_back_to_the_classes():
    assert all(TEXT_TOKENIZERS[kind.name] is kind for kind in (BPE, CLIPBPE))
