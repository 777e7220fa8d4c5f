"""Captions of training images in the layouts that people keep them in: the right one for each image, or a refusal."""

import csv
import io
import json
import os
import string

import pytest
from basinescape.data.captions import read_captions
from basinescape.data.names import SAFE_ID, Ids
from basinescape.data.tables import cell
from PIL import Image

CAPTIONS = [f"a picture of a {name}, größer" for name in ("cat", "frog", "boat", "tree", "fox", "owl")]


def pictures(folder, suffix="png", count=len(CAPTIONS)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.{suffix}")


def table(path, prefix="", suffix="png", name="file_name", text="text"):
    rows = [{name: f"{prefix}{i}.{suffix}", text: caption} for i, caption in enumerate(CAPTIONS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [name, text])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def beside(folder, suffix, write=str):
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}{suffix}").write_bytes(write(caption).encode() if isinstance(write(caption), str) else write(caption))


def nested(root):
    pictures(root / "train")
    table(root / "train" / "metadata.jsonl")


def nested_csv(root):
    pictures(root / "train" / "images")
    table(root / "train" / "metadata.csv", "images/")


def above_images(root):
    pictures(root / "images")
    table(root / "metadata.csv")


def parquet(root):
    pictures(root / "images")
    table(root / "metadata.parquet", "images/")


def caption_files(root):
    pictures(root / "train")
    beside(root / "train", ".caption")


def capitals(root):
    pictures(root / "train", "PNG")
    beside(root / "train", ".TXT")


def marked(root):
    pictures(root / "train")
    beside(root / "train", ".txt", lambda caption: b"\xef\xbb\xbf" + caption.encode())


def img2dataset(root):
    pictures(root / "00000", "jpg")
    beside(
        root / "00000", ".json", lambda caption: json.dumps({"caption": caption, "url": "u", "width": 8, "status": "success"})
    )
    (root / "00000_stats.json").write_text('{"count": 6, "successes": 6}')


def captions_beside(root):
    pictures(root / "train")
    table(root / "train" / "captions.jsonl", name="image", text="Caption")


def kohya(root):
    for i in (0, 1):
        pictures(root / f"{20 + i}_name{i}", "webp", 3)
        for k in range(3):
            (root / f"{20 + i}_name{i}" / f"{k}.txt").write_text(CAPTIONS[3 * i + k], encoding="utf-8")


def from_windows(root):
    pictures(root / "train" / "images")
    table(root / "train" / "metadata.jsonl", "images\\")


def splits(root):
    """Two sets, each with its own list."""
    for i, name in enumerate(("train", "test")):
        pictures(root / name, count=3)
        rows = [{"file_name": f"{k}.png", "text": CAPTIONS[3 * i + k]} for k in range(3)]
        (root / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


LAYOUTS = [
    nested,
    nested_csv,
    above_images,
    parquet,
    caption_files,
    capitals,
    marked,
    img2dataset,
    captions_beside,
    kohya,
    from_windows,
    splits,
]


@pytest.mark.parametrize("lay", LAYOUTS)
def test_each_image_has_its_own_caption(tmp_path, lay, caplog):
    root = tmp_path / "data"
    lay(root)
    found = read_captions(root)
    assert sorted(prompt.text for prompt in found) == sorted(CAPTIONS) and len({prompt.id for prompt in found}) == 6
    assert len({prompt.image for prompt in found}) == 6 and not caplog.records
    for prompt in found if lay not in (kohya, splits) else ():
        assert CAPTIONS[int(prompt.image.stem)] == prompt.text
    assert [prompt.text for prompt in read_captions(root, every=True)] == [prompt.text for prompt in found]


def test_a_folders_name_is_a_caption_only_where_nothing_else_is_and_is_said(tmp_path, caplog):
    for name in ("20_sks dog", "golf_ball"):
        pictures(tmp_path / "named" / name, count=1)
    assert [prompt.text for prompt in read_captions(tmp_path / "named")] == ["sks dog", "golf ball"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "no file has captions, so that the names of its folders are taken for them: 'sks dog', 'golf ball'" in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train/notes.jsonl", b'{"text": "a"}\n{"text": }', r"notes\.jsonl', line 2: not JSON"),
        ("train/list.csv", b"text,file_name\na cat, asleep,0.png\n", "list.csv', line 2: more cells than columns"),
        ("train/list.csv", b"text;file_name\na cat;gone.png\n", "list.csv', line 2: its image 'gone.png' is not in"),
        ("train/0.txt", "größer".encode("cp1252"), r"caption file '.*0\.txt': not UTF-8 text"),
        ("train/0.txt", "größer".encode("utf-16"), r"caption file '.*0\.txt': not UTF-8 text"),
        ("train/0.caption", b" ", r"caption file '.*0\.caption': holds no caption"),
        ("train/0.json", b'{"txt": "a"}', r"caption file '.*0\.json': unknown column 'txt'"),
        ("train/0.json", b'{"caption": null}', r"caption file '.*0\.json': holds no caption"),
        ("train/0.json", b'{"caption": "\\ud83d"}', r"caption file '.*0\.json': holds half a surrogate pair"),
        ("captions/0.txt", b"a cat", "1 of 1 images have no caption.*is it in '.*captions/0.txt'"),
        ("metadata.jsonl", b'{"label": 3}', "metadata.jsonl', line 1: needs prompt, caption or text; it has label"),
        ("../metadata.csv", b"file_name,text\ndata/train/0.png,a\n", "have no caption.*is it in '.*metadata.csv'"),
        (
            "a.json",
            b'{"images": [], "annotations": [{"image_id": 1}]}',
            "a.json', must be laid out as COCO's captions are: KeyError",
        ),
        ("nothing", b"", "1 of 1 images have no caption: put that of 'train/0.png'"),
    ],
)
def test_what_is_wrong_is_named_and_never_the_folders_name(tmp_path, name, content, says):
    pictures(tmp_path / "data" / "train", count=1)
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_captions(tmp_path / "data")


def test_two_lists_in_one_folder_are_refused_and_an_image_in_none_is_told(tmp_path, caplog):
    pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    assert [prompt.text for prompt in read_captions(tmp_path)] == ["a"]
    assert "5 images are not in metadata.jsonl, first '1.png'" in caplog.text
    table(tmp_path / "metadata.csv")
    with pytest.raises(ValueError, match=r"has metadata\.csv and metadata\.jsonl: give the one that counts"):
        read_captions(tmp_path)


def test_an_image_that_could_be_several_is_refused(tmp_path):
    for name in ("a", "b"):
        pictures(tmp_path / name, count=1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    with pytest.raises(ValueError, match=r"line 1: its image '0\.png' may be '.*a/0\.png' or '.*b/0\.png'"):
        read_captions(tmp_path)


def test_on_request_what_is_wrong_is_passed_over_by_name(tmp_path, caplog):
    pictures(tmp_path)
    beside(tmp_path, ".txt")
    (tmp_path / "2.txt").write_bytes(b"\xff")
    (tmp_path / "3.txt").unlink()
    found = read_captions(tmp_path, on_error="skip")
    assert [prompt.text for prompt in found] == [CAPTIONS[i] for i in (0, 1, 4, 5)]
    said = caplog.text
    assert "2.txt': not UTF-8 text: save it in that encoding: skipped" in said and "put that of '3.png' into '3.txt'" in said
    (tmp_path / "list.csv").write_text("text,image\na,0.png\nb, c,1.png\nd,gone.png\ne,5.png\n")
    found = read_captions(tmp_path / "list.csv", on_error="skip")
    assert [(prompt.id, prompt.text) for prompt in found] == [("0000", "a"), ("0003", "e")]


def test_captions_of_several_lists_keep_apart_where_one_is_passed_over(tmp_path):
    splits(tmp_path)
    (path := tmp_path / "test" / "metadata.jsonl").write_text(path.read_text().replace("0.png", "gone.png"))
    found = read_captions(tmp_path, on_error="skip")
    assert [(prompt.id, prompt.text) for prompt in found] == [(f"000{i}", CAPTIONS[(i + 3) % 6]) for i in (1, 2, 3, 4, 5)]


def test_every_caption_of_an_image_where_it_has_several(tmp_path):
    pictures(tmp_path, count=1)
    (tmp_path / "0.txt").write_text("one")
    (tmp_path / "0.caption").write_text("two")
    (tmp_path / "0.json").write_text('{"text": "one"}')
    assert [(prompt.id, prompt.text) for prompt in read_captions(tmp_path, every=True)] == [("0", "one"), ("0-2", "two")]
    (tmp_path / "list.jsonl").write_text('{"image": "0.png", "caption": ["three", "four"]}')
    assert [prompt.text for prompt in read_captions(tmp_path / "list.jsonl")] == ["three"]
    assert [prompt.text for prompt in read_captions(tmp_path / "list.jsonl", every=True)] == ["three", "four"]


def test_ids_of_files_never_collide(tmp_path):
    names = ["猫", "犬", "a b", "a_b", "a-b", "a/b", "A_B", ".x", "x", "x" * 150, "x" * 151, "ö"]
    ids = Ids()
    found = [ids(name) for name in names]
    assert len({id.casefold() for id in found}) == len(names) and all(map(SAFE_ID.fullmatch, found))
    assert (found[3], found[4], found[8]) == ("a_b", "a-b", "x")
    for name in ("猫", "犬"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    assert {prompt.text for prompt in read_captions(tmp_path)} == {"猫", "犬"}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_spreadsheet_takes_a_caption_for_a_formula(start):
    text = f'{start}HYPERLINK("http://x")'
    csv.writer(file := io.StringIO()).writerow([cell(text), cell(-1.5), cell("a cat")])
    (row,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert row == [f"'{text}", "-1.5", "a cat"]


def test_half_a_surrogate_pair_costs_a_cell_its_letter_alone(tmp_path):
    (tmp_path / "a.csv").write_text(cell("a \ud83d cat"), encoding="utf-8")
    assert (tmp_path / "a.csv").read_text() == "a ? cat" and cell(string.printable) == string.printable


def test_a_folder_behind_a_link_counts_once(tmp_path):
    pictures(tmp_path / "real", count=1)
    beside(tmp_path / "real", ".txt")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "set" / "linked")
    os.symlink(tmp_path / "set", tmp_path / "real" / "round")
    assert [prompt.text for prompt in read_captions(tmp_path / "set")] == CAPTIONS[:1]
