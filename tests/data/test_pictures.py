"""Pictures as files hold them, and the one index that compares them: read as trainers read them, or named."""

import os

import numpy as np
import pytest
from basinescape.auditing.measures import squares
from basinescape.auditing.training_images import Copies, TrainingImages
from basinescape.bench.evaluation.measure import Measure
from basinescape.bench.scenario import Prompt, Scenario
from basinescape.data.pictures import images_in, opened, readings
from PIL import Image, ImageOps


def scene(seed=0, size=(64, 64)):
    """A picture of large patches, which survives a change of size."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def copied(path, picture, **options):
    (found,) = TrainingImages([path], ["pixels"], **options)([picture])
    return found["copy"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif", "avif", "ppm", "tga", "jp2"])
def test_a_copy_of_a_training_image_is_one_in_every_format(tmp_path, suffix):
    try:
        scene().save(tmp_path / f"a.{suffix.upper()}")
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"Pillow here writes no {suffix}: {error}")
    (path,) = images_in(tmp_path)
    assert copied(path, scene()) and not copied(path, scene(1))


def turned(path):
    noted = Image.Exif()
    noted[0x0112] = 6  # a quarter turn
    scene(size=(64, 48)).save(path, quality=95, exif=noted)


def test_a_picture_with_a_note_of_how_to_turn_it_is_compared_both_ways(tmp_path):
    turned(path := tmp_path / "a.jpg")
    upright = scene(size=(64, 48)).transpose(Image.Transpose.ROTATE_270)
    assert opened(path, "a").size == (48, 64) and [one.size for one in readings(path, "a")] == [(48, 64), (64, 48)]
    for size in ((64, 64), (48, 64), (64, 48)):
        assert copied(path, upright.resize(size)) and copied(path, scene(size=(64, 48)).resize(size))
    assert not copied(path, upright.transpose(Image.Transpose.ROTATE_180))


def grey16(path):
    values = np.asarray(scene().convert("L"), dtype=np.uint16) * 257
    Image.fromarray(values).save(path)


def grey16_dark(path):
    Image.fromarray(np.asarray(scene().convert("L"), dtype=np.uint16) * 40).save(path)


def float32(path):
    Image.fromarray(np.asarray(scene().convert("L"), dtype=np.float32) / 255).save(path)


def cmyk(path):
    scene().convert("CMYK").save(path, quality=95)


def palette(path):
    scene().quantize(64).save(path)


def frames(path):
    scene().save(path, save_all=True, append_images=[scene(1), scene(2)])


@pytest.mark.parametrize(
    ("save", "name", "grey"),
    [
        (grey16, "a.png", True),
        (grey16, "a.tif", True),
        (grey16_dark, "a.png", True),
        (float32, "a.tif", True),
        (cmyk, "a.jpg", False),
        (cmyk, "a.tif", False),
        (palette, "a.png", False),
        (frames, "a.gif", False),
        (frames, "a.webp", False),
        (frames, "a.png", False),
    ],
)
def test_unusual_pictures_are_read_as_what_they_show(tmp_path, save, name, grey):
    save(path := tmp_path / name)
    asked = scene().convert("L").convert("RGB") if grey else scene()
    assert copied(path, asked) and not copied(path, scene(1)) and not copied(path, ImageOps.flip(asked))
    far = np.abs(np.asarray(opened(path, "a"), dtype=float) - np.asarray(asked, dtype=float)).mean()
    assert far < 16 or save is grey16_dark


def test_what_transparency_hides_is_compared_with_and_without_it(tmp_path):
    hidden = scene(3).convert("RGBA")
    hidden.putalpha(Image.new("L", hidden.size, 0))
    hidden.paste(scene(3).crop((0, 0, 64, 32)).convert("RGBA"), (0, 0))
    hidden.save(path := tmp_path / "a.png")
    over_white = Image.new("RGB", hidden.size, "white")
    over_white.paste(scene(3).crop((0, 0, 64, 32)), (0, 0))
    assert copied(path, over_white) and copied(path, scene(3)) and not copied(path, scene(1))
    assert len(list(readings(path, "a"))) == 2
    scene(3).convert("RGBA").save(path)
    assert len(list(readings(path, "a"))) == 1


def broken(path):
    scene().save(path)
    path.write_bytes(path.read_bytes()[:-200])


def bomb(path):
    Image.new("1", (20000, 9000)).save(path)


def nothing(path):
    path.write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(broken, "truncated|cannot be read"), (bomb, "DecompressionBomb"), (nothing, "it is no picture of a known format")],
)
def test_a_picture_that_cannot_be_read_is_named_and_costs_no_other(tmp_path, spoil, why, caplog):
    spoil(bad := tmp_path / "bad.png")
    scene().save(good := tmp_path / "good.png")
    with pytest.raises(ValueError, match=rf"training image '.*bad\.png' cannot be read: .*{why}"):
        TrainingImages([bad, good], ["pixels"])
    index = TrainingImages([bad, good], ["pixels"], on_error="skip")
    assert index.images == [good] and index([scene()])[0]["copy"]
    assert "bad.png' cannot be read" in caplog.text and caplog.text.count("skipped") == 1
    with pytest.raises(ValueError, match="no training images that can be read"):
        TrainingImages([bad], ["pixels"], on_error="skip")


def test_what_is_passed_over_is_counted_and_named(tmp_path, caplog):
    scene().save(tmp_path / "a.png")
    scene().save(tmp_path / "without", format="JPEG")
    for name in ("b.heic", "c.heic", "d.svg", "e"):
        (tmp_path / name).write_text("x")
    for name in ("a.txt", "list.jsonl", ".hidden.png"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in images_in(tmp_path)] == ["a.png", "without"]
    assert "passed over 4 files that are no pictures (2 .heic, 1 .svg, 1 without a suffix), first 'b.heic'" in caplog.text
    assert "pipe.png is no regular file: passed over" in caplog.text and "gone.png is no regular file" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"images folder '.*none' does not exist"):
        images_in(tmp_path / "none")


SHAPES = [(64, 64), (96, 64), (64, 96), (128, 128), (160, 64), (65, 64)]


@pytest.mark.parametrize("training", SHAPES)
def test_a_pair_is_a_copy_for_an_evaluation_exactly_when_it_is_one_for_an_audit(tmp_path, training):
    """In whatever shapes: squeezed, cut to its middle, or another picture."""
    scene(size=training).save(path := tmp_path / "a.png")
    prompt = Prompt("a", "a", path)
    scenario = Scenario("x", str(tmp_path), "p", similarity="pixels")
    measure, index = Measure(scenario, {"memorized": [prompt]}), TrainingImages([path], ["pixels"])
    short = min(training)
    for shape in SHAPES:
        asked = [scene(size=training).resize(shape), ImageOps.fit(scene(size=training), (short, short)), scene(1, shape)]
        rows, found = measure(asked, [prompt] * 3), index(asked)
        assert [row["memorized"] for row in rows] == [one["copy"] for one in found] == [True, True, False]
        assert [row["similarity"] for row in rows] == pytest.approx([one["similarity"] for one in found], abs=1e-4)


def test_a_square_is_left_as_it_is_and_others_are_squeezed_and_cut():
    assert squares(scene()) == [scene()] and [one.size for one in squares(scene(), 32)] == [(32, 32)]
    squeezed, middle = squares(scene(size=(96, 64)))
    assert middle == scene(size=(96, 64)).crop((16, 0, 80, 64)) and squeezed.size == (64, 64) and squeezed != middle


def test_a_run_knows_training_images_that_were_replaced(tmp_path):
    scene().save(tmp_path / "a.png")
    before = Copies(tmp_path, ["pixels"]).settings
    assert Copies(tmp_path, ["pixels"]).settings == before
    scene(1).save(tmp_path / "a.png")
    assert Copies(tmp_path, ["pixels"]).settings != before
    scene().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert Copies(tmp_path, ["pixels"]).settings != before
