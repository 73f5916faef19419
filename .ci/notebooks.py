"""The book's own commands: execute chapters in place, test them, check that library and notebooks agree, write README.md.

    python .ci/notebooks.py execute [08 09 …]   run chapters (all by default) and keep their outputs
    python .ci/notebooks.py test                run every chapter from a fresh kernel, writing nothing (nbdev_test)
    python .ci/notebooks.py check               fail if nbdev_export, nbdev_clean or the README step would change a file
    python .ci/notebooks.py readme              write README.md from nbs/index.ipynb
    python .ci/notebooks.py site                build the book as a site in _docs/, from what is committed: nothing is executed or fetched
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
SKIP = re.compile(r"^#\|\s*(eval:\s*false|slow|cuda)\b", re.MULTILINE)  # `tst_flags` of settings.ini, and cells never run
QUIET = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def chapters(names):
    found = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if not path.name.startswith(("_", ".")))
    return [path for path in found if not names or any(path.name.startswith(name) for name in names)]


def execute(names):
    "Run each chapter in its own kernel; a cell that fails leaves the notebook as it was."
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, index, **options):
            if cell.cell_type == "code" and SKIP.search(cell.source):
                cell.outputs, cell.execution_count = [], None
                return cell
            return await super().async_execute_cell(cell, index, **options)

    for path in chapters(names):
        notebook, started = nbformat.read(path, 4), time.monotonic()
        Client(notebook, timeout=600, kernel_name="python3",
               resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        notebook.metadata.pop("widgets", None)  # their state, which has no part in what is committed
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if "outputs" in cell:  # progress, timings and the numbers of widgets would differ at every run
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]
        nbformat.write(notebook, path)
        print(f"{path.name:24} {time.monotonic() - started:6.1f} s", flush=True)


def test():
    subprocess.run(["nbdev_test", "--n_workers", "2", "--timing"], cwd=ROOT, check=True, env=os.environ | QUIET)


def readme_text():
    "index.ipynb as Markdown: text cells as they are, code in fences, and printed results below it."
    import nbformat
    parts = []
    for cell in nbformat.read(NOTEBOOKS / "index.ipynb", 4).cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif "#| hide" not in cell.source:
            code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
            if "#| echo: false" not in cell.source: parts.append(f"```python\n{code}\n```")
            for output in cell.outputs:
                data = output.get("data", {})
                if "text/markdown" in data: parts.append(data["text/markdown"])
                elif text := output.get("text") or data.get("text/plain"): parts.append("```\n" + text.rstrip() + "\n```")
    text = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", "\n\n".join(parts)).replace("](../", "](")  # links as seen from the root
    return f"<!-- Generated from nbs/index.ipynb by `make notebooks`; edit that. -->\n\n{text}\n"


def readme(): (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")


def page(path):
    "A chapter as the site shows it: with its number, without what nbdev hides, and with links to pages."
    import nbformat
    linked = lambda text: re.sub(r"\]\((\w+)\.ipynb", r"](\1.html", text)
    notebook, kept = nbformat.read(path, 4), []
    for cell in notebook.cells:
        if re.search(r"^#\|\s*(hide|default_exp)\b", cell.source, re.MULTILINE): continue
        if cell.cell_type == "markdown": cell.source = linked(cell.source)
        if re.search(r"^#\|\s*echo: false", cell.source, re.MULTILINE): cell.metadata["tags"] = ["hide_input"]
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        for output in cell.get("outputs", ()):
            if text := output.get("data", {}).get("text/markdown"): output.data["text/markdown"] = linked(text)
        kept.append(cell)
    notebook.cells, number = kept, re.match(r"\d+b?", path.name)
    if number: kept[0].source = kept[0].source.replace("# ", f"# {number[0]} ", 1)
    return notebook


def site():
    "mkdocs on the pages of all chapters."
    import nbformat
    with tempfile.TemporaryDirectory() as folder:
        for path in chapters([]): nbformat.write(page(path), Path(folder) / path.name)
        (Path(folder) / "wide.css").write_text(".md-grid { max-width: 84rem }\n")
        subprocess.run(["mkdocs", "build", "--quiet", "--strict"], cwd=ROOT, check=True, env=os.environ | {"BOOK": folder, "NO_MKDOCS_2_WARNING": "1"})
    print(f"the book: {ROOT / '_docs' / 'index.html'}")


def check():
    "Work on a copy, so that a failing check changes nothing."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", "runs", ".git", "cache", "_docs", "__pycache__", "*.egg-info"))
        for command in ("nbdev_export", "nbdev_clean"): subprocess.run([command], cwd=copy, check=True)
        wrong = []
        for name in ("nbs", "fuselip_edu"):
            for path in sorted({p.relative_to(r) for r in (ROOT, copy) for p in (r / name).rglob("*") if p.suffix in (".py", ".ipynb")}):
                if any(part.startswith(".") for part in path.parts): continue
                one, two = ROOT / path, copy / path
                if not one.exists() or not two.exists() or one.read_bytes() != two.read_bytes(): wrong.append(str(path))
    if wrong: sys.exit(f"not in step with the notebooks, or not clean: {', '.join(wrong)}; run nbdev_export and nbdev_clean")
    if (ROOT / "README.md").read_text(encoding="utf-8") != readme_text(): sys.exit("README.md is not what nbs/index.ipynb gives; run `make notebooks`")
    print("library, notebooks and README agree")


if __name__ == "__main__":
    commands = {"execute": lambda: execute(sys.argv[2:]), "test": test, "check": check, "readme": readme, "site": site}
    if len(sys.argv) < 2 or sys.argv[1] not in commands: sys.exit(__doc__)
    commands[sys.argv[1]]()
