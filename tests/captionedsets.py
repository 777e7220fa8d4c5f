"""Three pictures with their prompts, in every form that they may be kept in."""

import io
import json
import tarfile

import pytest
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
