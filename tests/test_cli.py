"The commands as a user runs them, on a small CSV, and every wrong input."
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

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
    for name in ("demo", "train", "evaluate", "embed", "train-tokenizer"): assert name in done.stdout


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
    assert "train.lr" in failure(*same, "--train.lr", "0.5", root=root)


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
])
def test_wrong_words(words, expected, root): assert expected in failure(*words, root=root)


def test_a_text_longer_than_the_context_is_cut_and_said_once(csv, root, tmp_path):
    long = csv.parent / "long.csv"
    long.write_text("image,text\n" + "".join(f"red.png,{'very ' * 100}{index}\n" for index in range(8)))
    done = command(*TRAIN, "--data", f"csv:{long}", "--run", tmp_path / "run", root=root)
    assert done.returncode == 0 and done.stderr.count("was cut") == 1, done.stderr


def test_a_full_disk_while_saving(csv, root, tmp_path):
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    message = failure(*TRAIN, "--data", f"csv:{csv}", "--run", tmp_path / "run", root=root, limit=limit)
    assert "could not write" in message
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.safetensors"))
