"What holds for the book as a whole: imports point to lower chapters, every chapter reads as STYLE asks, README's numbers come from results files."
import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from fuselip_edu.reproduce import ABLATIONS, ablation_table, reproduction_table, rivals_table
from fuselip_edu.scaling import ladder_table

CHAPTERS = ["core", "pairs", "shapes", "quantize", "transformer", "kernel", "titok", "text", "vocab", "fuselip", "contrastive", "masking", "transforms",
            "sources", "batches", "token_cache", "distributed", "train", "evaluate", "baselines", "filip", "ett", "reproduce", "scaling", "explore", "demo", "paper", "data", "cli"]
PAGES = {"map"}  # chapters without a module


def notebooks(root): return sorted(path for path in (root / "nbs").glob("[0-9]*.ipynb"))


def test_every_chapter_has_its_module(root):
    assert [name for path in notebooks(root) if (name := re.sub(r"^\d+b?_", "", path.stem)) not in PAGES] == CHAPTERS
    assert {path.stem for path in (root / "fuselip_edu").glob("[a-z]*.py")} == set(CHAPTERS)


def test_imports_point_to_lower_chapters(root):
    for number, name in enumerate(CHAPTERS):
        for node in ast.walk(ast.parse((root / "fuselip_edu" / f"{name}.py").read_text())):
            found = []
            if isinstance(node, ast.ImportFrom) and node.level: found = [node.module] if node.module else [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fuselip_edu"):
                found = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            for other in found: assert CHAPTERS.index(other) < number, f"{name} imports {other}"


def test_chapters_open_and_close_as_they_should(root):
    for path in notebooks(root):
        cells = json.loads(path.read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        assert re.match(r"# .+\n\n> .+", "".join(cells[0]["source"])), path.name
        for heading in ("What we learned", "Try it"): assert f"## {heading}" in text, f"{path.name} has no {heading}"
        code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
        assert any(cell["outputs"] for cell in code), f"{path.name} is committed without outputs"
        for cell in code:
            assert len("".join(cell["source"]).splitlines()) <= 45, f"{path.name}: a long cell"
            assert not any(output["output_type"] == "error" for output in cell["outputs"]), path.name
        assert path.stat().st_size < 1.5e6, path.name


def test_pages_of_the_site_link_to_each_other_and_show_what_is_meant_to_be_read(root):
    spec = importlib.util.spec_from_file_location("book_commands", root / ".ci" / "notebooks.py")
    commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(commands)
    pages = {path.stem: commands.page(path) for path in commands.chapters([])}
    for name, page in pages.items():
        read = [cell.source for cell in page.cells if cell.cell_type == "markdown"] + [output["data"].get("text/markdown", "") for cell in page.cells for output in cell.get("outputs", ()) if "data" in output]
        links = {link for text in read for link in re.findall(r"\]\((\w+\.(?:html|ipynb))", text)}
        assert links <= {f"{other}.html" for other in pages} and not any(line.startswith("#|") for cell in page.cells for line in cell.source.splitlines()), name
        for cell in page.cells: assert cell.source.strip() or cell.cell_type == "code", name
    assert pages["23_explore"].cells[0].source.startswith("# 23 Exploring") and pages["index"].cells[0].source.startswith("# fuselip_edu")
    shown = [cell for cell in pages["index"].cells if cell.cell_type == "code" and "hide_input" not in cell.metadata.get("tags", ())]
    assert len(shown) == 1 and "from_pretrained" in shown[0].source


def test_public_names_can_be_imported(root):
    code = "import fuselip_edu; [getattr(fuselip_edu, name) for name in fuselip_edu.__all__]; from fuselip_edu import FuseLIP, TiTok"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_importing_the_package_and_asking_for_help_are_light(root):
    heavy = "{'torch', 'torchvision', 'open_clip', 'datasets', 'matplotlib', 'tokenizers', 'tyro'}"
    for work in ("import fuselip_edu", "import fuselip_edu.cli; fuselip_edu.cli.main(['--help'])"):
        subprocess.run([sys.executable, "-c", f"import sys; {work}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"],
                       check=True, cwd=root, stdout=subprocess.DEVNULL)


def numbers_of(tasks):
    for row in tasks.values():
        for value in (row["accuracy"], *row["ci95"], row["chance"]): yield f"{100 * value:.1f}"


def test_numbers_of_the_comparison_come_from_its_results(root):
    found = json.loads((root / "data" / "results" / "reproduce.json").read_text())
    known = {f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" for model in found["models"].values() for row in model["tasks"].values()}
    for path in ("README.md", "nbs/21_reproduce.ipynb"):
        text = (root / path).read_text().replace("\\u00b1", "±")
        assert set(re.findall(r"\d+\.\d ± \d+\.\d", text)) == known, f"{path} is not of data/results/reproduce.json; run make notebooks"
    chapter = (root / "nbs" / "21_reproduce.ipynb").read_text()
    for claim in found["claims"]: assert f"{100 * claim['difference']:+.1f}" in chapter


def test_numbers_of_the_ablations_come_from_their_results(root):
    found, chapter = json.loads((root / "data" / "results" / "ablations.json").read_text()), (root / "nbs" / "21_reproduce.ipynb").read_text()
    assert found["command"].startswith("fuselip-edu reproduce --preset tiny --ablations") and list(found["models"]) == list(ABLATIONS)
    for line in ablation_table(found).splitlines(): assert line in chapter, "21_reproduce.ipynb is not of data/results/ablations.json; run make notebooks"


def test_numbers_of_the_neighbours_come_from_their_results(root):
    found = json.loads((root / "data" / "results" / "neighbours.json").read_text())
    assert found["command"].startswith("fuselip-edu reproduce --preset tiny --models fuselip,filip,vectors,ett,sf,mlf --seeds 1") and set(found["models"]) == {"fuselip", "filip", "vectors", "ett", "sf", "mlf"}
    for path in ("README.md", "nbs/24_map.ipynb"):
        text = (root / path).read_text()
        for line in reproduction_table(found, ()).splitlines(): assert line in text, f"{path} is not of data/results/neighbours.json; run make notebooks"


def test_the_first_page_is_made_from_the_results(root, monkeypatch):
    "Every table and number of README that is not in a sentence: its cells, run again, give what is committed."
    monkeypatch.chdir(root / "nbs")
    names, tables = {}, 0
    for cell in json.loads((root / "nbs" / "index.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("#| eval: false"): continue
        *before, last = ast.parse(source).body
        exec(compile(ast.Module(before, []), "index", "exec"), names)
        shown = [data for output in cell["outputs"] for data in [output.get("data", {}).get("text/markdown")] if data]
        if not shown: exec(compile(ast.Module([last], []), "index", "exec"), names)
        else:
            made = eval(compile(ast.Expression(last.value), "index", "eval"), names).data
            assert "".join(shown[0]) == made, "index.ipynb is not of data/results; run make notebooks"
            seen_from_root = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", made)
            for line in seen_from_root.splitlines(): assert line in (root / "README.md").read_text()
            tables += 1
    assert tables >= 6


def test_pins_can_be_installed_with_every_python_that_the_package_takes(root):
    "A release that needs a newer one is pinned with a marker that says so."
    from importlib.metadata import distributions
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    oldest = re.search(r"min_python *= *([\d.]+)", (root / "settings.ini").read_text())[1]
    pins = {pin.name.lower().replace("_", "-"): pin for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#") for pin in [Requirement(line)]}
    needs = {found.metadata["Name"].lower().replace("_", "-"): (found.version, found.metadata["Requires-Python"]) for found in distributions()}
    checked = 0
    for name, pin in pins.items():
        version, python = needs.get(name, (None, None))
        if not python or not pin.specifier.contains(version or "0", prereleases=True): continue
        checked += 1
        if not SpecifierSet(python).contains(f"{oldest}.0"): assert pin.marker and not pin.marker.evaluate({"python_version": oldest, "python_full_version": f"{oldest}.0"}), f"{pin} needs Python {python}"
    assert checked > 50


def test_numbers_of_the_demo_come_from_its_results(root):
    tasks = json.loads((root / "data" / "results" / "demo.json").read_text())["tasks"]
    rows = [line for line in (root / "README.md").read_text().splitlines() if re.match(r"\| .*\d+\.\d – \d+\.\d", line)]
    known = set(numbers_of(tasks))
    assert len(rows) == len(tasks) and {number for line in rows for number in re.findall(r"-?\d+\.\d", line)} == known


@pytest.mark.parametrize("name", ["nlvr", "emoji4", "grocery"])
def test_numbers_of_real_sets_come_from_their_results(name, root):
    found = json.loads((root / "data" / "results" / f"{name}.json").read_text())
    assert found["command"].startswith(f"python examples/{name}.py") and set(found["models"]) == {"fuselip", "sf", "mlf"}
    table = rivals_table(found)
    assert len(table.splitlines()) == 2 + len(found["models"]["fuselip"]["tasks"])
    for path in ("README.md", "nbs/21_reproduce.ipynb"):
        text = (root / path).read_text()
        for line in table.splitlines(): assert line in text, f"{path} is not of data/results/{name}.json; run make notebooks"


def test_numbers_of_the_starved_tokenizer_come_from_its_results(root):
    found, chapter = json.loads((root / "data" / "results" / "starved.json").read_text()), (root / "nbs" / "20_ett.ipynb").read_text()
    assert found["command"].startswith("python examples/starved.py") and found["starved"]["used"] <= found["codes"]
    for row in found["models"].values():
        scores = [task["mean"] for name, task in row["tasks"].items() if name not in ("false_captions", "unseen")]
        shown = [f"{100 * score:.1f}" for score in (*scores, row["tasks"]["unseen"]["mean"])]
        lines = [f"| {100 * sum(scores) / 9:.1f} | {' | '.join(shown)} | {row['tokenizer']['error']:.4f} | {row['tokenizer']['used']} |"]
        if said := row.get("captions"): lines.append(f"| {said['loss']:.3f} | {100 * said['right']:.1f} | {said['before']['error']:.4f} | {said['after']['error']:.4f} |")
        for line in lines: assert line in chapter, "20_ett.ipynb is not of data/results/starved.json; run make notebooks"


def test_numbers_of_the_ladder_come_from_its_results(root):
    table = ladder_table(json.loads((root / "data" / "results" / "scaling.json").read_text()))
    for path in ("README.md", "nbs/22_scaling.ipynb"):
        text = (root / path).read_text()
        for line in table.splitlines(): assert line in text, f"{path} is not of data/results/scaling.json; run make notebooks"


@pytest.mark.parametrize("size", ["s", "b"])
def test_numbers_of_a_gpu_come_from_its_results(size, root):
    found, readme = json.loads((root / "data" / "results" / f"scaling-fuselip-{size}-h200.json").read_text()), (root / "README.md").read_text()
    chapter = (root / "nbs" / "22_scaling.ipynb").read_text()
    for line in ladder_table(found).splitlines(): assert line in chapter, f"22_scaling.ipynb is not of data/results/scaling-fuselip-{size}-h200.json; run make notebooks"
    best = max(found["rungs"], key=lambda rung: rung["pairs_per_second"])
    assert re.search(rf"\| fuselip-{size}, {found['hardware']} \({found['date']}\) \| {best['pairs_per_second']:,.0f} \|.* {best['utilisation']:.0%} \| {best['memory'] / 2**30:.0f} GiB", readme)
    assert found["batch_size"] == 2048 and found["rungs"][0]["parts"] == 16 and best["data_wait"] < 0.02 and best["pairs_per_second"] > 20 * found["rungs"][0]["pairs_per_second"]
    assert size == "s" or best["utilisation"] >= 0.45


def test_the_row_of_small_comes_from_its_run(root):
    found = json.loads((root / "data" / "results" / "small-h200.json").read_text())
    for path in ("README.md", "nbs/21_reproduce.ipynb"):
        text = (root / path).read_text()
        for line in reproduction_table(found, ()).splitlines(): assert line in text, f"{path} is not of data/results/small-h200.json; run make notebooks"
    assert f"{found['models']['fuselip']['seconds']:.0f} s of training on one {found['hardware']}" in (root / "README.md").read_text()


def test_results_and_chapters_name_no_place_of_this_machine(root):
    place = r"(/work/|/tmp/|/home/|/root/)"
    for path in (root / "data" / "results").glob("*.json"): assert not re.search(place, path.read_text()), path
    for path in (root / "nbs").glob("*.ipynb"):
        lines = [line for line in path.read_text().splitlines() if '"image/png"' not in line]
        assert not [line for line in lines if re.search(place, line)], path
