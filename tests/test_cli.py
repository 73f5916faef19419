"The commands as a user runs them, on a small CSV, and every wrong input."
import json
import os
import subprocess
import sys
import time

import pytest
from PIL import Image
from safetensors.torch import load_file

from fuselip_edu.cli import main

TRAIN = ["train", "--preset", "tiny", "--encoder.width", "32", "--encoder.layers", "1", "--train.steps", "4", "--train.batch-size", "4",
         "--text-vocab", "300", "--train.device", "cpu"]


def command(*words, root, limit=None):
    return subprocess.run([sys.executable, "-m", "fuselip_edu", *map(str, words)], capture_output=True, text=True, cwd=root, stdin=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=limit, timeout=120)


def failure(*words, root, limit=None):
    "The one line that a wrong input gets."
    done = command(*words, root=root, limit=limit)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fuselip-edu: error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csv")
    rows = ["image,text,instruction,target_image,group"]
    for index, colour in enumerate(("red", "green", "blue", "yellow", "purple", "cyan")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
        rows += [f"{colour}.png,a {colour} card,,,{index}", f"{colour}.png,{colour},what colour is it?,,{index}", f"{colour}.png,,keep it,{colour}.png,"]
    path = folder / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def run(csv, root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = command(*TRAIN, "--data", f"csv:{csv}", "--run", folder, root=root)
    assert done.returncode == 0, done.stderr
    return folder


def test_help_names_every_command(root):
    done = command("--help", root=root)
    assert done.returncode == 0
    for name in ("demo", "train", "evaluate", "embed", "search", "train-tokenizer", "data", "make-vqa", "--suite paper"): assert name in done.stdout


def test_train_writes_a_run(run):
    assert json.loads((run / "config.json").read_text())["encoder"]["width"] == 32
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 1
    assert {path.name for path in (run / "model").iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_evaluate_a_csv(run, csv, root, tmp_path):
    out = tmp_path / "results.json"
    done = command("evaluate", "--model", run, "--data", f"csv:{csv}", "--out", out, root=root)
    assert done.returncode == 0, done.stderr
    tasks = json.loads(out.read_text())["tasks"]
    for row in tasks.values(): assert 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1 and row["n"] > 0


def test_embed(run, csv, root, tmp_path):
    out = tmp_path / "vectors.safetensors"
    done = command("embed", "--model", run, "--images", csv.parent / "red.png", "-", "--texts", "-", "a red card", "--out", out, root=root)
    assert done.returncode == 0, done.stderr
    vectors = load_file(out)["embeddings"]
    assert vectors.shape == (2, 32) and (vectors.norm(dim=1) - 1).abs().max() < 1e-5


def test_from_python(run):
    from fuselip_edu import FuseLIP
    assert FuseLIP.from_pretrained(run).encode_text(["a red card"]).shape == (1, 32)


def test_a_run_can_be_resumed_and_not_overwritten(run, csv, root):
    same = [*TRAIN, "--data", f"csv:{csv}", "--run", run]
    assert "--resume" in failure(*same, root=root)
    assert command(*same, "--resume", root=root).returncode == 0
    assert "train.lr" in failure(*same, "--resume", "--train.lr", "0.5", root=root)
    assert command(*same, "--resume", "--max-bad", "2%", "--train.accumulation", "2", root=root).returncode == 0  # how it is done, not what it is


def test_a_run_does_not_go_on_with_other_data_of_the_same_name(csv, root, tmp_path):
    table = csv.parent / "grows.csv"
    table.write_text(csv.read_text())
    words = *TRAIN, "--data", f"csv:{table}", "--run", tmp_path / "run"
    assert command(*words, root=root).returncode == 0 and command(*words, "--resume", root=root).returncode == 0
    table.write_text(csv.read_text().replace("a red", "a crimson", 1))
    assert "begun with other data" in failure(*words, "--resume", root=root)


def test_a_truncated_image_is_named_and_nothing_is_written(csv, root, tmp_path):
    whole = (csv.parent / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "one.csv").write_text("image,text\n" + "cut.png,cut\n" * 8)
    assert "cut.png" in failure(*TRAIN, "--data", f"csv:{tmp_path / 'one.csv'}", "--run", tmp_path / "run", root=root)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, expected", [
    ("image,text\nno.png,a\n", "no.png"),
    ("picture,words\na,b\n", "picture"),
    ("image,text\n,\n", "line 2"),
    ("image,text\n", "no rows"),
])
def test_a_wrong_csv(content, expected, root, tmp_path):
    (tmp_path / "wrong.csv").write_text(content)
    assert expected in failure(*TRAIN, "--data", f"csv:{tmp_path / 'wrong.csv'}", "--run", tmp_path / "run", root=root)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, expected", [
    (["fly"], "fly"),
    (["train", "--preset", "huge"], "huge"),
    (["train", "--train.speed", "3"], "--train.speed"),
    (["train", "--data", "nonsense"], "nonsense"),
    (["train", "--train.lr", "fast"], "fast"),
    (["evaluate", "--model", "no/such/folder"], "no/such/folder"),
    (["train", "--tokenizer", "no/such/folder", "--run", "runs/never"], "no/such/folder"),
    (["train-tokenizer", "--preset", "huge"], "unknown preset 'huge'; the presets are tiny, small"),
    (["train-tokenizer", "--train.steps", "100", "--run", "runs/never"], "as in --train.free-steps 25"),
    (["train", "--init", "no/such/folder", "--run", "runs/never"], "no/such/folder"),
    (["train", "--preset", "tiny-sf", "--tokenizer", "tiny"], "--tokenizer"),
    (["evaluate", "--suite", "other", "--model", "x"], "unknown suite 'other'; the one suite is paper"),
    (["evaluate", "--model", "x", "--tasks", "tgit"], "--tasks chooses among those of --suite paper"),
    (["evaluate", "--model", "x", "--out", "."], "'.' is a folder; give a file"),
    (["tokenize", "--init", "runs/x", "--text-vocab", "300", "--out", "runs/never"], "the model of --init decides text-vocab"),
    (["embed", "--model", "x", "--texts", "a", "--out", "setup.py/x.safetensors"], "is no folder; give another place"),
    (["benchmark", "--json", "setup.py/x"], "is no folder; give another place"),
    (["train", "--run", "setup.py/x"], "is no folder; give another place"),
    (["train", "--train.beta1", "1.5", "--run", "runs/never"], "train.beta1 must be from 0 to below 1"),
    (["train", "--train.lr", "nan", "--run", "runs/never"], "train.lr must be a number, not nan"),
    (["train", "--encoder.layers", "0", "--run", "runs/never"], "layers must be at least 1"),
    (["train", "--encoder.mlp-ratio", "0", "--run", "runs/never"], "encoder.mlp_ratio must be above 0"),
    (["train", "--encoder.original", "--scenes", "20", "--run", "runs/never"], "not for training anew"),
    (["train", "--workers", "-1", "--scenes", "20", "--run", "runs/never"], "workers must not be negative"),
    (["train", "--init", "runs/x", "--encoder.layers", "9", "--run", "runs/never"], "the model of --init decides encoder"),
    (["train", "--data", "cache:runs/x", "--text-vocab", "300", "--run", "runs/never"], "the token cache decides text-vocab"),
    (["train", "--preset", "tiny-sf", "--speed", "3"], "fuselip-edu train --preset tiny-sf --help lists the flags"),
    (["embed", "--model", "x", "--texts", "a", "--out", "setup.py"], "does not end in .safetensors"),
    (["embed", "--model", "x", "--images", "a", "b", "--texts", "c"], "put - where there is none"),
    (["search", "--model", "x", "--images", "tests"], "give a text, a picture, or both"),
    (["search", "--model", "x", "--images", "tests", "--text", " "], "give a text, a picture, or both"),
    (["search", "--model", "x", "--text", "a"], "--images"),
    (["search", "--model", "x", "--images", "tests", "--text", "a"], "'tests' has no picture"),
    (["search", "--model", "x", "--images", "", "--text", "a"], "no place to look for pictures"),
    (["search", "--model", "x", "--images", "nowhere", "--text", "a"], "no image file at 'nowhere'"),
    (["search", "--model", "x", "--images", "tests", "--text", "a", "--best", "0"], "best must be at least 1, not 0"),
    (["search", "--model", "x", "--images", "tests", "--text", "a", "--out", "found.jpg"], "does not end in .png"),
    (["search", "--model", "x", "--images", "tests", "--text", "a", "--keep", "setup.py"], "is no folder; give another place"),
    (["tokenize", "--scenes", "2", "--text-vocab", "0", "--out", "nbs"], "is not empty and holds no token cache"),
    (["tokenize", "--scenes", "2", "--text-vocab", "0", "--out", "setup.py"], "is a file; give a folder"),
    (["reproduce", "--run", "nbs"], "is not empty and holds no comparison"),
    (["reproduce", "--run", "setup.py"], "is a file; give another --run"),
    (["train", "--run=~/no/such/folder", "--data", "csv:~/no-such.csv"], os.path.expanduser("~/no-such.csv")),
    (["data"], "data check NAME"),
    (["data", "check"], "data check NAME"),
    (["data", "fetch", "cc3m"], "data check NAME"),
    (["data", "check", "cc4m"], "cc4m"),
    (["data", "get", "coco"], "coco"),
    (["data", "make-vqa", "--captions", "cc3m:no/such", "--model", "m", "--out", "x.csv"], "no/such"),
    (["data", "make-vqa", "--captions", "cc3m:no/such"], "--model"),
    (["train", "--run", "--resume"], "--run needs a value, as in --run NAME"),
    (["train", "--preset="], "--preset needs a value"),
    (["train", "--train.seconds", "-1", "--run", "runs/never"], "train.seconds must not be negative"),
    (["demo", "--seconds", "-1", "--run", "runs/never"], "train.seconds must not be negative, and is -1"),
    (["tokenize", "--scenes", "0", "--text-vocab", "0", "--out", "runs/never"], "scenes must be at least 1, not 0"),
    (["train", "--preset", "tiny-sf", "--train.mask-probability", "0.1", "--run", "runs/never"], "late fusion hides no tokens"),
    (["train", "--preset", "tiny-filip", "--train.mask-probability", "0.1", "--run", "runs/never"], "FILIP hides no tokens"),
    (["train", "--preset", "tiny-filip", "--train.loss", "softmax", "--run", "runs/never"], "--encoder.loss"),
])
def test_wrong_words(words, expected, root, monkeypatch, capsys):
    "In this process, since a new one takes seconds to import torch; the other tests start new ones."
    monkeypatch.chdir(root)
    monkeypatch.delenv("FUSELIP_TRACEBACK", raising=False)
    status, said = main(words), capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("fuselip-edu: error: ")]
    assert status == 1 and len(lines) == 1 and expected in lines[0] and "Traceback" not in said, said


def test_a_terminal_gets_the_same_line(root):
    pty = pytest.importorskip("pty")
    for words, told in ((["train", "--train.steps", "x"], "--train.steps"), (["train", "--train.lr", "-1"], "train.lr must not be negative"), (["evaluate"], "--model")):
        here, there = pty.openpty()
        process = subprocess.Popen([sys.executable, "-m", "fuselip_edu", *words], cwd=root, stdin=there, stdout=there, stderr=there, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"})
        os.close(there)
        said = b""
        while True:
            try: part = os.read(here, 4096)
            except OSError: break  # nobody writes any more
            if not part: break
            said += part
        process.wait()
        os.close(here)
        assert process.returncode == 1 and told in said.decode() and "fuselip-edu: error: " in said.decode() and "\x1b" not in said.decode(), said


def test_help_of_a_command_names_the_flags_that_are_read_beforehand(root):
    done = command("train", "--preset", "tiny-sf", "--help", root=root)
    assert done.returncode == 0 and "fuselip-edu train --preset tiny-sf [--run FOLDER] [--resume]" in " ".join(done.stdout.split())
    done = command("data", "--help", root=root)
    assert done.returncode == 0 and "data check NAME" in done.stdout
    narrow = subprocess.run([sys.executable, "-m", "fuselip_edu", "--help"], cwd=root, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert narrow.returncode == 0 and b"fuselip-edu COMMAND" in narrow.stdout


def test_a_text_longer_than_the_context_is_cut_and_said_once(csv, root, tmp_path):
    long = csv.parent / "long.csv"
    long.write_text("image,text\n" + "".join(f"red.png,{'very ' * 100}{index}\n" for index in range(8)))
    done = command(*TRAIN, "--data", f"csv:{long}", "--run", tmp_path / "run", root=root)
    assert done.returncode == 0 and done.stderr.count("was cut") == 1 and "fuselip-edu: note: a text of " in done.stderr and "Warning" not in done.stderr, done.stderr


def test_a_full_disk_while_saving(csv, root, tmp_path):
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    message = failure(*TRAIN, "--data", f"csv:{csv}", "--run", tmp_path / "run", root=root, limit=limit)
    assert "could not write" in message
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.safetensors"))


def test_data_list_and_check(root, tmp_path):
    done = command("data", "list", root=root)
    assert done.returncode == 0 and done.stdout in (root / "data" / "README.md").read_text() and "| `cc3m` |" in done.stdout
    done = command("data", "check", "vg", "--root", tmp_path, root=root)
    assert done.returncode == 1 and "region_descriptions" in done.stdout and "Traceback" not in done.stderr
    assert command("data", "check", "shapes", root=root).returncode == 0


def test_the_papers_suite_says_what_it_lacks(run, root, tmp_path):
    (tmp_path / "data").mkdir()
    out = tmp_path / "out"
    done = command("evaluate", "--suite", "paper", "--model", run, "--data-root", tmp_path / "data", "--out", out, root=root)
    assert done.returncode == 0, done.stderr
    assert "| this run | – |" in done.stdout and "imagenet" in done.stdout and json.loads((out / "results.json").read_text())["tasks"] == {}


def test_search(run, csv, root, tmp_path):
    words = ("search", "--model", run, "--images", csv.parent, "--keep", tmp_path / "kept")
    done = command(*words, "--text", "a red card", "--best", "4", "--out", tmp_path / "found.png", root=root)
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert len(rows) == 4 and [float(score) for score, _ in rows] == sorted((float(score) for score, _ in rows), reverse=True) and all(os.path.isfile(path) for _, path in rows)
    with Image.open(tmp_path / "found.png") as picture: assert picture.format == "PNG"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")}
    (csv.parent / "broken.jpg").write_text("no picture")
    again = command(*words, "--image", csv.parent / "red.png", "--text", "keep it", root=root)
    (csv.parent / "broken.jpg").unlink()
    assert again.returncode == 0 and len(again.stdout.splitlines()) == 5 and "red.png" not in again.stdout and "note: 1 of 7 pictures cannot be read" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")} == kept and len(kept) == 1
    assert "no image file at 'nowhere.png'" in failure(*words, "--image", "nowhere.png", root=root)
    assert "holds no other picture" in failure("search", "--model", run, "--images", csv.parent / "red.png", "--image", csv.parent / "red.png", root=root)


def test_baselines_train_evaluate_and_embed(csv, root, tmp_path):
    words = "train", "--preset", "tiny-mlf", "--data", f"csv:{csv}", "--train.steps", "2", "--train.batch-size", "4", "--text-vocab", "300", "--train.device", "cpu", "--run", tmp_path / "run"
    assert "train.precision bf16-stream is for FuseLIP, not for LateFusion" in failure(*words, "--train.precision", "bf16-stream", root=root)
    assert not (tmp_path / "run").exists()  # so the same command without the mistake may take the folder
    done = command(*words, root=root)
    assert done.returncode == 0, done.stderr
    for words in (("evaluate", "--data", f"csv:{csv}"), ("embed", "--texts", "a red card"), ("search", "--images", csv.parent, "--text", "a red card")):
        done = command(*words, "--model", tmp_path / "run", root=root)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_the_preset_small_makes_its_tokenizer_and_then_itself(root, tmp_path):
    words = ["train", "--preset", "small", "--scenes", "12", "--train.steps", "2", "--train.batch-size", "8", "--text-vocab", "300", "--train.device", "cpu", "--run", "runs/small"]
    environment = tmp_path / "elsewhere"
    environment.mkdir()
    there = dict(root=environment)
    assert "train-tokenizer --preset small --run runs/small-tokenizer" in failure(*words, **there) and not (environment / "runs" / "small").exists()
    done = command("train-tokenizer", "--preset", "small", "--run", "runs/small-tokenizer", "--scenes", "3", "--train.steps", "4", "--train.free-steps", "2", "--train.batch-size", "2", "--train.device", "cpu", **there)
    assert done.returncode == 0, done.stderr
    done = command(*words, **there)
    assert done.returncode == 0, done.stderr
    config = json.loads((environment / "runs" / "small" / "model" / "config.json").read_text())
    assert config["image_tokenizer"]["image_size"] == 64 and config["image_tokenizer"]["n_latents"] == 64 and config["encoder"]["layers"] == 6


def test_the_training_of_a_tokenizer_that_was_killed_goes_on(root, tmp_path):
    words = ["train-tokenizer", "--scenes", "6", "--train.steps", "60", "--train.free-steps", "10", "--train.batch-size", "4", "--train.log-every", "2", "--train.device", "cpu",
             "--model.width", "32", "--model.layers", "1", "--model.decoder-width", "32", "--model.decoder-layers", "1", "--model.decoder-heads", "2"]
    assert command(*words, "--run", tmp_path / "whole", root=root).returncode == 0
    run, started = tmp_path / "killed", time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "fuselip_edu", *words, "--run", str(run)], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "unfinished.safetensors").exists() and time.monotonic() < started + 120: time.sleep(0.02)
    child.kill()
    child.wait()
    assert [path.name for path in run.iterdir() if not path.name.startswith(".")] == ["unfinished.safetensors"]
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / ".unfinished.safetensors.7-0.tmp").write_bytes(b"half")  # killed while the first file was written
    assert command(*words, "--run", tmp_path / "early", root=root).returncode == 0
    assert sorted(path.name for path in (tmp_path / "early").iterdir()) == ["config.json", "metrics.json", "tokenizer"]
    assert "beginning of a training of other sizes" in failure(*words, "--train.lr", "1e-4", "--run", run, root=root)
    done = command(*words, "--run", run, "--export", tmp_path / "export", root=root)
    assert done.returncode == 0 and not (run / "unfinished.safetensors").exists(), done.stderr
    for name in ("metrics.json", "tokenizer/model.safetensors"): assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert "is not empty" in failure(*words, "--run", run, root=root)
