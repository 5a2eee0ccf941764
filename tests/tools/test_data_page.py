"""The page of check_data.py in a real browser. UPDATE_SCREENSHOTS=1 renews docs/data.png."""

import base64
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import check_data
import helpers
from helpers import assistant, call, image, shown, text, user, video
from util.config import UserError

UPDATE = os.environ.get("UPDATE_SCREENSHOTS") == "1"
ATTACK = "<script>document.title='owned'</script>"
HOSTILE = "a\"b'<i>.jpg"
BOX = "<|object_ref_start|>square<|object_ref_end|><|box_start|>(250,250),(500,750)<|box_end|>"
OUTSIDE = "<|box_start|>(900,900),(1100,1000)<|box_end|>"
PINK = (255, 45, 135)


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory):
    """A page, data.html, of data.json and more.jsonl: four samples are good, three are bad."""
    folder = tmp_path_factory.mktemp("page")
    # Black, 224 x 112, with a white square where BOX is; stored on its side.
    pixels = np.zeros((112, 224), np.uint8)
    pixels[28:84, 56:112] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / HOSTILE, "JPEG", exif=exif, quality=95)
    helpers.make_image(folder / "b.png", 84, 56)
    helpers.make_video(folder / "a.mp4", 16, 64, 64, fps=4)
    (folder / "cut.jpg").write_bytes((folder / HOSTILE).read_bytes()[:600])
    two = [image("b.png"), image(HOSTILE)]
    conversations = [
        [user(image(HOSTILE), text(f"{ATTACK} {OUTSIDE}")), assistant(f"A {BOX}\n\nand.")],
        [user(video("a.mp4"), text("How bright?")), assistant("Brighter."), user("And then?")],
        [user(image("cut.jpg"), text("What?")), assistant("Cut off.")],
        [user("word " * 500), {**assistant("Context."), "loss": False}, user("?"), assistant("x")],
        [user(image("missing.jpg")), assistant("Nothing.")],
        [user(*two, text("Where?")), assistant(BOX), user("Hm?"), assistant("There.")],
    ]
    helpers.write_data(folder / "data.json", conversations)
    (folder / "more.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "line 1"}, oops\n'
    )
    flags = ("--train_data", "data.json", "--eval_data", "more.jsonl", "--device", "cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        with pytest.raises(UserError, match="3 problems"):
            call(check_data, *flags, "--page", "data.html")
        with pytest.raises(UserError, match="would overwrite"):
            call(check_data, *flags, "--page", "more.jsonl")
        monkeypatch.setattr("util.tools.data_page.MAX_MEDIA_BYTES", 3000)
        with pytest.raises(UserError, match="2 problems"):
            call(check_data, *flags, "--page", "few.html", "--page_samples", 2)
    return folder


@pytest.fixture
def page(folder, open_page):
    return open_page(folder / "data.html")


def test_filters_and_search(page):
    places = [f"data.json: sample {i}" for i in range(6)] + ["more.jsonl: line 1"]
    assert shown(page) == places
    chosen = {"Images": [0, 5], "Videos": [1], "Long": [3], "Problems": [2, 4, 6]}
    for name, numbers in chosen.items():
        page.get_by_role("button", name=name).click()
        assert shown(page) == [places[i] for i in numbers]
        assert page.get_by_role("status").inner_text() == f"{len(numbers)} of 7"
        pressed = page.get_by_role("button", pressed=True).all_text_contents()
        assert [text.split()[0] for text in pressed] == [name]
    search = page.get_by_role("searchbox")
    search.fill("bright")
    assert shown(page) == [] and page.get_by_text("No sample matches").is_visible()
    search.fill("missing")  # it holds together with what is chosen
    assert shown(page) == places[4:5]
    # The list of problems leads to a sample, whatever is chosen.
    page.get_by_role("link", name=places[6]).click()
    assert shown(page) == places and page.locator("#s7").bounding_box()["y"] < 900
    # All words, in any order and case.
    found = {"BRIGHT how": [1], "a.mp4": [1], "json: line": [], "line 1": [6], "": range(7)}
    for words, numbers in found.items():
        search.fill(words)
        assert shown(page) == [places[i] for i in numbers]


def test_every_problem_has_its_file_and_line(page):
    listed = page.locator(".problems li").all_text_contents()
    for line, (place, reason) in zip(
        listed,
        [
            ("data.json: sample 2 message 0: cut.jpg", "truncated"),
            ("data.json: sample 4 message 0:", "no such file"),
            ("more.jsonl: line 1", "not valid JSON at column 54"),
        ],
        strict=True,
    ):
        assert line.startswith(place) and reason in line
    card = page.locator("#s5")
    # Not inner_text(): the page need not have drawn what is further down (content-visibility).
    assert "no such file" in card.locator(".reason").text_content()
    assert '"image": "missing.jpg"' in card.locator(".record").text_content()


def colors_in(locator, tmp_path):
    """Return a function from a place in an element, in shares of it, to the colours there."""
    locator.screenshot(path=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as shot:
        pixels = np.array(shot.convert("RGB"), int)
    height, width = pixels.shape[:2]
    return lambda x, y: pixels[round(y * height) - 1 :, round(x * width) - 1 :][:2, :2]


def near(a, b, most=40):
    return abs(a - np.array(b)).max() < most


@pytest.mark.parametrize("number", [1, 6])
def test_a_box_stands_where_it_is_in_the_upright_picture(page, number, tmp_path):
    picture = page.locator(f"#s{number} figure button").last
    names = picture.locator("text")
    assert "square" in names.all_text_contents()
    names.evaluate_all("names => names.forEach((name) => name.remove())")
    width = picture.bounding_box()["width"]
    for is_wide in (False, True):
        colors = colors_in(picture, tmp_path)
        step = 8 / picture.bounding_box()["width"]
        for x, y, dx, dy in (
            (0.25, 0.6, 1, 0),
            (0.5, 0.6, -1, 0),
            (0.4, 0.25, 0, 2),
            (0.4, 0.75, 0, -2),
        ):
            assert any(near(color, PINK) for color in colors(x, y).reshape(-1, 3))
            assert near(colors(x + dx * step, y + dy * step), 255), "a square inside"
            assert near(colors(x - dx * step, y - dy * step), 0), "and nothing outside"
        picture.click()
        assert (picture.bounding_box()["width"] > 1.5 * width) != is_wide
    wrong = page.locator("rect.wrong").all()
    assert [rect.get_attribute("width") for rect in wrong] == ["20.00%"]


def test_boxes_that_several_pictures_share_are_said_to(page):
    captions = page.locator("#s6 figcaption").all_text_contents()
    assert len(captions) == 2 and all("all have all boxes" in caption for caption in captions)
    assert page.locator("#s6 rect.trained").count() == 2
    assert "boxes" not in page.locator("#s1 figcaption").text_content()


def test_a_frame_is_the_one_of_its_time(page):
    seen = []
    for figure in page.locator("#s2 figure").all():
        uri = figure.locator("img").get_attribute("src")
        strip = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        times = figure.locator("figcaption span").all_text_contents()
        for k, time in enumerate(times):
            level = strip.getpixel(((k + 0.75) * strip.width / len(times), 0.75 * strip.height))
            seen.append(float(time.removesuffix(" s")))
            assert near(level, 255 * (4 * seen[-1]) / 15, most=9), time
    assert seen[0] == 0 and seen[-1] == 3.75 and seen == sorted(set(seen)) and len(seen) == 8
    caption = page.locator("#s2 .clip .label").inner_text().strip()
    assert caption == "a.mp4 \u2013 8 frames of 84 x 84 pixels, 9 tokens for every two"


def test_what_is_marked_is_what_is_trained(page, folder, tiny_folder):
    encoder = helpers.encoder_for(tiny_folder)
    records = json.loads((folder / "data.json").read_text())
    for i in (0, 1, 3, 5):
        sample = encoder.encode(records[i], folder)
        is_trained, types = sample.labels != -100, encoder.token_types(sample.input_ids)
        marked = page.locator(f"#s{i + 1} mark").all_text_contents()
        assert "".join(marked) == encoder.tokenizer.decode(sample.input_ids[is_trained])
        everything = "".join(page.locator(f"#s{i + 1} .turn").all_text_contents())
        plain = [part.rpartition(">")[0] for part in everything.split(" x ")]
        counts = page.locator(f"#s{i + 1} header .muted").text_content()
        assert counts.startswith(f"{len(types):,} tokens: {int(is_trained.sum()):,} trained")
        assert len(plain) - 1 == len(sample.grids)


def test_hostile_text_and_names_are_shown_as_they_are(page):
    assert page.title() == "data.json more.jsonl" and ATTACK in page.locator("#s1").inner_text()
    assert HOSTILE in page.locator("#s1 figcaption").text_content()
    assert page.locator("#s1 img").get_attribute("alt") == HOSTILE


def test_lengths_and_shares(page):
    assert page.locator(".summary h2").all_text_contents()[0].startswith("5 samples of ")
    rows = [row.split("\t") for row in page.locator(".scores tr").all_inner_texts()]
    counts = [int(row[1].replace(",", "")) for row in rows]
    assert page.get_by_text(f"{sum(counts[:3]):,} tokens").is_visible()
    assert [row[0] for row in rows] == ["Text", "Images", "Videos", "Trained"]
    assert sum(float(row[2].split("\u2009")[0]) for row in rows[:3]) == pytest.approx(100, abs=0.2)
    bars = page.locator(".chart .bar")
    assert sum(int(label) for label in page.locator(".chart .bar + text").all_text_contents()) == 5
    assert all(bar.bounding_box()["height"] > 0 for bar in bars.all())


def test_only_so_many_samples_and_pictures_are_shown(folder, open_page):
    page = open_page(folder / "few.html")
    numbers = [place.rpartition(" ")[2] for place in shown(page)]
    assert numbers == ["0", "1", "4", "1"]
    assert page.locator("img").count() == 1
    assert page.locator("#s2").get_by_text("left out: the page holds").count() == 4


def renew_screenshot(folder, open_page):
    """Show a copy of train_data with boxes, a clip and a mistake in it."""
    shutil.copytree(helpers.REPO / "train_data", folder / "photos")
    records = json.loads((folder / "photos" / "data.json").read_text(encoding="utf-8"))
    boxes = {"patch": (255, 675, 410, 830), "helmet": (540, 670, 985, 999)}
    boxes["shuttle"] = (690, 0, 895, 560)
    found = [
        f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({a},{b}),({c},{d})<|box_end|>"
        for name, (a, b, c, d) in boxes.items()
    ]
    question = user(image("astronaut.jpg"), text("Find all that has to do with space."))
    records[3]["messages"] = [question, assistant("\n".join(found))]
    records[4]["messages"][1]["content"] += "<|im_end|>"
    order = [3, 9, 0, *{*range(len(records))} - {0, 3, 9}]
    (folder / "photos" / "data.json").write_text(json.dumps([records[i] for i in order]))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(UserError):
        monkeypatch.chdir(folder / "photos")
        call(check_data, "--train_data", "data.json", "--device", "cpu", "--page", "data.html")
    page = open_page(folder / "photos" / "data.html")
    page.set_viewport_size({"width": 1200, "height": 1490})
    page.screenshot(path=folder / "data.png")
    Image.open(folder / "data.png").convert("RGB").quantize(kmeans=1).save(
        helpers.REPO / "docs" / "data.png"
    )


def test_looks(folder, open_page, check_looks):
    elements = "#s1 :not(svg *), #s2 *"
    is_light = check_looks(folder / "data.html", "#s1 figure", "#s1 .turn", elements)
    if UPDATE and is_light:
        renew_screenshot(folder, open_page)
