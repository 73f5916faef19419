"Chapter 23: changed tokens, swapped words, searched folders, and the controls around them."
import os
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fuselip_edu.baselines import LateFusion, LateFusionConfig
from fuselip_edu.batches import find_trouble
from fuselip_edu.core import load_image, save_tensors
from fuselip_edu.explore import (CachedModel, Found, ImageIndex, alternatives, change_code, explore_search, explore_tokens, explore_words, item_key, model_fingerprint,
                                 picture_codes, picture_files, score_words, show_code, show_found, show_words)
from fuselip_edu.filip import FILIP, FILIPConfig
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.pairs import Item
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok, TiTokConfig

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Colours(torch.nn.Module):
    "Embeds a picture by its mean colour, a text by the colour it names; both together are their sum."
    image_size = 8

    def __init__(self, stop=None):
        super().__init__()
        self.weight, self.seen, self.stop = torch.nn.Parameter(torch.ones(1)), [], stop

    def encode_text(self, texts): return self.embed_items([Item(text=text) for text in texts])
    def encode_image(self, images): return self.embed_items([Item(image) for image in images])

    def embed_items(self, items, batch_size=256):
        vectors = []
        for item in items:
            if self.stop is not None and len(self.seen) >= self.stop: raise KeyboardInterrupt
            image = torch.zeros(3) if item.image is None else load_image(item.image).float().mean((1, 2))
            vectors.append(image + torch.tensor(COLOURS.get(item.text, (0, 0, 0))))
            self.seen.append(item)
        return F.normalize(torch.stack(vectors), dim=-1) * float(self.weight.detach()) if vectors else torch.zeros(0, 3)


class Recording(Colours):
    "Writes down what it is asked."
    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def embed_items(self, items, batch_size=256):
        self.asked.append([item.text or str(item.image) for item in items])
        return super().embed_items(items)


@pytest.fixture
def folder(tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.JPG", "green"), ("more/c.png", "blue"), ("more/d.webp", "white")): Image.new("RGB", (20, 10), colour).save(photos / name)
    return photos


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FuseLIP(FuseLIPConfig(width=32, layers=1, heads=4), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle", "a blue square"], 300)).eval()


def in_parts(monkeypatch, part):
    "Every `CachedModel` writes after so many items."
    make = CachedModel.__init__
    monkeypatch.setattr(CachedModel, "__init__", lambda self, model, folder=None: make(self, model, folder, part))


def names(found): return [Path(one.image).name for one in found]


@pytest.mark.parametrize("text, expected", [
    ("a circle", ["a circle"]), ("a {red|blue} circle", ["a red circle", "a blue circle"]), ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
    ("a circle{| on the left}", ["a circle", "a circle on the left"]), ("a { |big} circle", ["a circle", "a big circle"]), ("{a|a} b", ["a b"]), ("a {} b", ["a b"])])
def test_texts_with_choices_are_written_out(text, expected): assert alternatives(text) == expected


@pytest.mark.parametrize("text", ["a {red", "red} a", "{a|{b|c}}", "{a}}"])
def test_braces_without_a_partner_are_told(text):
    with pytest.raises(ValueError, match="has no partner"): alternatives(text)


def test_too_many_texts_are_counted_and_not_made():
    with pytest.raises(ValueError, match="stands for 1,000,000,000,000 texts, more than 100"): alternatives("{0|1|2|3|4|5|6|7|8|9}" * 12)


def test_a_text_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="needs an image, a text"): show_words(model, render(scene_at(0)), "{|}")


def test_pictures_are_found_at_any_depth_and_in_archives(folder, tmp_path):
    for name in (".hidden.png", "notes.txt", "more/.git/e.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("two/f.PNG", "__MACOSX/two/._f.PNG", "e.png", "readme.md"): archive.write(folder / "a.png", name)
    found = picture_files([folder, tmp_path / "z.zip", folder / "a.png"])
    assert found == [str(folder / name) for name in ("a.png", "b.JPG", "more/c.png", "more/d.webp")] + [f"{tmp_path / 'z.zip'}#{name}" for name in ("e.png", "two/f.PNG")]
    assert load_image(found[-1], 8).shape == (3, 8, 8) and picture_files(str(folder)) == found[:4]
    assert picture_files([folder / "notes.txt"]) == [str(folder / "notes.txt")]  # named by hand, taken at its word


def test_places_without_pictures_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_text("no archive")
    with pytest.raises(ValueError, match="empty' has no picture"): picture_files([folder, tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no image file at .*nowhere"): picture_files([folder, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="broken.zip' is not a ZIP file"): picture_files([tmp_path / "broken.zip"])
    for nothing in ([], "", [""], [folder, ""]):
        with pytest.raises(ValueError, match="no place to look"): picture_files(nothing)


def test_a_picture_is_there_once_however_it_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    found = picture_files(["photos", folder, "./photos", "photos/../photos/a.png", "link", "link.png"])
    assert found == ["photos/a.png", "photos/b.JPG", "photos/more/c.png", "photos/more/d.webp"]
    index = ImageIndex(Colours(), ["photos"])
    assert all("a.png" not in names(index.search(Item(path), 4)) for path in ("link.png", folder / "a.png", "./photos/a.png"))


def test_odd_names_are_taken_as_they_are(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in ("a//1.png", "a/./2.png", "trip.jpg/", "trip.jpg/3.png"): archive.writestr(name, b"" if name.endswith("/") else (folder / "a.png").read_bytes())
    found = picture_files([tmp_path / "odd.zip"])
    assert len(found) == 3 and picture_files(found) == found and len(ImageIndex(Colours(), found).files) == 3
    for name in ("US$5 to $6.png", "b$\\frac$.png", "c #1.png"): (folder / name).write_bytes((folder / "a.png").read_bytes())
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file: file.write((folder / "a.png").read_bytes())
    index = ImageIndex(Colours(), [folder])
    figure = show_found(Item(text="a $\\frac$"), index.search(Item(text="red"), 10))
    figure.savefig(tmp_path / "x.png")
    assert len(index.files) == 8 and any("US$5 to $6.png" in axis.get_title() for axis in figure.axes)
    show_words(Colours(), folder / "a.png", "{a $\\frac$|b}").savefig(tmp_path / "x.png")


def test_a_search_ranks_by_the_item(folder):
    index = ImageIndex(Colours(), [folder])
    assert names(index.search(Item(text="green"), 1)) == ["b.JPG"] and len(index.search(Item(text="green"), 99)) == 4
    found = index.search(Item(text="blue"))
    assert names(found)[:2] == ["c.png", "d.webp"] and [one.score for one in found] == sorted((one.score for one in found), reverse=True) and found[0].score == pytest.approx(1)
    assert names(index.search(Item(folder / "a.png"), 1)) != ["a.png"]  # no answer to itself
    assert names(index.search(Item(os.path.relpath(folder / "a.png"), "blue"), 4))[0] in ("c.png", "d.webp") and "a.png" not in names(index.search(Item(os.path.relpath(folder / "a.png"), "blue"), 4))
    with pytest.raises(ValueError, match="at least 1, not 0"): index.search(Item(text="green"), 0)
    with pytest.raises(TypeError, match="asks with an Item, such as .*, not with str 'green'"): index.search("green")


def test_kept_vectors_serve_again_until_the_file_or_the_model_changes(folder, tmp_path):
    first, second, third = Colours(), Colours(), Colours()
    index = ImageIndex(first, [folder], tmp_path / "kept")
    assert len(first.seen) == index.embedded == 4
    again = ImageIndex(second, [folder], tmp_path / "kept")
    assert second.seen == [] and again.embedded == 0 and torch.equal(again.vectors, index.vectors)
    Image.new("RGB", (30, 30), "blue").save(folder / "a.png")
    changed = ImageIndex(second, [folder], tmp_path / "kept")
    assert [Path(item.image).name for item in second.seen] == ["a.png"] and {"a.png", "c.png"} == set(names(changed.search(Item(text="blue"), 2)))
    with torch.no_grad(): third.weight += 1
    assert ImageIndex(third, [folder], tmp_path / "kept").embedded == 4 and model_fingerprint(third) != model_fingerprint(first)


def test_an_interrupted_index_goes_on(folder, tmp_path, monkeypatch):
    in_parts(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt): ImageIndex(Colours(stop=3), [folder], tmp_path / "kept")
    resumed = Colours()
    ImageIndex(resumed, [folder], tmp_path / "kept")
    assert len(resumed.seen) == 1


def test_nothing_is_written_without_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ImageIndex(Colours(), [folder])
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_unreadable_pictures_are_named_and_left_out(folder, tmp_path):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "letter.jpg").write_text("Dear reader")
    with pytest.warns(UserWarning, match="2 of 6 pictures cannot be read and are left out, the first of them: .*broken.png"): index = ImageIndex(Colours(), [folder], tmp_path / "kept")
    assert {Path(file).name for file in index.unreadable} == {"broken.png", "letter.jpg"} and len(index.files) == len(index.vectors) == 4 and names(index.search(Item(text="green"), 1)) == ["b.JPG"]
    with warnings.catch_warnings(), pytest.raises(ValueError, match="none of the 2 pictures can be read: .*broken.png"):
        warnings.simplefilter("ignore")
        ImageIndex(Colours(), [folder / "broken.png", folder / "letter.jpg"])


def test_what_is_kept_is_not_opened_again_for_the_sake_of_what_is_broken(folder, tmp_path, monkeypatch):
    in_parts(monkeypatch, 2)
    (folder / "aa.png").write_bytes((folder / "a.png").read_bytes()[:40])
    opened = []
    monkeypatch.setattr("fuselip_edu.explore.find_trouble", lambda file: opened.append(Path(file).name) or find_trouble(file))
    with pytest.warns(UserWarning, match="1 of 5"): first = ImageIndex(Colours(), [folder], tmp_path / "kept")
    assert opened == ["a.png", "aa.png"] and first.embedded == 4
    with pytest.warns(UserWarning, match="1 of 5"): second = ImageIndex(Colours(), [folder], tmp_path / "kept")
    assert opened[2:] == ["aa.png"] and second.embedded == 0


def test_vectors_that_are_none_are_passed_over(folder, tmp_path):
    kept = tmp_path / "kept" / model_fingerprint(Colours())
    kept.mkdir(parents=True)
    save_tensors({"other": torch.zeros(3)}, kept / "other.safetensors")
    assert ImageIndex(Colours(), [folder], tmp_path / "kept").embedded == 4
    with pytest.raises(ValueError, match="nothing can be written"): ImageIndex(Colours(), [folder], folder / "a.png")


def test_images_are_told_apart_by_what_they_show(tmp_path):
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    assert item_key(Item(red)) != item_key(Item(blue)) and item_key(Item(red)) == item_key(Item(red.convert("RGB")))
    opaque = Image.new("RGB", (4, 4), (9, 9, 9))
    clear = opaque.copy()
    clear.info["transparency"] = (9, 9, 9)
    assert item_key(Item(opaque)) != item_key(Item(clear))
    half = torch.rand(3, 4, 4).bfloat16()
    assert item_key(Item(half)) == item_key(Item(half.clone())) != item_key(Item(half.float()))
    item, path = Item(tmp_path / "a.png"), tmp_path / "a.png"
    red.save(path)
    before = item_key(item)
    Image.new("RGB", (9, 9)).save(path)
    assert item_key(item) != before  # the very same item


def test_a_fault_of_the_model_is_not_taken_for_one_of_the_pictures(folder):
    broken = Colours()
    with torch.no_grad(): broken.weight *= float("nan")
    with pytest.raises(ValueError, match="embeddings are not finite"): ImageIndex(broken, [folder])


def test_models_with_many_vectors_an_item_are_refused(folder):
    filip = FILIP(FILIPConfig(layers=1), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a circle"], 300))
    with pytest.raises(ValueError, match="a vector for every token"): ImageIndex(filip, [folder])
    with pytest.raises(ValueError, match="a vector for every token"): show_words(filip, folder / "a.png", "a circle")


def test_what_was_found_is_drawn(folder, tmp_path):
    found = ImageIndex(Colours(), [folder]).search(Item(text="red"))
    figure = show_found(Item(folder / "a.png", "red <b>"), found)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 5 and shown[1].get_title() == f"{found[0].score:.2f}\na.png"
    assert show_found(Item(text="red"), []) and show_found(Item(text="red"), [Found(1.0, str(folder / "a.png"))] * 11).savefig(tmp_path / "x.png") is None


def test_a_code_is_exchanged_and_read(model):
    image = render(scene_at(3))
    codes = picture_codes(model, image)
    assert codes == model.image_tokenizer.encode(image[None])[0].tolist() and change_code(codes, 15, 7, 1024) == [*codes[:15], 7]
    with pytest.raises(ValueError, match="no code 16; the picture has codes 0 to 15"): show_code(model, image, 16, 0, ["a"])
    with pytest.raises(ValueError, match="no code -1"): show_code(model, image, -1, 0, ["a"])
    with pytest.raises(ValueError, match="of the number 5000; the codebook has 0 to"): show_code(model, image, 0, 5000, ["a"])
    other = (codes[5] + 1) % model.image_tokenizer.config.n_codes
    figure = show_code(model, image, 5, other, ["a red circle", "a blue square"])
    bars = {container.get_label(): [bar.get_width() for bar in container] for container in figure.axes[3].containers}
    assert bars["before"] == pytest.approx((model.encode_image([image]) @ model.encode_text(["a red circle", "a blue square"]).T)[0].tolist(), abs=1e-5)
    assert bars["before"] != bars["after"] and not torch.equal(*(torch.as_tensor(axis.images[0].get_array()) for axis in figure.axes[1:3]))


def test_models_without_codes_or_decoder_are_refused(model):
    late = LateFusion(LateFusionConfig(), BPE.train(["a circle"], 300))
    with pytest.raises(ValueError, match="a LateFusion model reads pixels and has no codes"): show_code(late, render(scene_at(0)), 0, 0, ["a"])
    blind = FuseLIP(FuseLIPConfig(width=32, layers=1, heads=4), TiTok(TiTokConfig(has_decoder=False)), model.item_tokenizer.text_tokenizer)
    with pytest.raises(RuntimeError, match="holds encoder and codebook only"): show_code(blind, render(scene_at(0)), 0, 0, ["a"])
    assert show_code(blind, render(scene_at(0)), 0, 0, ["a"], model.image_tokenizer)  # a whole one paints in its place


def test_words_stand_in_the_order_of_their_similarity(folder):
    assert [text for _, text in score_words(Colours(), folder / "b.JPG", "{blue|red|green|white}")] == ["green", "white", "blue", "red"]
    axis = show_words(Colours(), folder / "b.JPG", "{red|green|blue|white}").axes[1]
    widths = [bar.get_width() for bar in axis.patches]
    assert axis.get_yticklabels()[0].get_text() == "green" and widths == sorted(widths, reverse=True)
    assert len(show_words(Colours(), folder / "b.JPG", "{red|green|blue|white}", best=2).axes[1].patches) == 2


def test_controls_call_their_view_again(model, folder, monkeypatch):
    pytest.importorskip("ipywidgets")
    images = [render(scene_at(index)) for index in range(3)]
    tokens = explore_tokens(model, images, ["a red circle"])
    picture, position, shown = tokens.children
    code = shown.children[0]
    picture.value, position.value = 2, 9
    assert code.value == picture_codes(model, images[2])[9] and (picture.max, position.max, code.max) == (2, 15, model.image_tokenizer.config.n_codes - 1)
    drawings = []
    monkeypatch.setattr("fuselip_edu.explore.show_code", lambda model, image, *asked: drawings.append(asked[:2]))
    for control, value in ((position, 3), (picture, 1), (code, 77), (position, 4)): control.value = value
    first, second = picture_codes(model, images[2]), picture_codes(model, images[1])
    assert drawings == [(3, first[3]), *([(3, second[3])]), (3, 77), (4, second[4])]
    drawn = []
    words = explore_words(Recording(drawn), [folder / "a.png", folder / "b.JPG"], "{red|green}")
    words.children[0].value = 1
    words.children[1].value = "a {red|green|blue} card"
    colours, cards = ["red", "green"], ["a red card", "a green card", "a blue card"]
    assert drawn == [colours, [str(folder / "a.png")], colours, [str(folder / "b.JPG")], cards, [str(folder / "b.JPG")]]
    search = explore_search(ImageIndex(Colours(), [folder]), "blue")
    assert [label for label, _ in search.children[1].options] == ["none", "a.png", "b.JPG", "c.png", "d.webp"]
    shown = []
    monkeypatch.setattr("fuselip_edu.explore.show_found", lambda item, found: shown.append((item.text, item.image, len(found))))
    for control, value in zip((0, 1, 2, 0), ("red", str(folder / "more/c.png"), 2, "")): search.children[control].value = value
    assert shown == [("red", None, 4), *[(text, str(folder / "more/c.png"), n) for text, n in (("red", 3), ("red", 2), (None, 2))]]
    for nothing in (lambda: explore_tokens(model, [], ["a"]), lambda: explore_words(Colours(), [], "a")):
        with pytest.raises(ValueError, match="no picture to show"): nothing()


def test_what_is_typed_wrong_is_told_where_the_figure_would_be(model, folder, capsys):
    pytest.importorskip("ipywidgets")
    words = explore_words(Colours(), [folder / "a.png"], "{red|green}")
    capsys.readouterr()
    words.children[1].value = "{red|green"
    assert "has no partner" in capsys.readouterr().out
    search = explore_search(ImageIndex(Colours(), [folder]), "blue")
    search.children[0].value = " "
    assert "give a text, a picture, or both" in capsys.readouterr().out
    search.children[1].value = str(folder / "a.png")
    assert capsys.readouterr().out.count("Figure(") == 1
