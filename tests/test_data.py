"Every data set: a folder that is missing, partial, complete or broken; the table in data/README.md; the download; questions written by a language model."
import csv
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fuselip_edu import data
from fuselip_edu.data import SETS, check, data_list, get, in_runs, language_model, make_vqa, numbered_gaps, parse_vqa, report_text, vqa_prompt
from fuselip_edu.sources import open_source


def jpeg(value=0):
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), (value % 256, 90, 30)).save(picture, "JPEG")
    return picture.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())


def shard(path, keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for ending, content in (("jpg", jpeg(key)), ("txt", f"a picture of {key} red things".encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key:09}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def parquet(path, rows, pictures=()):
    import datasets
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for name in pictures: table = table.cast_column(name, datasets.Image())
    table.to_parquet(path)


def table(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file: csv.writer(file).writerows([header, *rows])


# Each set in its real format, two or so of each kind of file: SETS is shortened to that by the fixture below.

def make_cc3m(root):
    for i in range(2): shard(root / f"cc3m-train-{i:04}.tar", [2 * i, 2 * i + 1])
    for i in range(2): shard(root / f"cc3m-validation-{i:04}.tar", [i])


def make_cc12m(root):
    for i in range(2): shard(root / f"cc12m-train-{i:04}.tar", [2 * i, 2 * i + 1])


def make_cc3m_vqa(root):
    for i in range(2): write(root / f"train/{i}.jpg", jpeg(i))
    table(root / "cc3m_vqa_train_v2.csv", ("path", "question", "answer"), *[(f"train/{i}.jpg", "Where is it?", "on the left") for i in range(2)])


def make_hq_edit(root):
    for i in range(2):
        parquet(root / f"data/train-{i:05}-of-00002.parquet", [{"input_image": {"bytes": jpeg(i), "path": None}, "output_image": {"bytes": jpeg(i + 9), "path": None},
                "input": "a cup", "edit": "fill it", "inverse_edit": "empty it", "output": "a full cup"}], ("input_image", "output_image"))


def make_vg(root):
    for i in (1, 2): write(root / f"VG_100K/{i}.jpg", jpeg(i))
    box = {"x": 1, "y": 1, "width": 36, "height": 36}
    write(root / "region_descriptions.json", [{"id": i, "regions": [{"region_id": i, "image_id": i, "phrase": "a red wall", **box}]} for i in (1, 2)])
    write(root / "question_answers.json", [{"id": i, "qas": [{"qa_id": i, "image_id": i, "question": "What colour?", "answer": "Red."}]} for i in (1, 2)])


def make_mmeb_train(root):
    for name in SETS["mmeb-train"].parts[0].files:
        name = name.split("/")[0]
        write(root / f"images/{name}/Train/0.jpg", jpeg())
        parquet(root / name / "original-00000-of-00001.parquet", [{"qry": "<|image_1|>\nRepresent the given image for classification", "qry_image_path": f"images/{name}/Train/0.jpg",
                "pos_text": "a cup", "pos_image_path": ""}])


def make_own(root):
    write(root / "1.jpg", jpeg())
    table(root / "mine.csv", ("image", "text"), ("1.jpg", "a red wall"))


def make_openimages(root):
    for i in range(6): write(root / f"test/{i}.jpg", jpeg(i))
    box = {"XMin": 1, "YMin": 1, "XMax": 30, "YMax": 30}
    record = {"query_img": "0.jpg", "query_target": "Cup", "retrieval_samples": [{"ImageID": f"{i}.jpg", "bbox": box} for i in range(3)]}
    write(root / "oi-crop.json", {"meta": {"subset": "test"}, "data": [record, record]})
    write(root / "oi-crop-positional-v3.json", {"meta": {"subset": "test"}, "data": {"Cup": [record | {"query_target": "The Cup on the left"}]}})


def make_imagenet(root):
    for name in ("n1", "n2"): write(root / f"val/{name}/0.JPEG", jpeg())
    write(root / "classnames.json", {"n1": "tench", "n2": "goldfish"})


def make_coco(root):
    for i in (1, 2): write(root / f"val2017/{i:012}.jpg", jpeg(i))
    write(root / "annotations/captions_val2017.json", {"images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in (1, 2)],
          "annotations": [{"id": 10 * i + j, "image_id": i, "caption": f"caption {j} of picture {i}"} for i in (1, 2) for j in range(5)]})


def make_flickr30k(root):
    for i in (1, 2): write(root / f"flickr30k-images/{i}.jpg", jpeg(i))
    write(root / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": [{"filename": f"{i}.jpg", "imgid": i, "split": "test",
          "sentences": [{"raw": f"caption {j} of picture {i}", "sentid": 10 * i + j} for j in range(5)]} for i in (1, 2)]})


def make_sugarcrepe(root):
    for i in (1, 2): write(root.parent / f"coco/val2017/{i:012}.jpg", jpeg(i))
    for name in SETS["sugarcrepe"].parts[0].files:
        write(root / name, {str(i): {"filename": f"{i + 1:012}.jpg", "caption": "a red wall", "negative_caption": "a blue wall"} for i in range(2)})


def make_mmeb_eval(root):
    for name in SETS["mmeb-eval"].parts[0].files:
        name = name.split("/")[0]
        for i in range(2): write(root / f"eval_images/{name}/{i}.jpg", jpeg(i))
        parquet(root / name / "test-00000-of-00001.parquet", [{"qry_text": "<|image_1|> Represent the given image for classification", "qry_img_path": f"{name}/{i}.jpg",
                "tgt_text": ["cup", "table"], "tgt_img_path": ["", ""]} for i in range(2)])


# Files taken away, and what the report must then say; files broken, and what it must say (file and record).

def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


CASES = {  # name: (make, (file to take away, words of the report), (file to break, how, words of the report))
    "cc3m": (make_cc3m, ("cc3m-train-0001.tar", "1 of 2 training shards: cc3m-train-0001.tar"), ("cc3m-train-0001.tar", cut, "cc3m-train-0001.tar' after member")),
    "cc12m": (make_cc12m, ("cc12m-train-0000.tar", "1 of 2 training shards: cc12m-train-0000.tar"), ("cc12m-train-0001.tar", cut, "cc12m-train-0001.tar' after member")),
    "cc3m-vqa": (make_cc3m_vqa, ("train/1.jpg", "line 3: no image file at"), ("cc3m_vqa_train_v2.csv", lambda path: write(path, "path,question\na,b\n"), "columns path, question")),
    "hq-edit": (make_hq_edit, ("data/train-00001-of-00002.parquet", "data/train-00001-of-00002.parquet"), ("data/train-00001-of-00002.parquet", cut, "train-00001-of-00002.parquet")),
    "vg": (make_vg, ("VG_100K/2.jpg", "1 of 2 pictures: VG_100K/*.jpg"), ("question_answers.json", cut, "question_answers.json")),
    "mmeb-train": (make_mmeb_train, ("images/N24News/Train/0.jpg", "N24News/original-00000-of-00001.parquet'"),
                   ("N24News/original-00000-of-00001.parquet", cut, "N24News/original-00000-of-00001.parquet")),
    "own": (make_own, ("1.jpg", "line 2: no image file at"), ("mine.csv", lambda path: write(path, "image,words\n1.jpg,wall\n"), "columns image, words")),
    "openimages": (make_openimages, ("test/2.jpg", "2.jpg"), ("oi-crop.json", cut, "oi-crop.json")),
    "imagenet": (make_imagenet, ("val/n2/0.JPEG", "1 of 2 pictures in class folders"), ("val/n2/0.JPEG", cut, "n2/0.JPEG")),
    "coco": (make_coco, ("val2017/000000000002.jpg", "1 of 2 pictures: val2017/*.jpg"), ("annotations/captions_val2017.json", cut, "captions_val2017.json")),
    "flickr30k": (make_flickr30k, ("flickr30k-images/2.jpg", "1 of 2 pictures: flickr30k-images/*.jpg"), ("dataset_flickr30k.json", cut, "dataset_flickr30k.json")),
    "sugarcrepe": (make_sugarcrepe, ("swap_att.json", "1 of 7 lists: swap_att.json"), ("swap_att.json", cut, "swap_att.json")),
    "mmeb-eval": (make_mmeb_eval, ("eval_images/CIFAR-100/1.jpg", "1 of the 2 images"), ("CIFAR-100/test-00000-of-00001.parquet", cut, "CIFAR-100/test-00000-of-00001.parquet")),
}


@pytest.fixture(autouse=True)
def short_sets(monkeypatch):
    "The real sets with at most two of their files: the names, the formats and the readers stay."
    for name, row in list(SETS.items()):
        parts = tuple(replace(part, files=part.files[:2] if len(part.files) > 7 else part.files, count=min(part.count, 2)) for part in row.parts)
        monkeypatch.setitem(SETS, name, replace(row, parts=parts))


def test_every_set_has_a_case(): assert set(CASES) | {"shapes"} == set(SETS)


@pytest.mark.parametrize("name", CASES)
def test_missing(name, tmp_path):
    report = check(name, tmp_path / "nothing")
    assert report.state == "missing" and not report.broken and not report.records
    assert len(report.missing) == len(SETS[name].parts)
    text = report_text(report)
    for part in SETS[name].parts:
        assert part.what in text and part.files[0] in text and part.origin in text
    assert SETS[name].licence in text and SETS[name].url in text and (f"data get {name}" if SETS[name].hub else SETS[name].steps) in text


@pytest.mark.parametrize("name", CASES)
def test_complete(name, tmp_path):
    CASES[name][0](tmp_path / "set")
    report = check(name, tmp_path / "set")
    assert (report.state, report.missing, report.broken) == ("complete", [], [])
    assert all(here == all_ > 0 for here, all_ in report.found.values())
    assert set(report.records) == {reader.partition(":{")[0] for reader in SETS[name].readers} and all(report.records.values())
    assert "missing" not in report_text(report)


@pytest.mark.parametrize("name", CASES)
def test_partial(name, tmp_path):
    make, (file, words), _ = CASES[name]
    make(tmp_path / "set")
    (tmp_path / "set" / file).unlink()
    report = check(name, tmp_path / "set")
    assert report.state == "partial" and not report.broken
    assert any(words in text for text in report.missing), report.missing


@pytest.mark.parametrize("name", CASES)
def test_broken(name, tmp_path):
    make, _, (file, spoil, words) = CASES[name]
    make(tmp_path / "set")
    spoil(tmp_path / "set" / file)
    report = check(name, tmp_path / "set")
    assert report.state == "broken" and any(words in text for text in report.broken), report.broken


def test_a_model_that_is_none_leaves_no_journal(tmp_path):
    make_cc3m(tmp_path / "set")
    with pytest.raises(OSError, match="no-model"): make_vqa(f"cc3m:{tmp_path / 'set'}", str(tmp_path / "no-model"), tmp_path / "v.csv")
    assert not (tmp_path / "v.jsonl").exists()


def test_files_that_are_missing_are_all_named():
    name = lambda number: f"cc3m-train-{number:04}.tar"
    assert in_runs([name(number) for number in (3, 77, 200, 201, 202, 401, 500)]) == [name(3), name(77), f"{name(200)} to {name(202)}", name(401), name(500)]
    assert in_runs(["val.csv", "a-9.tar", "a-10.tar", "b-11.tar"]) == ["val.csv", "a-9.tar to a-10.tar", "b-11.tar"] and in_runs([]) == []


def test_a_broken_picture_is_named(tmp_path):
    make_vg(tmp_path)
    write(tmp_path / "VG_100K/2.jpg", b"not a picture")
    report = check("vg", tmp_path)
    assert report.state == "broken" and "VG_100K/2.jpg" in report.broken[0]


def test_a_table_itself_can_be_checked(tmp_path):
    make_own(tmp_path)
    table(tmp_path / "another.csv", ("image", "text"), ("gone.jpg", "a red wall"))
    assert check("own", tmp_path / "mine.csv").state == "complete" and check("own", tmp_path / "another.csv").state == "partial"


def test_shapes_need_nothing(): assert check("shapes").state == "complete"


def test_an_extracted_cc3m_is_as_good_as_shards(tmp_path):
    for name in ("train", "val"):
        for i in range(2): write(tmp_path / f"{name}/{i}.jpg", jpeg(i))
        table(tmp_path / f"{name}.csv", ("path", "caption"), *[(f"{name}/{i}.jpg", "a red wall") for i in range(2)])
    assert check("cc3m", tmp_path).state == "complete"


def test_few_records_are_looked_at(tmp_path, monkeypatch):
    class Long:
        def __len__(self): return 1000
        def __getitem__(self, index):
            looked.append(index)
            return []
    looked = []
    monkeypatch.setattr(data, "open_source", lambda name, **_: Long())
    make_own(tmp_path)
    assert check("own", tmp_path).records == {"csv": 1000} and looked == [0, 249, 499, 749, 999]


def test_unknown_names_and_gaps():
    with pytest.raises(ValueError, match="no data set is called 'cc4m'; the names are cc3m"): check("cc4m")
    assert numbered_gaps(["a-00000-of-00002.parquet", "b-00000-of-00001.parquet", "plain.parquet"]) == ["a-00001-of-00002.parquet"]


def test_the_page_of_the_data_folder_holds_the_table(root, monkeypatch):
    monkeypatch.undo()
    page = (root / "data" / "README.md").read_text(encoding="utf-8")
    assert data_list() in page, "put what `fuselip-edu data list` prints into data/README.md"
    assert "`cc3m-train-0000.tar` … `cc3m-train-0575.tar`" in page
    for row in SETS.values():
        assert row.licence and row.size and (row.hub or row.steps) and (not row.hub or row.wanted)
        assert all(what in {part.what for part in row.parts} for needs in row.readers.values() for what in needs)


# The hub, made of a folder

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub that holds the files of `hub.files`, and a client that may break."
    import huggingface_hub
    state = SimpleNamespace(files={}, calls=[], breaks=0)

    def dataset_info(self, repo, files_metadata=False):
        if state.breaks > 1: raise OSError("no route to host")
        assert files_metadata
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name, size=len(content)) for name, content in state.files.items()])

    def snapshot_download(repo_id, repo_type, revision, allow_patterns, local_dir):
        import fnmatch
        state.calls.append((repo_id, repo_type, revision))
        for number, (name, content) in enumerate(state.files.items()):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns): continue
            if state.breaks and number: raise OSError("connection reset")
            write(Path(local_dir) / name, content)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_get_says_the_size_first_and_goes_on_after_a_break(hub, tmp_path, capsys):
    make_cc12m(tmp_path / "there")
    hub.files = {path.name: path.read_bytes() for path in sorted((tmp_path / "there").glob("*.tar"))} | {"README.md": b"a card"}
    size, hub.breaks = len(hub.files["cc12m-train-0000.tar"]), 1
    with pytest.raises(ConnectionError, match="connection reset.*give the same command again"): get("cc12m", tmp_path / "here")
    assert f"2 of 2 files from pixparse/cc12m-wds to {tmp_path / 'here'}, {2 * size / 1000:.1f} kB" in capsys.readouterr().err
    hub.breaks = 0
    assert get("cc12m", tmp_path / "here") == tmp_path / "here" and not (tmp_path / "here" / "README.md").exists()
    said = capsys.readouterr().err
    assert "1 of 2 files" in said and f"{size / 1000:.1f} kB" in said and "licence" in said and hub.calls == [("pixparse/cc12m-wds", "dataset", "abc")] * 2
    assert check("cc12m", tmp_path / "here").state == "complete"
    get("cc12m", tmp_path / "here")
    assert len(hub.calls) == 2 and "0 of 2 files" in capsys.readouterr().err


def test_get_unpacks_archives_and_again_after_a_break(hub, tmp_path):
    make_mmeb_train(tmp_path / "there")
    names = [name.split("/")[0] for name in SETS["mmeb-train"].parts[0].files]
    for name in names:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive: archive.write(tmp_path / "there/images" / name / "Train/0.jpg", f"{name}/Train/0.jpg")
        hub.files |= {f"images_zip/{name}.zip": packed.getvalue(), f"{name}/diverse_instruction-00000-of-00001.parquet": b"",
                      f"{name}/original-00000-of-00001.parquet": (tmp_path / "there" / name / "original-00000-of-00001.parquet").read_bytes()}
    get("mmeb-train", tmp_path / "here")
    assert check("mmeb-train", tmp_path / "here").state == "complete" and not list((tmp_path / "here").glob("*/diverse*"))
    picture = tmp_path / "here/images" / names[0] / "Train/0.jpg"
    whole = picture.read_bytes()
    cut(picture)
    get("mmeb-train", tmp_path / "here")
    assert picture.read_bytes() == whole and len(hub.calls) == 1
    hub.files[f"images_zip/{names[0]}.zip"] = b"no archive"
    with pytest.raises(ValueError, match=f"{names[0]}.zip' is not a whole ZIP archive"): get("mmeb-train", tmp_path / "here")


def packed(path, name, content=b"red, green, blue; " * 200):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr(name, content)
    return path


def test_a_damaged_byte_inside_an_archive_names_the_archive(tmp_path):
    path = packed(tmp_path / "a.zip", "colours.txt")
    whole = bytearray(path.read_bytes())
    whole[30 + len("colours.txt")] ^= 0xFF  # the first byte of what is compressed
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="a.zip' is not a whole ZIP archive .*remove it and get it again"): data.unpack(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["../colours.txt", "../../colours.txt", "/colours.txt"])
def test_a_member_of_an_archive_lands_inside_its_folder(name, tmp_path):
    data.unpack(packed(tmp_path / "a.zip", name), tmp_path / "deep" / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "a.zip", tmp_path / "deep" / "out" / "colours.txt"]


def test_get_looks_at_the_disk_the_connection_and_the_licence(hub, tmp_path, monkeypatch):
    hub.files = {"data/train-00000-of-00001.parquet": b"x" * 5000}
    monkeypatch.setattr(data, "free_space", lambda folder: 4000)
    with pytest.raises(OSError, match=r"hq-edit needs 5.0 kB in .*, whose disk has 4.0 kB"): get("hq-edit", tmp_path)
    assert not hub.calls and not list(tmp_path.iterdir())
    hub.breaks = 2
    with pytest.raises(ConnectionError, match="no route to host"): get("hq-edit", tmp_path)
    for name, row in SETS.items():
        if row.hub: continue
        with pytest.raises(ValueError, match=f"{name} is not downloaded automatically: ") as error: get(name, tmp_path)
        assert row.licence in str(error.value) and row.steps in str(error.value)


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path): assert data.free_space(tmp_path / "a" / "b") > 0


# Questions written by a language model

@pytest.mark.parametrize("reply, expected", [
    ("Q: Where is it?\nA: on the left", ("Where is it?", "on the left")),
    ("\n Q: Where is it? \n\n A: on the left.\n", ("Where is it?", "on the left")),
    ("Q: Where is it?\nA: left", "two to ten"),
    ("Q: Where is it?\nA: " + "so " * 11, "two to ten"),
    ("Q: Where is it\nA: on the left", "question mark"),
    ("Where is it?\non the left", "one Q: line"),
    ("Q: Where is it?\nA: on the left\nI hope this helps", "one Q: line"),
    ("A: on the left\nQ: Where is it?", "one Q: line"),
    ("Q: What is in the caption?\nA: a red wall", "caption"),
    ("", "one Q: line")])
def test_replies_are_read_strictly(reply, expected):
    if isinstance(expected, tuple): assert parse_vqa(reply) == expected
    else:
        with pytest.raises(ValueError, match=expected): parse_vqa(reply)


def test_the_prompt_shows_only_the_caption_of_this_item():
    prompt = vqa_prompt("a cat\n on a  sofa")
    assert prompt.endswith("Caption: a cat on a sofa") and prompt.count("Q: ") == 3
    for example in prompt.split("\n\nCaption: ")[1:-1]: parse_vqa(example.partition("\n")[2])


def test_a_caption_may_hold_any_letter(tmp_path):
    write(tmp_path / "0.jpg", jpeg())
    table(tmp_path / "train.csv", ("path", "caption"), ("0.jpg", "a red\u2028 wall, \x85 «naïve»"))
    for _ in range(2): make_vqa(f"cc3m:{tmp_path}", lambda prompts, seed: ["Q: Où\u2028 is it?\nA: «in\x85 the» corner"], tmp_path / "vqa.csv")
    assert open_source(f"cc3m-vqa:{tmp_path / 'vqa.csv'}")[0][0].right.text == "«in\x85 the» corner"


def stub(prompts, seed):
    captions = [prompt.rpartition("Caption: ")[2] for prompt in prompts]
    return [f"Q: What is number {seed}?\nA: {caption}" if "3 red" not in caption else "no" for caption in captions]


def test_questions_from_shards_and_from_a_table(tmp_path):
    make_cc12m(tmp_path)
    counts = make_vqa(f"cc12m:{tmp_path}", stub, tmp_path / "out" / "vqa.csv", batch_size=3)
    assert counts == {"captions": 4, "questions": 3, "not one Q: line and one A: line": 1}
    source = open_source(f"cc3m-vqa:{tmp_path / 'out' / 'vqa.csv'}")
    assert [pair.right.text for i in range(3) for pair in source[i]] == [f"a picture of {i} red things" for i in range(3)]
    assert Path(source[1][0].left.image).read_bytes() == jpeg(1) and not list((tmp_path / "out").glob(".*"))
    for i in range(2): write(tmp_path / f"table/train/{i}.jpg", jpeg(i))
    table(tmp_path / "table/train.csv", ("path", "caption"), *[(f"train/{i}.jpg", f"a picture of {i} red things") for i in range(2)])
    make_vqa(f"cc3m:{tmp_path / 'table'}", stub, tmp_path / "table/vqa.csv")
    assert open_source(f"cc3m-vqa:{tmp_path / 'table/vqa.csv'}")[1][0].left.image == str(tmp_path / "table/train/1.jpg")
    with pytest.raises(RuntimeError, match="is not below"): make_vqa(f"cc3m:{tmp_path / 'table'}", stub, tmp_path / "elsewhere/vqa.csv")


def test_a_record_that_cannot_be_read_is_counted(tmp_path):
    for i in (0, 2): write(tmp_path / f"{i}.jpg", jpeg(i))
    table(tmp_path / "train.csv", ("path", "caption"), *[(f"{i}.jpg", "" if i == 2 else "a red wall") for i in range(3)])
    assert make_vqa(f"cc3m:{tmp_path}", stub, tmp_path / "vqa.csv") == {"captions": 3, "questions": 1, "its record cannot be read": 2}
    journal = (tmp_path / "vqa.jsonl").read_text()
    assert "train.csv' line 3: no image file at" in journal and "train.csv' line 4 has no text" in journal


def test_an_interrupted_run_ends_with_the_same_table(tmp_path):
    make_cc12m(tmp_path)
    make_vqa(f"cc12m:{tmp_path}", stub, tmp_path / "a/vqa.csv", batch_size=2, seed=5)
    asked = []

    def mortal(prompts, seed):
        asked.append(seed)
        if len(asked) == 2: raise KeyboardInterrupt
        return stub(prompts, seed)
    with pytest.raises(KeyboardInterrupt): make_vqa(f"cc12m:{tmp_path}", mortal, tmp_path / "b/vqa.csv", batch_size=2, seed=5)
    journal = tmp_path / "b/vqa.jsonl"
    assert not (tmp_path / "b/vqa.csv").exists() and len(journal.read_text().splitlines()) == 3
    with open(journal, "a") as file: file.write('{"item": 2, "question": "Wh')
    make_vqa(f"cc12m:{tmp_path}", mortal, tmp_path / "b/vqa.csv", batch_size=2, seed=5)
    assert asked == [5, 7, 7]
    for name in ("vqa.csv", "vqa.jsonl"): assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    make_vqa(f"cc12m:{tmp_path}", mortal, tmp_path / "b/vqa.csv", batch_size=2, seed=5)
    assert asked == [5, 7, 7]
    with pytest.raises(ValueError, match="seed 5 instead of 6"): make_vqa(f"cc12m:{tmp_path}", mortal, tmp_path / "b/vqa.csv", batch_size=2, seed=6)
    journal.write_text("no journal\n")
    with pytest.raises(ValueError, match="not a journal"): make_vqa(f"cc12m:{tmp_path}", mortal, tmp_path / "b/vqa.csv", batch_size=2, seed=5)


def test_a_model_that_never_obeys_is_stopped(tmp_path):
    for i in range(300): write(tmp_path / f"{i}.jpg", b"")
    table(tmp_path / "train.csv", ("path", "caption"), *[(f"{i}.jpg", "a red wall") for i in range(300)])
    asked = []
    with pytest.raises(RuntimeError, match="of the first 256 replies 0 could be used"):
        make_vqa(f"cc3m:{tmp_path}", lambda prompts, seed: asked.append(seed) or ["no"] * len(prompts), tmp_path / "vqa.csv", batch_size=64)
    assert asked == [0, 64, 128, 192] and not (tmp_path / "vqa.csv").exists()


def test_what_cannot_be_written_or_asked_is_one_sentence(tmp_path):
    make_cc3m(tmp_path)
    with pytest.raises(ValueError, match="a.txt' does not end in .csv; give"): make_vqa(f"cc3m:{tmp_path}", stub, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="holds no captions; give a source"): make_vqa([], stub, tmp_path / "a.csv")


def test_captions_must_be_captions(tmp_path):
    make_cc3m_vqa(tmp_path)
    with pytest.raises(TypeError, match="item 0 of the captions is not one picture"): make_vqa(f"cc3m-vqa:{tmp_path / 'cc3m_vqa_train_v2.csv'}", stub, tmp_path / "vqa.csv")
    with pytest.raises(ValueError, match="does not end in .csv"): make_vqa(f"cc3m-vqa:{tmp_path / 'cc3m_vqa_train_v2.csv'}", stub, tmp_path / "vqa.json")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    "A language model with random weights, and a tokenizer of single bytes."
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("model")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  eos_token_id=256, bos_token_id=None, max_position_embeddings=2048)).save_pretrained(folder)
    return folder


def test_a_language_model_replies_with_a_seed(tiny_model):
    generate = language_model(str(tiny_model), "cpu", new_tokens=8)
    prompts = [vqa_prompt("a red wall"), vqa_prompt("a much longer caption of a red wall in the sun")]
    first = generate(prompts, 3)
    assert len(first) == 2 and all(isinstance(reply, str) and reply and "Caption" not in reply for reply in first)
    assert generate(prompts, 3) == first != generate(prompts, 4)


def test_a_model_that_babbles_leaves_a_journal_that_can_be_resumed(tiny_model, tmp_path):
    make_cc12m(tmp_path)
    with pytest.raises(RuntimeError, match="of the first 4 replies 0 could be used"): make_vqa(f"cc12m:{tmp_path}", str(tiny_model), tmp_path / "a.csv", batch_size=2, device="cpu")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 5 and not (tmp_path / "a.csv").exists()
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    with pytest.raises(RuntimeError, match="of the first 4 replies 0"): make_vqa(f"cc12m:{tmp_path}", str(tiny_model), tmp_path / "b.csv", batch_size=2, device="cpu")
    assert {line["item"]: line for line in map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines()[1:])} == {line["item"]: line for line in map(json.loads, lines[1:])}


def test_models_that_cannot_be_used(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="no language model can be loaded from .*nowhere"): language_model(str(tmp_path / "nowhere"), "cpu")
    import transformers
    plain = transformers.AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja": (tmp_path / file.name).write_bytes(file.read_bytes())
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"): language_model(str(tmp_path), "cpu")
    (tmp_path / "tokenizer_config.json").write_text("{")  # its error wants other arguments than a message
    with pytest.raises(ValueError, match="no language model can be loaded from .*; give a hub id, or a folder"): language_model(str(tmp_path), "cpu")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"fuselip_edu\[vqa\]"): language_model(str(tiny_model), "cpu")
