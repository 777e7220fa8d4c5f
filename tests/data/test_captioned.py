"""Pictures with the prompts that they were made from: each with its own, from wherever they are kept, one at a time."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
from basinescape.data.captioned import captioned
from basinescape.data.names import SAFE_ID
from basinescape.data.prompts import Prompts
from bulkruns import make
from PIL import Image, PngImagePlugin

PROMPTS = ["a cat", "ein Frosch, größer", "a boat"]


def picture(i):
    return Image.new("RGB", (8, 8), (40 * i, 0, 0))


def encoded(image, format="PNG", **options):
    image.save(file := io.BytesIO(), format=format, **options)
    return file.getvalue()


def with_text(**texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return info


def pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        picture(i).save(folder / f"{i}.png")


def in_text_files(root):
    pictures(root / "deep")
    for i, prompt in enumerate(PROMPTS):
        (root / "deep" / f"{i}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    return root


def in_metadata(root):
    pictures(root / "train")
    rows = [{"file_name": f"{i}.png", "text": prompt} for i, prompt in enumerate(PROMPTS)]
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def in_a_list(root):
    pictures(root / "made")
    rows = [{"image": f"made/{i}.png", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "list.jsonl"


def tar(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, data in members:
            (entry := tarfile.TarInfo(name)).size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def in_tar_files(root):
    """Two of them, one compressed; texts before and behind their pictures."""
    root.mkdir()
    first = [("s/0.txt", b"\xef\xbb\xbfa cat"), ("s/0.png", encoded(picture(0)))]
    first += [("s/1.jpg", encoded(picture(1), "JPEG", quality=100)), ("s/1.json", json.dumps({"caption": PROMPTS[1]}).encode())]
    tar(root / "0.tar", first)
    tar(root / "1.tar.gz", [("2.webp", encoded(picture(2), "WEBP", lossless=True)), ("2.caption", PROMPTS[2].encode())])
    return root / "*.tar*"


def in_parquet(root):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    root.mkdir()
    rows = [{"image": {"bytes": encoded(picture(i)), "path": f"{i}.png"}, "Text": prompt} for i, prompt in enumerate(PROMPTS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "a.parquet")
    return root / "a.parquet"


def in_a1111s_text(root):
    pictures(root)
    for i, prompt in enumerate(PROMPTS):
        text = f"{prompt}\nNegative prompt: bad\nSteps: 20, Sampler: Euler" if i else f"{prompt}\nSteps: 20, Sampler: Euler"
        picture(i).save(root / f"{i}.png", pnginfo=with_text(parameters=text))
    return root


def graph(*texts):
    """A workflow whose sampler is led by the first text through a node that changes it, and led away from the second."""
    nodes = {
        "3": {"class_type": "KSampler", "inputs": {"positive": ["7", 0], "negative": ["8", 0], "model": ["4", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "7": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["9", 0], "guidance": 3.5}},
        "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["4", 1]}},
        "9": {"class_type": "CLIPTextEncode", "inputs": {"text": ["10", 0], "clip": ["4", 1]}},
        "10": {"class_type": "PrimitiveString", "inputs": {"value": texts[0]}},
    }
    for i, text in enumerate(texts[1:]):
        nodes[f"{20 + i}"] = {"class_type": "KSampler", "inputs": {"positive": [f"{40 + i}", 0]}}
        nodes[f"{40 + i}"] = {"class_type": "CLIPTextEncode", "inputs": {"text": text}}
    return json.dumps(nodes)


def in_comfyuis_text(root):
    pictures(root)
    for i, prompt in enumerate(PROMPTS):
        picture(i).save(root / f"{i}.png", pnginfo=with_text(prompt=graph(prompt), workflow="{}"))
    return root


SOURCES = [in_text_files, in_metadata, in_a_list, in_tar_files, in_parquet, in_a1111s_text, in_comfyuis_text]


@pytest.mark.parametrize("keep", SOURCES)
def test_each_picture_has_the_prompt_that_it_was_made_from(tmp_path, keep):
    found = list(captioned(keep(tmp_path / "set")))
    assert [(one.prompt, one.reason) for one in found] == [(prompt, "") for prompt in PROMPTS]
    assert len({one.id for one in found}) == 3 and all(SAFE_ID.fullmatch(one.id) for one in found)
    for i, one in enumerate(found):
        image = one.open()
        assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - np.asarray(picture(i))).max() < 4
        assert "set" in one.where


@pytest.mark.parametrize("format", ["png", "parquet", "webdataset"])
def test_a_run_of_generate_is_read_back(tmp_path, monkeypatch, drawn, format):
    from basinescape import Sampler

    if format in ("parquet", "webdataset"):
        pytest.importorskip("pyarrow" if format == "parquet" else "webdataset")
    rows = [{"prompt": f"a cat {i}", "id": f"p{i}", "colour": ["red", 3, None][i], "file_name": f"u{i}"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn.faults["a cat 2"] = RuntimeError("lost")
    sampler = Sampler.from_pretrained("tiny", "cpu", scheduler="ddim")
    make(sampler, Prompts(tmp_path / "p.jsonl"), tmp_path / "out", format=format)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").open()]
    assert [(line["file_name"], line.get("colour")) for line in lines] == [("u0", "red"), ("u1", "3"), ("u2", None)]
    found = list(captioned(tmp_path / "out"))
    assert [(one.id, one.prompt) for one in found] == [("p0", "a cat 0"), ("p1", "a cat 1")]
    assert [one.open().getpixel((0, 0))[0] for one in found] == [0, 1]


def test_a_picture_without_a_prompt_says_why(tmp_path):
    pictures(tmp_path)
    (tmp_path / "1.txt").write_bytes(b"\xff")
    picture(2).save(tmp_path / "2.png", pnginfo=with_text(prompt=graph("one", "two")))
    picture(2).save(tmp_path / "3.png", pnginfo=with_text(prompt="{"))
    picture(2).save(tmp_path / "4.png", pnginfo=with_text(parameters="\nNegative prompt: bad\nSteps: 3"))
    picture(2).save(tmp_path / "5.jpg")
    found = {one.where.rpartition("/")[2].rstrip("'"): one for one in captioned(tmp_path)}
    assert all(one.prompt is None for one in found.values())
    assert {name: one.reason.partition("'")[0] for name, one in found.items() if name != "1.png"} == {
        "0.png": "no text beside it, and none in it",
        "2.png": "no text beside it, and its workflow has 2 prompts",
        "3.png": "no text beside it, and its workflow has no prompts",
        "4.png": "no text beside it, and none in it",
        "5.jpg": "no text beside it, and none in it",
    }
    assert "1.txt': not UTF-8 text" in found["1.png"].reason


@pytest.mark.parametrize(
    ("name", "cut"), [("list.jsonl", 0), ("a.tar", 2100), ("a.tar", 2600), ("a.tar", 540), ("a.parquet", 0), ("a.png", 0)]
)
def test_what_is_broken_is_named_and_costs_no_other(tmp_path, name, cut, caplog):
    pictures(tmp_path / "set")
    path = tmp_path / "set" / name
    if name == "list.jsonl":
        path.write_text('{"image": "0.png", "text": "a"}\n{"image": "gone.png", "text": "b"}\n{"image": "1.png", "text": "c"}')
    elif name == "a.tar":
        whole = tar(path, [("0.png", encoded(picture(0))), ("0.txt", b"a"), ("1.png", encoded(picture(1))), ("1.txt", b"c")])
        path.write_bytes(whole.read_bytes()[:cut])
    else:
        path.write_bytes(b"PAR1")
    if name == "a.png":
        one = next(captioned(path))
        assert one.prompt is None and "it cannot be read" in one.reason
        with pytest.raises(ValueError, match=r"image '.*a\.png' cannot be read"):
            one.open()
        return
    with pytest.raises(ValueError, match=rf"{name}"):
        list(captioned(path))
    found = [one.prompt for one in captioned(path, on_error="skip")]
    assert found == {"list.jsonl": ["a", "c"], "a.tar": ["a"] if cut > 2048 else [], "a.parquet": []}[name]
    assert name in caplog.text and "skipped" in caplog.text


def test_nothing_at_all_is_refused_at_once(tmp_path):
    for source in (tmp_path / "none", tmp_path / "*.tar"):
        with pytest.raises(FileNotFoundError, match="do not exist; give a folder"):
            captioned(source)


@pytest.mark.parametrize("keep", ["tar", "parquet", "folder"])
def test_pictures_are_not_held_in_memory(tmp_path, keep):
    noise = [
        encoded(Image.fromarray(np.random.default_rng(i).integers(0, 256, (100, 100, 3), dtype=np.uint8))) for i in range(4)
    ]

    def most(count):
        data = [noise[i % 4] for i in range(count)]
        if keep == "tar":
            path = tar(tmp_path / f"{count}.tar", [(f"{i}.png", one) for i, one in enumerate(data)])
        elif keep == "parquet":
            pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
            rows = {"image": data, "text": ["a"] * count}
            parquet.write_table(pyarrow.table(rows), path := tmp_path / f"{count}.parquet", row_group_size=16)
        else:
            (path := tmp_path / f"{count}").mkdir()
            for i, one in enumerate(data):
                (path / f"{i}.png").write_bytes(one)
        tracemalloc.start()
        assert sum(one.open().size == (100, 100) for one in captioned(path)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(2)
    assert most(160) - most(40) < 30 * len(noise[0])


def test_rows_without_a_picture_are_named_and_cost_no_other(tmp_path, caplog):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    pictures(tmp_path)
    rows = [{"bytes": encoded(picture(0)), "path": None}, {"bytes": None, "path": None}, {"bytes": None, "path": "2.png"}]
    parquet.write_table(pyarrow.table({"image": rows, "text": ["a", "b", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^row 2 of '.*a\.parquet': needs a column of pictures' bytes"):
        list(captioned(tmp_path / "a.parquet"))
    found = list(captioned(tmp_path / "a.parquet", on_error="skip"))
    reasons = ["", "it needs prompt, caption or text, and none in it"]
    assert [one.prompt for one in found] == ["a", None] and [one.reason for one in found] == reasons
    assert [one.open().getpixel((0, 0))[0] for one in found] == [0, 80]


def test_one_file_of_several_that_is_broken_costs_no_other(tmp_path, caplog):
    in_tar_files(tmp_path / "set")
    (tmp_path / "set" / "0a.tar").write_bytes(b"no archive")
    found = [one.prompt for one in captioned(tmp_path / "set" / "*.tar*", on_error="skip")]
    assert found == PROMPTS and "0a.tar' is no whole .tar file" in caplog.text
