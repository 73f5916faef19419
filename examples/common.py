"What the examples share: where the data lies, CSV files, and the one command that trains and compares the models."
import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from fuselip_edu.core import write_json

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("image", "text", "instruction", "target_image", "group")


def data_folder(name, given=None): # the folder `name` in `given`, in FUSELIP_DATA, or in ../shared/data beside the repository
    folder = Path(given or os.environ.get("FUSELIP_DATA") or ROOT.parent / "shared" / "data").resolve() / name
    if not folder.is_dir(): sys.exit(f"no folder {str(folder)!r}; give the folder that holds {name!r} as --data, or in the environment variable FUSELIP_DATA")
    return folder


def read_jsonl(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(rows, limit): # at most `limit` of them, from all over the list
    return rows if limit is None or limit >= len(rows) else [rows[at * len(rows) // limit] for at in range(limit)]


def only_candidates(text, images, group):
    "Rows that say of every picture what is true of all in the file: no query comes of them, but the pictures are candidates in their group."
    return [{"instruction": text, "target_image": image, "group": group} for image in images]


def beside(folder, cell): # a table names nothing outside its folder, so pictures that lie elsewhere are reached through a link in it
    picture, mark, member = str(cell).partition("#")
    if not Path(picture).is_absolute(): return cell
    link = folder / "linked" / Path(picture).parent.name
    if not link.is_symlink() or link.resolve() != Path(picture).parent.resolve():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(picture).parent.resolve(), target_is_directory=True)
    return f"{(link / Path(picture).name).relative_to(folder)}{mark}{member}"


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows: writer.writerow(row | {name: beside(path.parent, row[name]) for name in ("image", "target_image") if row.get(name)})


def write_set(out, train, tests): # lists of rows; `tests`: {task: rows}
    write_csv(out / "train.csv", train)
    for task, rows in tests.items():
        if rows: write_csv(out / "tests" / f"{task}.csv", rows)  # a small part of a set need not have every task


def main(description, name, prepare, tokenizer_steps, steps, words=None):
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", help=f"folder that holds {name}; otherwise FUSELIP_DATA names it")
    parser.add_argument("--out", default=f"runs/{name}", help="folder for the CSV files and the run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every model (default: %(default)s)")
    parser.add_argument("--prepare-only", action="store_true", help="write the CSV files and stop")
    asked = parser.parse_args(words)
    out = Path(asked.out).resolve()
    prepare(data_folder(name, asked.data), out)
    print(f"pairs: {out / 'train.csv'}; tests: {out / 'tests'}", flush=True)
    if asked.prepare_only: return
    command = ["reproduce", "--data", f"csv:{out / 'train.csv'}", "--tests", out / "tests", "--tokenizer-steps", tokenizer_steps, "--steps", steps,
               "--seeds", asked.seeds, "--run", out / "run"]
    if code := subprocess.run([sys.executable, "-m", "fuselip_edu", *map(str, command)]).returncode: sys.exit(code)
    said = f"python examples/{name}.py" + (f" --seeds {asked.seeds}" if asked.seeds != 1 else "")
    write_json(out / "results.json", summary(json.loads((out / "run" / "results.json").read_text(encoding="utf-8")), said))
    print(f"summary: {out / 'results.json'}")


def summary(found, command): # what a page quotes of a results.json: without the answers to single queries, and under the command that was given here
    models = {model: {key: value for key, value in row.items() if key not in ("answers", "curves")} for model, row in found["models"].items()}
    return found | {"command": command, "models": models}
