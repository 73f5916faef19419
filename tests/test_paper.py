"The paper's protocols on tiny data sets in the real formats, against slow computations written out here."
import io
import json
import math
import random
import tarfile
import zipfile
import zlib

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fuselip_edu import evaluate, paper
from fuselip_edu.core import load_image
from fuselip_edu.pairs import Item, Query
from fuselip_edu.transforms import EVAL_COUNT, KINDS, transform_pairs

WIDTH = 6


def vector(item): # known: drawn from a seed that is the item's content
    image = b"" if item.image is None else load_image(item.image, 8).numpy().tobytes()
    seed = zlib.crc32((item.text or "").encode() + b"|" + image)
    return F.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


class Known(torch.nn.Module):
    "Only what the suite asks of a model."
    image_size = 32

    def __init__(self, weight=1.0, stop_after=math.inf):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))
        self.seen, self.stop_after = [], stop_after

    def embed_items(self, items, batch_size=256):
        if len(self.seen) + len(items) > self.stop_after: raise KeyboardInterrupt
        self.seen += items
        return torch.stack([vector(item) for item in items])


def picture(seed, width=64, height=48): # blocks of random colours
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (8, 6), bytes(rng.randrange(256) for _ in range(144)))
    return small.resize((width, height), Image.Resampling.NEAREST)


def save(path, seed, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **size).save(path, quality=95)
    return path


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def ranked_first(asked, candidates): # slow: does candidate 0 win, no tie
    scores = [float(torch.dot(vector(asked).double(), vector(candidate).double())) for candidate in candidates]
    return all(scores[0] > score for score in scores[1:])


def share(values): return sum(values) / len(values)


# the sets, each in its real format

def make_cc3m(root, n=5):
    folder = root / "cc3m"
    for i in range(n): save(folder / "val" / f"{i}.jpg", f"cc{i}")
    write(folder / "val.csv", "path,caption\n" + "".join(f"val/{i}.jpg,caption {i}\n" for i in range(n)))
    return folder


REGIONS = [[(0, 0, 40, 40), (2, 2, 40, 40), (25, 0, 40, 40), (0, 0, 32, 47)], [(0, 0, 20, 20)], [(10, 5, 45, 40)], [(0, 0, 35, 35), (60, 40, 50, 50), (10, 60, 40, 34)]]


def make_vg(root, file="region_descriptions_test.json"):
    folder = root / "vg"
    for i, place in enumerate(("images", "VG_100K", "VG_100K_2", "images")): save(folder / place / f"{i + 1}.jpg", f"vg{i}", width=128, height=96)
    write(folder / file, [{"id": i + 1, "regions": [{"region_id": 10 * i + j, "image_id": i + 1, "phrase": f"thing {i} {j}", "x": x, "y": y, "width": w, "height": h}
                                                    for j, (x, y, w, h) in enumerate(boxes)]} for i, boxes in enumerate(REGIONS)])
    return folder


def box(left, top, right, bottom): return {"XMin": left, "XMax": right, "YMin": top, "YMax": bottom}


def make_openimages(root):
    folder = root / "openimages"
    for i in range(3): save(folder / "test" / f"{i}.jpg", f"oi{i}")
    sample = lambda image, label, *sides: {"ImageID": f"{image}.jpg", "LabelName": label, "bbox": box(*sides)}
    query = lambda i, text: {"query_img": f"{i}.jpg", "query_target": text, "retrieval_samples": [
        sample(i, "Cat", 1.4, 2.6, 20.5, 20.0), sample(i, "Dog", 10, 10, 40, 30), sample((i + 1) % 3, "Cat", 5, 5, 33.3, 40)]}
    write(folder / "oi-crop.json", {"meta": {"subset": "test", "length": 6, "iou_thresh": 0.6}, "data": [query(i % 3, f"Cat {i}") for i in range(6)]})
    write(folder / "oi-crop-positional-v3.json", {"meta": {"subset": "test", "length": 2, "iou_thresh": "none"}, "data": {
        "Cat": [query(i, f"The cat on the left {i}") | {"label": "Cat", "bbox": box(0, 0, 5, 5)} for i in range(3)],
        "Dog": [query(i, f"The dog on the right {i}") | {"label": "Dog", "bbox": box(0, 0, 5, 5)} for i in range(2)]}})
    return folder


CLASSES = {"n01": "tench", "n02": "goldfish", "n03": "missile", "n04": "crane", "n05": "missile", "n06": "bicycle", "n07": "boat"}


def make_imagenet(root):
    folder = root / "imagenet"
    for i, wnid in enumerate(CLASSES):
        for j in range(3): save(folder / "val" / wnid / f"ILSVRC2012_val_{i}{j}.JPEG", f"in{i}{j}")
    write(folder / "classnames.json", CLASSES)
    return folder


CAPTIONS = [[f"scene {i} told {j}" for j in range(5 + i % 2)] for i in range(12)]
CAPTIONS[3][0] = CAPTIONS[2][0]  # the same words for two images


def make_coco(root, karpathy=False):
    folder = root / "coco"
    for i in range(12): save(folder / ("val2014" if karpathy else "val2017") / f"{i:012d}.jpg", f"co{i}")
    if karpathy:
        return write(folder / "dataset_coco.json", {"dataset": "coco", "images": [
            {"filepath": "val2014", "filename": f"{i:012d}.jpg", "split": "test" if i % 3 else "train", "cocoid": i,
             "sentences": [{"raw": text, "tokens": text.split()} for text in texts]} for i, texts in enumerate(CAPTIONS)]})
    return write(folder / "annotations" / "captions_val2017.json", {
        "images": [{"id": 100 + i, "file_name": f"{i:012d}.jpg"} for i in range(12)],
        "annotations": [{"id": 7, "image_id": 100 + i, "caption": text} for i, texts in enumerate(CAPTIONS) for text in texts]})


def make_flickr(root):
    folder = root / "flickr30k"
    for i in range(4): save(folder / "flickr30k-images" / f"{i}.jpg", f"fl{i}")
    return write(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": [
        {"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": f"flickr {i} {j}"} for j in range(5)]} for i in range(4)]})


def make_sugarcrepe(root):
    for i in range(8): save(root / "coco" / "val2017" / f"{i:012d}.jpg", f"co{i}")
    for k, kind in enumerate(paper.SUGARCREPE):
        write(root / "sugarcrepe" / f"{kind}.json", {str(i): {"filename": f"{i:012d}.jpg", "caption": f"{kind} true {i}", "negative_caption": f"{kind} false {i}"} for i in range(2 + k)})


def make_mmeb(root, subsets=tuple(paper.MMEB_SUBSETS), rows=5, candidates=3):
    import pyarrow
    import pyarrow.parquet
    for subset in subsets:
        table = []
        for i in range(rows):
            image = f"{subset}/{i}.jpg"
            save(root / "mmeb" / "eval_images" / image, f"mm{subset}{i}")
            targets = [f"{subset}/{(i + j) % rows}.jpg" if paper.MMEB_SUBSETS[subset] == "Ground." else "" for j in range(candidates)]
            table.append({"qry_text": f"<|image_1|>\nRepresent the given image with the following question: what {i}?\n", "qry_img_path": image,
                          "tgt_text": [f"answer {subset} {i + j}, other" for j in range(candidates)], "tgt_img_path": targets})
        (root / "mmeb" / subset).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / "mmeb" / subset / "test-00000-of-00001.parquet")


def make_everything(root):
    for make in (make_cc3m, make_vg, make_openimages, make_imagenet, make_coco, make_flickr, make_sugarcrepe, make_mmeb): make(root)
    return root


# the protocols

def test_tgit_asks_for_the_first_of_every_kind(tmp_path):
    folder = make_cc3m(tmp_path)
    write(folder / "eval_augmented_idcs.txt", "[3, 0,\n4]")
    source = paper.TGITEval(folder, size=32, seed=5)
    assert len(source) == 15 and source.groups == [[i] for i in range(15)]
    queries, right = source.queries()["tgit"], {kind: [] for kind in KINDS}
    for number, index in enumerate((3, 0, 4)):
        image = load_image(str(folder / "val" / f"{index}.jpg"), 32)
        for k, kind in enumerate(KINDS):
            pairs = transform_pairs(image, kind, random.Random(f"5/{5 * number + k}"), train=False)
            asked = pairs[0]
            if kind == "flip": asked = next(pair for pair in pairs if torch.equal(pair.left.image, image))
            query = queries[5 * number + k]
            assert query.kind == kind and len(query.candidates) == EVAL_COUNT[kind] == len(source[5 * number + k])
            assert query.item.text == asked.left.text and torch.equal(query.item.image, asked.left.image) and torch.equal(query.candidates[0].image, asked.right.image)
            others = [pair.right for pair in pairs if not torch.equal(pair.right.image, asked.right.image)]
            right[kind].append(ranked_first(asked.left, [asked.right, *others]))
    row = source.score(Known())
    assert row["accuracy"] == pytest.approx(share([share(found) for found in right.values()])) and row["n"] == 15
    assert {kind: found["accuracy"] for kind, found in row["kinds"].items()} == pytest.approx({kind: share(found) for kind, found in right.items()})
    assert source.remarks == ["3 images, in the paper 1,000"]


def test_tgit_without_the_list_takes_the_first_images_and_says_so(tmp_path):
    folder = make_cc3m(tmp_path)
    source = paper.TGITEval(folder, size=32, images=2)
    assert [path[-5:] for path in source.images] == ["0.jpg", "1.jpg"] and "first images" in source.remarks[1]
    write(folder / "eval_augmented_idcs.txt", "1 0")
    assert paper.data_fingerprint(paper.TGITEval(folder, size=32, images=2)) != paper.data_fingerprint(source)  # so a score without the list is not taken for one with it
    write(folder / "eval_augmented_idcs.txt", "1 5")
    with pytest.raises(ValueError, match="eval_augmented_idcs.txt.*row 5 of 5"): paper.TGITEval(folder)
    (folder / "val" / "1.jpg").unlink()
    write(folder / "eval_augmented_idcs.txt", "[1, 0]")
    with pytest.raises(FileNotFoundError, match="1 of the 2 images.*val.csv.*1.jpg.*row 1"): paper.TGITEval(folder)


def test_tgit_reads_shards(tmp_path):
    rows = []
    for shard in range(2):
        with tarfile.open(tmp_path / f"cc3m-validation-000{shard}.tar", "w") as tar:
            for i in range(2):
                data = io.BytesIO()
                picture(f"shard{shard}{i}").save(data, "PNG")
                rows.append(load_image(picture(f"shard{shard}{i}"), 32))
                for name, content in ((f"{shard}{i}.png", data.getvalue()), (f"{shard}{i}.txt", b"caption")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    source = paper.TGITEval(tmp_path, size=32)
    assert source.count == 4 and all(torch.equal(source._load(i), rows[i]) for i in range(4))
    assert source.score(Known())["n"] == 20


def test_suppression():
    region = lambda x, y, width, height: {"x": x, "y": y, "width": width, "height": height}
    a, b, c, d = region(0, 0, 100, 100), region(50, 0, 100, 100), region(0, 0, 130, 100), region(200, 0, 32, 90)
    assert paper.overlap(a, b) == 50 * 100 / (150 * 100) and paper.overlap(a, d) == 0
    assert paper.kept_regions([a, b, c, d]) == [a]  # b overlaps a by a third, c by more; d is not wider than 32 pixels
    assert paper.kept_regions([c, b, a]) == [c] and paper.kept_regions([b, c, a]) == [b]  # the order of the file decides
    assert paper.overlap(b, c) == 80 / 150


def test_suppression_keeps_what_a_dropped_region_overlaps():
    region = lambda x, width: {"x": x, "y": 0, "width": width, "height": 100}
    first, second, third = region(0, 100), region(50, 100), region(100, 100)
    assert paper.kept_regions([first, second, third]) == [first, third]  # the third overlaps only the dropped second
    exactly = region(0, 130), region(70, 130)  # 60 / 200
    assert paper.overlap(*exactly) == 0.3 and len(paper.kept_regions(exactly)) == 2


def test_vg_crop_finds_each_kept_crop_among_those_of_its_image(tmp_path):
    folder = make_vg(tmp_path)
    source = paper.VGCropEval(folder)
    kept = {0: [0, 2], 2: [0], 3: [0, 1, 2]}  # image 1 has no region that is large enough; region 1 of image 0 overlaps region 0
    places = {0: "images", 2: "VG_100K_2", 3: "images"}
    assert len(source) == 3 and [len(source[i]) for i in range(3)] == [2, 1, 3]
    right = []
    for i, chosen in kept.items():
        image = Image.open(folder / places[i] / f"{i + 1}.jpg")
        crops = [Item(image.crop((x, y, x + w, y + h))) for x, y, w, h in (REGIONS[i][j] for j in chosen)]
        for at, j in enumerate(chosen):
            right.append(len(chosen) == 1 or ranked_first(Item(image, f"thing {i} {j}"), [crops[at], *crops[:at], *crops[at + 1:]]))  # a lone one is found in any case
    row = source.score(Known())
    assert (row["n"], row["lone"]) == (6, 1) and row["accuracy"] == pytest.approx(share(right)) and row["chance"] == pytest.approx((2 / 2 + 3 / 3 + 1) / 6)
    assert paper.VGCropEval(folder, images=2).count == 2
    assert source.remarks == ["3 images, in the paper 100"]


def test_vg_crop_from_the_whole_set_is_marked(tmp_path):
    assert paper.VGCropEval(make_vg(tmp_path, "region_descriptions.json"), images=1).remarks == [
        "1 images, in the paper 100", "the first images of the whole set, not the paper's, for lack of region_descriptions_test.json"]


def test_vg_accuracy_and_ties_are_what_the_original_prints(tmp_path):
    class Flat(Known):
        def embed_items(self, items, batch_size=256): return torch.ones(len(items), 4) / 2
    row = paper.VGCropEval(make_vg(tmp_path)).score(Flat())
    assert row["accuracy"] == pytest.approx(1 / 6) and row["accuracy"] + row["ties"] == pytest.approx(1)  # the lone region is found, all others tie


def test_vg_errors_name_file_and_record(tmp_path):
    folder = make_vg(tmp_path, "region_descriptions.json")
    records = json.loads((folder / "region_descriptions.json").read_text())
    del records[2]["regions"][0]["phrase"]
    write(folder / "region_descriptions.json", records)
    with pytest.raises(ValueError, match="region_descriptions.json' record 2: no field 'phrase'; expected"): paper.VGCropEval(folder)
    assert paper.VGCropEval(folder, images=1).count == 1  # what comes after the images that are needed is not looked at
    (folder / "images" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 1 images.*1.jpg.*record 0"): paper.VGCropEval(folder, images=1)
    write(folder / "region_descriptions.json", '[{"id": 1,')
    with pytest.raises(ValueError, match="region_descriptions.json' is not JSON"): paper.VGCropEval(folder)


@pytest.mark.parametrize("name, n, paper_count", [("oi-crop.json", 6, 1046), ("oi-crop-positional-v3.json", 5, 2546)])
def test_open_images(name, n, paper_count, tmp_path):
    folder = make_openimages(tmp_path)
    source = paper.OpenImagesEval(folder / name, paper_count=paper_count)
    data, right = json.loads((folder / name).read_text())["data"], []
    for record in data if isinstance(data, list) else [record for group in data.values() for record in group]:
        crops = []
        for sample in record["retrieval_samples"]:
            sides = [round(sample["bbox"][side]) for side in ("XMin", "YMin", "XMax", "YMax")]
            crops.append(Item(Image.open(folder / "test" / sample["ImageID"]).crop(sides)))
        right.append(ranked_first(Item(str(folder / "test" / record["query_img"]), record["query_target"]), crops))
    row = source.score(Known())
    assert len(source) == n == row["n"] and row["accuracy"] == pytest.approx(share(right)) and row["chance"] == pytest.approx(1 / 3)
    assert source[0][0].right.image.size == (19, 17)  # 1.4 … 20.5 and 2.6 … 20: rounded like the original's crops
    assert source.remarks == [f"{n:,} queries, in the paper {paper_count:,}"]


def test_open_images_errors_name_file_and_record(tmp_path):
    folder = make_openimages(tmp_path)
    good = json.loads((folder / "oi-crop.json").read_text())
    for change, message in ((lambda r: r.pop("query_target"), "query 4: no field 'query_target'"), (lambda r: r["retrieval_samples"][1]["bbox"].pop("YMax"), "query 4: no field 'YMax'"),
                            (lambda r: r.update(retrieval_samples=r["retrieval_samples"][:1]), "query 4: 1 retrieval_samples"),
                            (lambda r: r.update(query_img="../x.jpg"), "query 4: .*does not stay inside")):
        broken = json.loads(json.dumps(good))
        change(broken["data"][4])
        write(folder / "broken.json", broken)
        with pytest.raises(ValueError, match=f"broken.json' {message}"): paper.OpenImagesEval(folder / "broken.json")
    write(folder / "broken.json", {"data": []})
    with pytest.raises(ValueError, match="broken.json' meta or data: no field 'meta'"): paper.OpenImagesEval(folder / "broken.json")
    empty = json.loads(json.dumps(good))
    empty["data"][0]["retrieval_samples"][1]["bbox"] = box(10, 10, 10.2, 30)
    write(folder / "empty.json", empty)
    with pytest.raises(ValueError, match="empty.json.*region .* is empty"): paper.OpenImagesEval(folder / "empty.json").score(Known())


def test_imagenet_averages_eighty_normalised_prompts(tmp_path):
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES as templates
    source = paper.ImageNetEval(make_imagenet(tmp_path))
    assert len(templates) == 80 and source.names == ["tench", "goldfish", "missile", "crane", "bicycle", "boat"]  # the two missiles cannot be told apart by name
    classes = {}
    for name in source.names: classes[name] = F.normalize(torch.stack([vector(Item(text=template(name))) for template in templates]).double().mean(0), dim=0)
    assert torch.allclose(source.class_embeddings(Known()).double(), torch.stack(list(classes.values())), atol=1e-6)
    first, five = [], []
    for i, name in enumerate(CLASSES.values()):
        for j in range(3):
            image = vector(Item(str(tmp_path / "imagenet" / "val" / f"n0{i + 1}" / f"ILSVRC2012_val_{i}{j}.JPEG"))).double()
            order = sorted(classes, key=lambda other: -float(classes[other] @ image))
            first.append(order[0] == name)
            five.append(name in order[:5])
    row = source.score(Known())
    assert row["accuracy"] == pytest.approx(share(first)) and row["top5"] == pytest.approx(share(five)) and row["n"] == 21
    assert 0 < share(first) < share(five) < 1  # so that the test could fail
    query = source.queries()["imagenet"][7]  # of class n03
    assert [item.text for item in query.candidates[0]][:2] == ["a bad photo of a missile.", "a photo of many missile."] and len(query.candidates) == 6


def test_class_names_that_are_not_json_are_named_once(tmp_path):
    make_imagenet(tmp_path)
    path = write(tmp_path / "imagenet" / "classnames.json", "{")
    with pytest.raises(ValueError) as error: paper.ImageNetEval(tmp_path / "imagenet")
    assert str(error.value).startswith(f"'{path}' is not JSON") and str(error.value).count("classnames.json") == 1
    write(path, "{}")
    with pytest.raises(ValueError, match="classnames.json': no field 'n.*'; expected"): paper.ImageNetEval(tmp_path / "imagenet")


def test_imagenet_names_what_is_missing(tmp_path):
    folder = make_imagenet(tmp_path)
    (folder / "classnames.json").unlink()
    with pytest.raises(FileNotFoundError, match="7 class folders, expected 1,000"): paper.ImageNetEval(folder)
    write(folder / "classnames.json", {"n01": "tench"})
    with pytest.raises(ValueError, match="classnames.json.*no field 'n02'"): paper.ImageNetEval(folder)


def slow_recall(images, texts): # texts: list of lists -> {direction: {R@k}}; ties count against the model
    ranks = {"image to text": [], "text to image": []}
    flat = [(owner, vector(Item(text=text))) for owner, own in enumerate(texts) for text in own]
    shown = [vector(Item(str(path))) for path in images]
    score = lambda a, b: round(float(a.double() @ b.double()), 6)
    for owner, image in enumerate(shown):
        best = max(score(image, text) for other, text in flat if other == owner)
        ranks["image to text"].append(sum(score(image, text) >= best for other, text in flat if other != owner))
    for owner, text in flat:
        own = score(text, shown[owner])
        ranks["text to image"].append(sum(score(text, image) >= own for other, image in enumerate(shown) if other != owner))
    return {way: {f"R@{k}": share([rank < k for rank in found]) for k in (1, 5, 10)} for way, found in ranks.items()}


@pytest.mark.parametrize("karpathy", [False, True])
def test_captions_find_images_and_images_captions(karpathy, tmp_path):
    table = make_coco(tmp_path, karpathy)
    source = paper.suite_sources(tmp_path, ["coco"])[0]["coco"]
    chosen = [i for i in range(12) if i % 3 or not karpathy]
    folder = tmp_path / "coco" / ("val2014" if karpathy else "val2017")
    row = source.score(Known())
    slow = slow_recall([folder / f"{i:012d}.jpg" for i in chosen], [CAPTIONS[i][:5] for i in chosen])
    assert source.table == table and row["n"] == len(chosen) and row["captions"] == 5 * len(chosen)
    for way, found in slow.items(): assert row[way] == pytest.approx(found)
    assert len(source[0]) == 5 and len(source.queries()["text to image"][0].candidates) == len(chosen)


def test_flickr_and_caption_errors(tmp_path):
    table = make_flickr(tmp_path)
    sources, _ = paper.suite_sources(tmp_path, ["flickr30k"])
    assert sources["flickr30k"].count == 4 and sources["flickr30k"].remarks == ["4 images, in the paper 1,000"]
    found = json.loads(table.read_text())
    found["images"][2]["sentences"] = []
    write(table, found)
    with pytest.raises(ValueError, match="dataset_flickr30k.json' image 2: no captions"): paper.CaptionEval(table, tmp_path)
    found["images"][2] = {"split": "test"}
    write(table, found)
    with pytest.raises(ValueError, match="image 2: no field 'file_name'"): paper.CaptionEval(table, tmp_path)


def test_sugarcrepe(tmp_path):
    make_sugarcrepe(tmp_path)
    write(tmp_path / "sugarcrepe" / "swap_obj.json", {"0": {"filename": "000000000001.jpg", "caption": "same words", "negative_caption": "same words too"}})
    source = paper.SugarCrepeEval(tmp_path / "sugarcrepe", tmp_path / "coco" / "val2017")
    row, kinds = source.score(Known()), {}
    for kind in paper.SUGARCREPE:
        right = []
        for record in json.loads((tmp_path / "sugarcrepe" / f"{kind}.json").read_text()).values():
            image = Item(str(tmp_path / "coco" / "val2017" / record["filename"]))
            right.append(ranked_first(image, [Item(text=record["caption"]), Item(text=record["negative_caption"])]))
        kinds[kind] = share(right)
    assert {kind: found["accuracy"] for kind, found in row["kinds"].items()} == pytest.approx(kinds) and row["accuracy"] == pytest.approx(share(list(kinds.values())))
    write(tmp_path / "sugarcrepe" / "add_att.json", {"8": {"filename": "x.jpg", "caption": "a"}})
    with pytest.raises(ValueError, match="add_att.json' item 8: no field 'negative_caption'"): paper.SugarCrepeEval(tmp_path / "sugarcrepe", tmp_path / "coco" / "val2017")


def test_a_tie_is_a_mistake_unless_the_candidates_are_the_same(tmp_path):
    class Flat(Known):
        def embed_items(self, items, batch_size=256): return torch.ones(len(items), 4) / 2
    queries = [Query(Item(text="q"), (Item(text="a"), Item(text="b"))), Query(Item(text="q"), (Item(text="a"), Item(text="a")))]
    assert paper.rank_made(Flat(), queries[:1])["accuracy"] == 0 and paper.rank_made(Flat(), queries[:1])["ties"] == 1
    assert paper.rank_made(Flat(), queries[1:])["accuracy"] == 1
    assert [paper.rank_made(Flat(), [query])["chance"] for query in queries] == [0.5, 1.0]  # of the candidates that are left
    with pytest.raises(ValueError, match="nothing to rank"): paper.rank_made(Flat(), [])


def test_mmeb_text_and_scores(tmp_path):
    make_mmeb(tmp_path, ("ImageNet-1K", "OK-VQA", "RefCOCO"))
    expected = {"ImageNet-1K": "a photo of a answer ImageNet-1K 1", "OK-VQA": "answer OK-VQA 1, other", "RefCOCO": "answer RefCOCO 1, other"}
    for subset, text in expected.items():
        source = paper.MMEBEval(tmp_path / "mmeb", subset)
        query = source.queries()[subset][1]
        assert query.item.text == "what 1?" and query.candidates[0].text == text and len(source) == 5
        images = tmp_path / "mmeb" / "eval_images" / subset
        item = lambda i, j: Item(str(images / f"{(i + j) % 5}.jpg") if subset == "RefCOCO" else None, text.replace("1", str(i + j), 1) if subset != "ImageNet-1K"
                                 else f"a photo of a answer ImageNet-1K {i + j}")
        right = [ranked_first(Item(str(images / f"{i}.jpg"), f"what {i}?"), [item(i, j) for j in range(3)]) for i in range(5)]
        assert source.score(Known())["accuracy"] == pytest.approx(share(right))
    assert source[1][0].right.image.endswith("RefCOCO/1.jpg")


def test_mmeb_errors_name_file_and_row(tmp_path):
    make_mmeb(tmp_path, ("OK-VQA",))
    table = tmp_path / "mmeb" / "OK-VQA" / "test-00000-of-00001.parquet"
    (tmp_path / "mmeb" / "eval_images" / "OK-VQA" / "3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 5 images.*OK-VQA/3.jpg.*row 4"): paper.MMEBEval(tmp_path / "mmeb", "OK-VQA")
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    table.unlink()
    lines = lambda *rows: write(table.with_name("test.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    lines(row, row | {"tgt_text": ["a"]})
    with pytest.raises(ValueError, match="test.jsonl row 2: 1 texts and 2 images; expected"): paper.MMEBEval(tmp_path / "mmeb", "OK-VQA")
    lines(row, row | {"tgt_text": ["a", ""]})
    with pytest.raises(ValueError, match="test.jsonl row 2: .*Item needs"): paper.MMEBEval(tmp_path / "mmeb", "OK-VQA")
    lines({"qry_text": "q"})
    with pytest.raises(ValueError, match="test.jsonl.*line 1 has the columns qry_text; expected"): paper.MMEBEval(tmp_path / "mmeb", "OK-VQA")
    with pytest.raises(FileNotFoundError, match="GQA"): paper.MMEBEval(tmp_path / "mmeb", "GQA")


def test_mmeb_has_its_subsets_and_means():
    counts = {column: sum(own == column for own in paper.MMEB_SUBSETS.values()) for column in paper.COLUMNS[:4]}
    assert counts == {"Class.": 11, "VQA": 10, "Retr.": 12, "Ground.": 4}


# the suite

def test_the_suite_runs_everything_and_prints_the_nine_columns(tmp_path):
    root, said = make_everything(tmp_path / "data"), []
    results = paper.evaluate_suite(Known(), root, tmp_path / "out", model_id="chs20/FuseLIP-B-CC3M-MM", say=said.append)
    assert set(results["tasks"]) == set(paper.SUITE) and not results["missing"] and said == [f"{name}: done" for name in paper.SUITE]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    lines = paper.suite_table(results).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    subsets = [name for name, column in paper.MMEB_SUBSETS.items() if column == "VQA"]
    assert cells[2] == f"{100 * share([results['tasks'][f'mmeb/{name}']['accuracy'] for name in subsets]):.1f}*" and cells[9] == f"{100 * results['tasks']['tgit']['accuracy']:.1f}*"
    assert "| published, fuselip-b-cc3m | 23.3 | 17.5 | 15.0 | 82.4 | 18.1 | 55.8 | 68.1 | 70.8 | 94.3 |" in lines
    assert any(line.startswith("| coco, text to image* | R@1") for line in lines) and "- oi_pos: 5 queries, in the paper 2,546" in lines
    assert "- mmeb/ImageNet-1K and 36 more: 5 rows, in the paper 1,000" in lines


def test_an_item_is_embedded_once_and_an_interrupted_suite_goes_on(tmp_path, monkeypatch):
    root, tasks = make_everything(tmp_path / "data"), ["vg_crop", "oi_crop", "oi_pos", "coco", "sugarcrepe", "imagenet"]
    whole = Known()
    expected = paper.evaluate_suite(whole, root, tmp_path / "whole", tasks, say=lambda line: None)
    keys = [paper.item_key(item) for item in whole.seen]
    assert len(keys) == len(set(keys))  # COCO's images are SugarCrepe's, OI-Crop's are OI-Pos's
    make = paper.CachedModel.__init__
    monkeypatch.setattr(paper.CachedModel, "__init__", lambda self, model, folder: make(self, model, folder, part=5))  # many small parts
    stopped, said = Known(stop_after=70), []
    with pytest.raises(KeyboardInterrupt): paper.evaluate_suite(stopped, root, tmp_path / "out", tasks, say=said.append)
    finished = list(json.loads((tmp_path / "out" / "results.json").read_text())["tasks"])
    assert 0 < len(finished) < len(tasks) and said == [f"{name}: done" for name in finished]
    resumed, said = Known(), []
    results = paper.evaluate_suite(resumed, root, tmp_path / "out", tasks, say=said.append)
    assert [line for line in said if "before" in line] == [f"{name}: finished before" for name in finished]
    assert len(stopped.seen) > 0 and sorted(map(paper.item_key, stopped.seen + resumed.seen)) == sorted(keys)
    assert {name: row["accuracy"] for name, row in results["tasks"].items() if "accuracy" in row} == {
        name: row["accuracy"] for name, row in expected["tasks"].items() if "accuracy" in row}
    again = Known()
    assert paper.evaluate_suite(again, root, tmp_path / "out", tasks, say=lambda line: None) == results and not again.seen
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_changed_data_and_another_model_are_computed_again_and_said(tmp_path):
    root, out, said = tmp_path / "data", tmp_path / "out", []
    make_openimages(root)
    first = paper.evaluate_suite(Known(), root, out, ["oi_crop"], model_id="one", say=said.append)
    save(root / "openimages" / "test" / "1.jpg", "another picture")
    changed = Known()
    paper.evaluate_suite(changed, root, out, ["oi_crop"], model_id="one", say=said.append)
    assert said[1] == "oi_crop: its data changed since the last run, so it is run again" and 0 < len(changed.seen) < 24
    said.clear()
    other = Known(weight=2.0)
    results = paper.evaluate_suite(other, root, out, ["oi_crop"], model_id="two", say=said.append)
    assert "is of another model (one)" in said[0] and results["fingerprint"] != first["fingerprint"] and len(other.seen) >= 12
    assert json.loads((out / f"{first['fingerprint']}.json").read_text())["model"] == "one"
    back = Known()
    paper.evaluate_suite(back, root, out, ["oi_crop"], model_id="one", say=said.append)
    assert not back.seen  # its embeddings are still there


def test_a_result_whose_data_is_gone_leaves_the_table_and_comes_back_with_it(tmp_path):
    root, out, said = tmp_path / "data", tmp_path / "out", []
    make_openimages(root)
    first = paper.suite_table(paper.evaluate_suite(Known(), root, out, ["oi_crop"], say=said.append))
    image = root / "openimages" / "test" / "1.jpg"
    image.rename(tmp_path / "1.jpg")
    results = paper.evaluate_suite(Known(), root, out, ["oi_crop"], say=said.append)
    assert "oi_crop" in results["tasks"] and "test/1.jpg" in results["missing"]["oi_crop"]
    table = paper.suite_table(results)
    assert "| this run | – | – | – | – | – | – | – | – | – |" in table and table.count("- oi_crop:") == 1
    (tmp_path / "1.jpg").rename(image)
    model = Known()
    assert paper.suite_table(paper.evaluate_suite(model, root, out, ["oi_crop"], say=said.append)) == first and not model.seen


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": "x", "data": "shapes", "tasks": {}}'])
def test_results_of_something_else_are_left_alone(content, tmp_path):
    make_openimages(tmp_path / "data")
    path = write(tmp_path / "out" / "results.json", content)
    with pytest.raises(ValueError, match="results.json' does not hold the results of an evaluation; remove it, or"): paper.evaluate_suite(Known(), tmp_path / "data", tmp_path / "out", ["oi_crop"])
    assert path.read_text() == content


@pytest.mark.parametrize("fusion", ["sf", "mlf"])
def test_a_late_fusion_model_takes_the_suite(fusion, tmp_path):
    from fuselip_edu.baselines import LateFusion, LateFusionConfig, load_model
    from fuselip_edu.text import BPE
    torch.manual_seed(0)
    LateFusion(LateFusionConfig(fusion, image_layers=1, text_layers=1, width=16, fusion_layers=1, context=128), BPE.train(["what thing caption"], 260)).save_pretrained(tmp_path / f"siglip-s-{fusion}-cc3m")
    model, root, calls = load_model(tmp_path / f"siglip-s-{fusion}-cc3m"), make_everything(tmp_path / "data"), []
    run = lambda: paper.evaluate_suite(model, root, tmp_path / "out", model_id=str(tmp_path / f"siglip-s-{fusion}-cc3m"), say=lambda line: None)
    results = run()
    assert set(results["tasks"]) == set(paper.SUITE) and f"| published, siglip-s-{fusion}-cc3m |" in paper.suite_table(results)
    source = paper.OpenImagesEval(root / "openimages" / "oi-crop.json")
    right = [bool(scores[0] > scores[1:].max()) for scores in (model.embed_items([query.item, *query.candidates])[1:] @ model.embed_items([query.item])[0]
                                                               for (queries,) in [source.queries().values()] for query in queries)]
    assert results["tasks"]["oi_crop"]["accuracy"] == pytest.approx(share(right))
    model.embed_items = lambda items, batch_size=256: calls.append(items)
    assert run() == results and not calls


def test_a_broken_part_of_the_cache_is_embedded_again(tmp_path, capsys):
    items = [Item(text=f"text {i}") for i in range(4)]
    first = paper.CachedModel(Known(), tmp_path, part=2)
    vectors = first.embed_items([*items, items[0]])
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) == 2 and torch.equal(vectors[0], vectors[4])
    parts[0].write_bytes(parts[0].read_bytes()[:-7])
    model = Known()
    assert torch.equal(paper.CachedModel(model, tmp_path).embed_items(items), vectors[:4]) and len(model.seen) == 2
    assert "not whole" in capsys.readouterr().err


def test_item_keys_follow_content(tmp_path):
    path = save(tmp_path / "a.png", 1)
    tensor = load_image(str(path))
    key = paper.item_key
    assert key(Item(tensor)) == key(Item(tensor.clone())) != key(Item(tensor, "text")) and key(Item(tensor.flip(2))) != key(Item(tensor))
    assert key(Item(str(path))) == key(Item(str(path), "")) and key(Item(Image.open(path))) == key(Item(picture(1)))
    before = key(Item(str(path)))
    save(path, 2)
    assert key(Item(str(path))) != before and len({key(Item(text="ab")), key(Item(text="a")), before}) == 3


def test_a_hash_in_the_name_of_a_folder_is_not_the_mark_of_a_member(tmp_path):
    folder = tmp_path / "set #2"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive: archive.writestr("1.png", b"x")
    found = paper.file_state(folder / "a.zip#1.png")
    assert found[0] == str(folder / "a.zip#1.png") and found[1:] == paper.file_state(folder / "a.zip")[1:]


def test_what_is_missing_is_said_exactly(tmp_path):
    (tmp_path / "data" / "vg").mkdir(parents=True)
    make_mmeb(tmp_path / "other", ("OK-VQA",))
    results = paper.evaluate_suite(Known(), tmp_path / "data", tmp_path / "out", say=lambda line: None)
    missing = results["missing"]
    assert not results["tasks"] and list(missing) == ["tgit", "vg_crop", "oi_crop", "oi_pos", "imagenet", "coco", "flickr30k", "sugarcrepe", "mmeb"]
    for name, parts in {"tgit": ["val.csv", "cc3m-validation-*.tar"], "vg_crop": ["region_descriptions_test.json"], "oi_pos": ["oi-crop-positional-v3.json"],
                        "imagenet": ["val"], "coco": ["captions_val2017.json", "dataset_coco.json"], "flickr30k": ["dataset_flickr30k.json"], "sugarcrepe": ["val2017"]}.items():
        assert missing[name].startswith("missing: ") and all(part in missing[name] for part in parts)
    table = paper.suite_table(results, "runs/mine")
    assert "| this run | – | – |" in table and "No row of the paper belongs to the model runs/mine" in table and "- mmeb: missing" in table
    sources, missing = paper.suite_sources(tmp_path / "other")
    assert list(sources) == ["mmeb/OK-VQA"] and "test-*.parquet" in missing["mmeb/GQA"]
    with pytest.raises(ValueError, match="unknown task 'vgg'"): paper.suite_sources(tmp_path, ["vgg"])
    with pytest.raises(FileNotFoundError, match="no folder"): paper.suite_sources(tmp_path / "nowhere")


def test_a_broken_file_stops_the_suite_before_anything_is_embedded(tmp_path):
    root, model = tmp_path, Known()
    make_openimages(root)
    write(root / "openimages" / "oi-crop-positional-v3.json", "{")
    with pytest.raises(ValueError, match="oi-crop-positional-v3.json' is not JSON"): paper.evaluate_suite(model, root, root / "out", ["oi_crop", "oi_pos"])
    assert not model.seen


def test_published_rows():
    assert len(evaluate.PUBLISHED) == 12 and all(list(row) == list(paper.COLUMNS) for row in evaluate.PUBLISHED.values())
    for model_id, name in {"chs20/FuseLIP-S-CC3M-MM": "fuselip-s-cc3m", "FuseLIP-B-CC12M-MM": "fuselip-b-cc12m", "runs/siglip-b-mlf-cc12m/model": "siglip-b-mlf-cc12m",
                           "siglip-s-sf-cc3m": "siglip-s-sf-cc3m"}.items():
        assert paper.published_row(model_id) == (name, evaluate.PUBLISHED[name])
    for model_id in ("", "runs/demo", "my-fuselip-s-cc3m", "fuselip-s-cc3m-ablation", "siglip-s-cc3m"): assert paper.published_row(model_id) is None
    assert evaluate.PUBLISHED["fuselip-b-cc3m"]["TGIT"] == 94.3 and evaluate.PUBLISHED["siglip-s-mlf-cc12m"]["OI-Crop"] == 72.2
