"Seeds, devices, images, atomic files, weights, progress: the cases that chapter 0 leaves out."
import io
import os
import platform
import random
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fuselip_edu import core

RNG = np.random.default_rng(0)


def noise(*shape): return Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8))


# ---- seeds and devices

def test_a_seed_fixes_all_three_generators():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(4).tolist())
    for seed in (0, 123, -1, 2**40):
        core.seed_everything(seed)
        first = draw()
        core.seed_everything(seed)
        assert draw() == first != draw()


def test_devices():
    assert core.pick_device("cpu") == torch.device("cpu")
    for absent in ("cuda:99", "mps:5"):
        with pytest.raises(RuntimeError, match=f"'{absent}'.*use cpu or auto"): core.pick_device(absent)
    for unknown in ("gpu", "cuda:one", "", "cpu cpu"):
        with pytest.raises(ValueError, match="use auto, cpu"): core.pick_device(unknown)


def test_memory_that_is_kept_need_not_be_brought_again(monkeypatch):
    code = """if True:
        import resource, torch
        from fuselip_edu.core import keep_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(8): torch.empty(2**24).fill_(1.0)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(None, min(faults() for _ in range(4)))
        print(keep_memory(), min(faults() for _ in range(4)))
        print(keep_memory(False))"""
    said = [line.split() for line in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()]
    assert said[1][0] == said[2][0]
    if said[1][0] == "True" and platform.machine() == "x86_64": assert int(said[1][1]) < int(said[0][1]) / 5  # elsewhere PyTorch may have an allocator of its own
    def refuse(name): raise TypeError("no name")
    for nothing in (lambda name: object(), refuse):  # a Mac has no such function, and Windows no library without a name
        monkeypatch.setattr(core.ctypes, "CDLL", nothing)
        assert core.keep_memory() is False


# ---- images

WRITABLE = {"png": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"), "jpeg": ("RGB", "L", "CMYK"), "webp": ("RGB", "RGBA"),
            "tiff": ("RGB", "L", "RGBA", "LA", "1", "CMYK", "I;16")}


@pytest.mark.parametrize("form, mode", [(form, mode) for form, modes in WRITABLE.items() for mode in modes])
def test_every_mode_and_format_gives_rgb(tmp_path, form, mode):
    image = Image.new("I;16", (9, 7), 40_000) if mode == "I;16" else noise(7, 9, 3).convert(mode)
    image.save(tmp_path / f"image.{form}")
    pixels = core.load_image(tmp_path / f"image.{form}")
    assert pixels.shape == (3, 7, 9) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    if mode == "I;16": assert (pixels == 40_000 // 256).all()
    elif form in ("png", "tiff"): assert torch.equal(pixels, core.load_image(image))
    if mode == "RGB" and form == "png": assert np.array_equal(pixels.permute(1, 2, 0), np.array(image))


def test_transparency_lies_over_white_in_every_form_it_takes(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([10] * 768)
    palette.info["transparency"] = 3
    grey = Image.new("LA", (4, 4), (5, 0))
    for index, image in enumerate((clear, palette, grey)):
        image.save(tmp_path / f"{index}.png", **({"transparency": 3} if image is palette else {}))
        for source in (image, tmp_path / f"{index}.png"): assert (core.load_image(source) == 255).all()
    half = core.load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert half.flatten().tolist() == [127] * 3


def test_tensors():
    pixels = torch.randint(0, 256, (3, 5, 6), dtype=torch.uint8)
    assert core.load_image(pixels).data_ptr() == pixels.data_ptr()  # nothing is copied without need
    assert torch.equal(core.load_image(pixels.float() / 255), pixels)
    assert torch.equal(core.load_image((pixels.double() / 255).flip(2)), pixels.flip(2))
    for wrong in (pixels.float(), torch.tensor([-0.1, 0.5, 1.0]).view(3, 1, 1), torch.full((3, 2, 2), float("nan"))):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not in .*divide by 255, give uint8"): core.load_image(wrong)
    with pytest.raises(TypeError, match="not Table"): core.load_image(type("Table", (), {"shape": (3, 4)})())  # a shape alone is no tensor
    for wrong in (torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(4, 4, 3), torch.zeros(3, 4), np.zeros((3, 4, 4)), None, 7):
        with pytest.raises(TypeError): core.load_image(wrong)


def test_squashing_is_pils_bicubic():
    image = noise(50, 70, 3)
    expected = np.array(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(core.load_image(image, 32).permute(1, 2, 0), expected)
    square = core.load_image(noise(32, 32, 3))
    assert core.load_image(square, 32).data_ptr() == square.data_ptr()


def test_archives_and_names_with_a_hash(tmp_path):
    image = noise(6, 6, 3)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("in/b#1.png", buffer.getvalue())
    (tmp_path / "c#2.png").write_bytes(buffer.getvalue())
    for path in (f"{tmp_path}/a.zip#in/b#1.png", tmp_path / "c#2.png"):
        assert np.array_equal(core.load_image(path).permute(1, 2, 0), np.array(image))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("form", ("png", "jpeg", "gif", "webp", "tiff", "bmp"))
def test_a_file_cut_anywhere_is_an_error_with_its_name_or_an_image(tmp_path, form):
    buffer = io.BytesIO()
    noise(24, 24, 3).save(buffer, form)
    data, path, failed = buffer.getvalue(), tmp_path / f"cut.{form}", 0
    for end in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:end])
        try: assert core.load_image(path).shape == (3, 24, 24)
        except ValueError as error:
            failed += 1
            assert "cut." in str(error) and " at 0x" not in str(error)
    assert failed > 30


def test_missing_and_damaged_archives_and_folders(tmp_path):
    (tmp_path / "not.zip").write_bytes(b"not an archive")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("b.png", b"")
    for missing in ("gone.png", "gone.zip#b.png", "a.zip#c.png"):
        with pytest.raises(FileNotFoundError, match=missing): core.load_image(f"{tmp_path}/{missing}")
    for damaged in ("not.zip#b.png", "a.zip#b.png", ""):
        with pytest.raises(ValueError, match="is not a readable image"): core.load_image(f"{tmp_path}/{damaged}")


def test_show_images():
    images = [torch.zeros(3, 4, 4, dtype=torch.uint8), Image.new("L", (5, 3)), torch.ones(3, 4, 4)]
    figure = core.show_images(images, ["a", "b", "c"], columns=2)
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["a", "b", "c"] and len(figure.axes) == 4
    assert shown[2].images[0].get_array().max() == 255


# ---- atomic files

@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")))
@pytest.mark.parametrize("existed", (True, False))
def test_an_error_in_the_middle_leaves_what_was_there(tmp_path, error, existed):
    path = tmp_path / "folder" / "file.txt"
    if existed:
        path.parent.mkdir()
        path.write_text("old")
    with pytest.raises(error if isinstance(error, type) else OSError) as caught:
        with core.atomic_path(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text("ne")
            raise error
    assert list(path.parent.iterdir()) == ([path] if existed else [])
    if existed: assert path.read_text() == "old"
    if not isinstance(error, type): assert "file.txt" in str(caught.value) and caught.value.errno == 28


def test_success_replaces_the_file(tmp_path):
    path = tmp_path / "file.json"
    for value in ({"a": 1}, {"ü": [1, None]}): core.write_json(path, value)
    assert path.read_text(encoding="utf-8") == '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_writing_below_a_file_names_the_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="could not write .*inner.json"): core.write_json(tmp_path / "file" / "inner.json", 1)


def test_an_error_without_a_number_has_none_in_its_message(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(tensors, path): raise SafetensorError("Error while serializing: No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="^could not write .*w.safetensors': Error while serializing: No space left on device; nothing was changed there$"): core.save_tensors({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_middle_of_a_folder_removes_the_folder(tmp_path):
    with pytest.raises(RuntimeError), core.atomic_path(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("ne")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = ("import sys, time; from fuselip_edu.core import atomic_path\n"
            f"with atomic_path({str(path)!r}) as p: p.write_text('ne'); print('ready', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_text() == "old"


# ---- weights

def test_weights_come_back_exactly(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    twin = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    module(torch.randn(8, 4))
    core.save_weights(module, tmp_path / "w.safetensors")
    core.load_weights(twin, tmp_path / "w.safetensors")
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in module.state_dict().items())
    core.save_weights(module, tmp_path / "h.safetensors", torch.float16)
    core.load_weights(twin, tmp_path / "h.safetensors")
    assert torch.equal(twin[0].weight, module[0].weight.half().float()) and twin[1].num_batches_tracked == 1
    assert twin[0].weight.dtype == torch.float32


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "w.safetensors"
    core.save_weights(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(3, 2)}), path)
    other = torch.nn.ModuleDict({"b": torch.nn.Linear(5, 2), "c": torch.nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError) as error: core.load_weights(other, path)
    for part in ("c.weight is missing", "c.bias is missing", "is not expected", "and 2 more"): assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"b.weight has shape \(2, 3\) instead of \(2, 5\)"):
        core.load_weights(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(5, 2)}), path)
    with pytest.raises(FileNotFoundError, match="gone"): core.load_weights(other, tmp_path / "gone.safetensors")


def test_a_cut_weights_file_is_an_error_wherever_it_is_cut(tmp_path):
    module = torch.nn.Linear(3, 2)
    core.save_weights(module, tmp_path / "w.safetensors")
    data, cut = (tmp_path / "w.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        with pytest.raises(ValueError, match="cut.safetensors"): core.load_weights(module, cut)


# ---- progress

def test_a_log_gets_a_line_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in core.progress(range(7), "counting"): now[0] += 4
    assert capsys.readouterr().err.splitlines() == ["counting: 3 of 7 after 12 s", "counting: 6 of 7 after 24 s"]
    for _ in core.progress((i for i in range(7)), "counting"): now[0] += 4
    assert capsys.readouterr().err.splitlines() == ["counting: 3 after 12 s", "counting: 6 after 24 s"]


def test_short_work_is_silent_and_lazy(capfd):
    drawn = []
    steps = core.progress((drawn.append(i) or i for i in range(5)), "drawing", total=5)
    assert next(steps) == 0 and drawn == [0]
    assert list(steps) == [1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")


# ---- a first import

def test_core_lets_torchvision_be_imported_after_it():
    code = "import fuselip_edu.core, torchvision.transforms.v2.functional as f, torch; print(f.hflip(torch.tensor([[[1, 2]]])).tolist())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.stdout == "[[[2, 1]]]\n", done.stderr


def test_core_imports_nothing_slow():
    code = "import sys, fuselip_edu.core; print([name for name in ('torchvision', 'matplotlib', 'PIL', 'safetensors') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("keep", [0, 1, 20, 200])
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_a_file_of_weights_cut_short_is_named(name, keep, tmp_path):
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "model.bin")
    core.save_weights(module, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep] if keep < (tmp_path / name).stat().st_size else b"")
    with pytest.raises(ValueError, match=name): core.read_weights(tmp_path / name)


# ---- lines of JSON, archives

def test_lines_of_json_without_one_that_was_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes('{"a": 1}\n{"b": "\u2028é"}\n{"c": '.encode())
    assert core.json_lines(path) == [{"a": 1}, {"b": "\u2028é"}]
    with open(path, "a", encoding="utf-8") as file: file.write('{"d": 4}\n')  # can be appended to again
    assert core.json_lines(path)[2:] == [{"d": 4}]
    path.write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl' line 2 is not JSON .*mend or remove"): core.json_lines(path)


def test_a_number_sign_in_the_name_of_a_folder(tmp_path):
    folder = tmp_path / "C# and D#"
    folder.mkdir()
    noise(4, 4, 3).save(folder / "a#1.png")
    with zipfile.ZipFile(folder / "p#2.zip", "w") as archive: archive.write(folder / "a#1.png", "in#/b.png")
    assert torch.equal(core.load_image(folder / "a#1.png"), core.load_image(f"{folder}/p#2.zip#in#/b.png"))
    assert core.split_member(f"{folder}/p#2.zip#in#/b.png") == (f"{folder}/p#2.zip", "in#/b.png") and core.split_member(folder / "a#1.png") == (str(folder / "a#1.png"), "")


def test_a_damaged_archive_is_an_unreadable_image(tmp_path):
    noise(12, 12, 3).save(tmp_path / "a.bmp")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive: archive.write(tmp_path / "a.bmp", "a.bmp")
    whole, refused = (tmp_path / "a.zip").read_bytes(), 0
    for at in range(30, len(whole)):
        path = tmp_path / f"{at}.zip"
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
        try: core.load_image(f"{path}#a.bmp")
        except (ValueError, FileNotFoundError) as error:  # and nothing else
            refused += 1
            assert str(path) in str(error)
    assert refused > 100


def _squares(paths, found): found.put([int(core.load_image(path)[0, 0, 0]) for path in paths])


def test_processes_that_are_forked_read_one_archive(tmp_path):
    import multiprocessing
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index in range(200):
            Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "a.png")
            archive.write(tmp_path / "a.png", f"{index}.png")
    paths = [f"{tmp_path}/a.zip#{index}.png" for index in range(200)]
    assert int(core.load_image(paths[7])[0, 0, 0]) == 7  # this process has it open
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=_squares, args=(paths, found)) for _ in range(3)]
    for process in processes: process.start()
    assert [found.get(timeout=60) for _ in processes] == [list(range(200))] * 3
    for process in processes: process.join()


@pytest.mark.parametrize("mode, pixel", [("I", 40_000), ("F", 0.25)])
def test_pixels_of_32_bits_are_refused_since_nothing_says_what_is_white(mode, pixel, tmp_path):
    image = Image.new(mode, (4, 4), pixel)
    with pytest.raises(ValueError, match="its pixels have 32 bits.*save it with 8 or 16"): core.load_image(image)
    image.save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match="deep.tiff' is not a readable image .its pixels have 32 bits"): core.load_image(tmp_path / "deep.tiff")


def test_sixteen_bits_of_a_portable_graymap(tmp_path):
    (tmp_path / "grey.pgm").write_bytes(b"P5\n2 1\n65535\n" + bytes([0x40, 0, 0x80, 0]))
    assert core.load_image(tmp_path / "grey.pgm")[0].tolist() == [[0x40, 0x80]]


def test_a_device_is_a_device_already():
    assert core.pick_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="no device is called 'cpu:'"): core.pick_device("cpu:")


def test_an_input_that_is_missing_is_not_taken_for_the_file_to_write(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        with core.atomic_path(tmp_path / "out.txt"): (tmp_path / "in.txt").read_text()
    assert "could not write" not in str(caught.value) and "in.txt" in str(caught.value)
    with pytest.raises(OSError, match="could not write .*out.txt"):
        with core.atomic_path(tmp_path / "out.txt") as temporary: (temporary / "below").write_text("")


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="Windows has no such rights")
def test_weights_can_be_read_by_whom_the_user_lets(tmp_path):
    before = os.umask(0o077)
    try:
        core.save_tensors({"a": torch.zeros(2)}, tmp_path / "mine.safetensors")
        os.umask(0o022)
        core.save_tensors({"a": torch.zeros(2)}, tmp_path / "ours.safetensors")
    finally: os.umask(before)
    assert [(tmp_path / f"{name}.safetensors").stat().st_mode & 0o777 for name in ("mine", "ours")] == [0o600, 0o644]


def test_operators_of_torchvision_are_found_by_the_endings_of_this_system(monkeypatch):
    endings, loaded = ["_C.some-system.pyd"], []
    class Spec: origin = __file__
    monkeypatch.setattr(core.importlib.util, "find_spec", lambda name: Spec)
    monkeypatch.setattr(core, "EXTENSION_SUFFIXES", [".some-system.pyd"])
    monkeypatch.setattr(core.Path, "glob", lambda self, pattern: [self / endings[0]] if pattern == "_C*.some-system.pyd" else [])
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert core._declare_missing_torchvision_operators() is None and [os.path.basename(path) for path in loaded] == endings
