"""Every picture says in its own file that a machine made it and, unless told not to, from what."""

import io
import json
from hashlib import sha256
from xml.sax.saxutils import quoteattr

import bulkruns
import numpy as np
import pytest
from basinescape import Guidance
from basinescape.bench.speed.standin import stand_in
from basinescape.data import xmp
from basinescape.data.image_encoding import PICTURES, Encoder
from basinescape.data.prompt_in_file import prompt_in
from basinescape.data.prompted import prompted
from basinescape.data.prompts import Job
from basinescape.data.shards import SHARDS
from basinescape.data.verify import verify
from basinescape.runs.jsonl_journal import read_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"  # as IPTC has it
LINE = {"id": "a", "prompt": 'ein Bär & <ü>\r\n"熊"', "seed": 3, "steps": 5, "scale": 7.5, "negative_prompt": "unscharf"}
LIBRARIES = {"parquet": "pyarrow", "webdataset": "webdataset"}


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))


def packet_in(data):
    """The bytes of a file's XMP, as Pillow finds them."""
    with Image.open(io.BytesIO(data)) as image:
        return image.info["xmp"]


@pytest.mark.parametrize("format", PICTURES)
def test_a_picture_says_who_made_it_and_from_what(format):
    image, plain = noise(), io.BytesIO()
    data = Encoder(format)(0, LINE, image).data
    fields = xmp.fields_in(Image.open(io.BytesIO(data)).info)
    assert fields["Iptc4xmpExt:DigitalSourceType"] == TRAINED and fields["xmp:CreatorTool"].startswith("basinescape")
    assert fields["Iptc4xmpExt:AIPromptInformation"] == LINE["prompt"] and prompt_in(data, "") == (LINE["prompt"], "")
    assert json.loads(fields["basinescape:settings"]) == {
        name: LINE[name] for name in ("seed", "steps", "scale", "negative_prompt")
    }
    image.save(plain, **PICTURES[format])
    assert Image.open(io.BytesIO(data)).tobytes() == Image.open(plain).tobytes()  # its pixels are as they were
    assert Encoder(format)(0, LINE, image).data == data


@pytest.mark.parametrize("format", PICTURES)
def test_a_prompt_may_be_left_out_but_not_the_mark(format):
    made = Encoder(format, prompt_metadata=False)(0, LINE, noise())
    assert xmp.fault_of(made.data) is None and prompt_in(made.data, "none given") == (None, "none given, and none in it")
    assert not {LINE["prompt"].encode(), b"unscharf", b"7.5"} & {*packet_in(made.data).split(b">")}
    assert b"Iptc4xmpExt:AI" not in packet_in(made.data)


@given(st.text(st.characters(exclude_categories=()), min_size=1))
@settings(max_examples=50, deadline=None)
def test_any_prompt_is_read_back_but_for_what_xml_cannot_hold(prompt):
    data = Encoder("png")(0, LINE | {"prompt": prompt}, noise()).data
    found = xmp.fields_in(Image.open(io.BytesIO(data)).info)["Iptc4xmpExt:AIPromptInformation"]
    assert xmp.fault_of(data) is None
    assert all(one in (other, "\ufffd") for one, other in zip(found, prompt, strict=True))


@pytest.mark.parametrize("format", PICTURES)
def test_a_prompt_that_is_too_long_for_a_file_costs_no_mark(format):
    data = Encoder(format)(0, LINE | {"prompt": "cat " * 20_000}, noise()).data
    assert xmp.fault_of(data) is None and prompt_in(data, "none")[0] is None


def test_fields_that_other_programs_write_as_attributes_are_read():
    attributes = {"Iptc4xmpExt:DigitalSourceType": TRAINED, "Iptc4xmpExt:AIPromptInformation": 'a "cat" & a dog'}
    given = " ".join(f"{name}={quoteattr(value)}" for name, value in attributes.items())
    text = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" {given}/></rdf:RDF></x:xmpmeta>'
    )
    assert xmp.fields_in({"xmp": text.encode() + b"\0"}) == attributes


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><x>&b;</x>'


@pytest.mark.parametrize("text", ["", "<x", "<x/>", BOMB, "\udcff"])
def test_xmp_that_is_broken_or_meant_to_harm_says_nothing(text):
    note = PngInfo()
    note.add_itxt("XML:com.adobe.xmp", text.encode("utf-8", "replace").decode())
    noise().save(file := io.BytesIO(), "PNG", pnginfo=note)
    assert "DigitalSourceType in its XMP is missing" in xmp.fault_of(file.getvalue())
    assert prompt_in(file.getvalue(), "no text beside it") == (None, "no text beside it, and none in it")


@pytest.mark.parametrize("format", [*PICTURES, *SHARDS])
@pytest.mark.parametrize("told", [True, False])
def test_all_pictures_of_a_run_are_marked_and_judged_by_their_own_prompts(pipe, tmp_path, format, told):
    pytest.importorskip(LIBRARIES.get(format, "PIL"))
    jobs = [Job(f"p{i}", f"ein Kätzchen {i}", i) for i in range(4)]
    make = {"format": format, "prompt_metadata": told, "steps": 1}
    bulkruns.make(stand_in(pipe), jobs, tmp_path, Guidance.cfg(2.0), **make)
    assert list(verify(tmp_path)) == []
    if format in PICTURES:
        (tmp_path / "manifest.jsonl").rename(tmp_path / "away")
        (tmp_path / "images" / "metadata.jsonl").unlink()
        found = {one.id: one.prompt for one in prompted(tmp_path / "images")}
        assert found == {job.id: job.prompt if told else None for job in jobs}


def test_a_picture_that_lost_its_mark_is_named(pipe, tmp_path):
    """Even one whose SHA-256 is right by a manifest that was changed with it."""
    bulkruns.make(stand_in(pipe), [Job(f"p{i}", "a cat", i) for i in range(3)], tmp_path, Guidance.cfg(2.0), steps=1)
    path = tmp_path / "images" / "p1.png"
    with Image.open(path) as image:
        image.load()
        Image.frombytes(image.mode, image.size, image.tobytes()).save(path)
    assert list(verify(tmp_path)) == [("images/p1.png", "is changed")]
    lines = [
        line | ({"sha256": sha256(path.read_bytes()).hexdigest()} if line["id"] == "p1" else {})
        for line in read_lines(tmp_path / "manifest.jsonl")
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((where, what),) = verify(tmp_path)
    assert where == "images/p1.png" and what.startswith("is not marked as made by a machine")


def test_a_run_of_before_there_were_marks_is_not_blamed_for_it(pipe, tmp_path):
    bulkruns.make(stand_in(pipe), [Job("a", "a cat", 0)], tmp_path, Guidance.cfg(2.0), steps=1)
    path = tmp_path / "images" / "a.png"
    with Image.open(path) as image:
        image.load()
        Image.frombytes(image.mode, image.size, image.tobytes()).save(path)
    (tmp_path / "images" / "metadata.jsonl").unlink()
    (line,) = read_lines(tmp_path / "manifest.jsonl")
    line["sha256"] = sha256(path.read_bytes()).hexdigest()
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    run = json.loads((tmp_path / "run.json").read_text())
    del run["prompt_metadata"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert list(verify(tmp_path)) == []


def test_the_commands_options_reach_the_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "a cat", "id": "{id}", "seed": 1}}\n' for id in "ab"))
    given = ("--prompts", tmp_path / "p.jsonl", "--steps", 1, "--guidance", "cfg", "--device", "cpu", "--out")
    asked = ("--captions", "--no-prompt-metadata", "--dedup", "--similarity", "pixels", "--format", "jpg")
    code, said = bulkruns.run(monkeypatch, capsys, *given, tmp_path / "out", *asked)
    assert code == 0 and "1 near-duplicates of other images of the set (b): see duplicate_of in manifest.jsonl" in said
    assert (tmp_path / "out" / "images" / "b.txt").read_text() == "a cat"
    assert prompt_in((tmp_path / "out" / "images" / "b.jpg").read_bytes(), "none")[0] is None
    assert [line.get("duplicate_of") for line in read_lines(tmp_path / "out" / "manifest.jsonl")] == [None, "a"]
    code, said = bulkruns.run(monkeypatch, capsys, *given, tmp_path / "other", "--c2pa-key", tmp_path / "key.pem")
    assert code == 2 and "c2pa_certificate and c2pa_key need each other: give both, or neither" in said
    assert not (tmp_path / "other").exists()
