"""Boxes and names in a record's objects, as ms-swift has them, in the notation of each family."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from check_data import print_oddities
from families import build_family
from helpers import assistant, encoder_for, image, make_image, set_up, text, tiny_config, user
from util.data.files import DataHaveChanged, Records
from util.data.sample import IGNORE
from util.tools.generate import _read_prompts, held_out_answers, load_prompts

# Of a picture of 200 x 100 pixels, which is resized to 196 x 112, with Qwen3-VL to 192 x 96.
BOX, POINT = [20, 10, 100, 50], [30, 99]
BOX_TOKENS = "<|box_start|>(100,100),(500,500)<|box_end|>"
NAME_TOKENS = "<|object_ref_start|>cat<|object_ref_end|>"
# What the tags become: a name, a box, a point, a name with its box, a name with two.
PARTS = ["<ref-object>", "<bbox>", "<bbox>", "<ref-object><bbox>", "<ref-object><bbox><bbox>"]
EXPECTED = {
    "qwen2_vl": [
        *(NAME_TOKENS, BOX_TOKENS, "<|box_start|>(150,990)<|box_end|>"),
        *(NAME_TOKENS + BOX_TOKENS, NAME_TOKENS + BOX_TOKENS * 2),
    ],
    "qwen2_5_vl": [
        *("cat", "[20, 11, 98, 56]", "[29, 111]"),
        '{"bbox_2d": [20, 11, 98, 56], "label": "cat"}',
        '{"bbox_2d": [20, 11, 98, 56], "label": "cat"}, '
        '{"bbox_2d": [20, 11, 98, 56], "label": "cat"}',
    ],
    "qwen3_vl": [
        *("cat", "[100, 100, 500, 500]", "[150, 990]"),
        '{"bbox_2d": [100, 100, 500, 500], "label": "cat"}',
        '{"bbox_2d": [100, 100, 500, 500], "label": "cat"}, '
        '{"bbox_2d": [100, 100, 500, 500], "label": "cat"}',
    ],
}
EXPECTED["qwen3_5"] = EXPECTED["qwen3_vl"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One as it is stored, one of the same size that is stored on its side, a larger one."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [make_image(folder / f"{i}.png", *size) for i, size in enumerate([(100, 200)] * 2)]
    turned, orientation = Image.open(paths[1]).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    orientation[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=orientation)
    return [paths[0], str(folder / "turned.jpg"), make_image(folder / "2.png", 200, 400)]


@pytest.fixture(scope="module", params=EXPECTED)
def family(request, tiny_folder, tmp_path_factory):
    folder = build_family(request.param, tiny_folder, tmp_path_factory.mktemp(request.param))
    return request.param, encoder_for(folder, min_pixels=3136, max_pixels=1_000_000)


def record_of(answer: str, pictures: list[str], **objects) -> dict:
    tags = "<image>" * len(pictures)
    messages = [user(f"{tags}Where?"), assistant(answer)]
    return {"messages": messages, "images": pictures, "objects": objects}


def trained_text(encoder, record: dict) -> str:
    labels = encoder.encode(record).labels
    text = encoder.tokenizer.decode(labels[labels != IGNORE])
    assert encoder.measure(record)[1] == int((labels != IGNORE).sum())
    return text.removesuffix("<|im_end|>")


def test_tags_become_what_the_family_was_trained_on(family, pictures):
    name, encoder = family
    objects = {"ref": ["cat"] * 3, "bbox": [BOX, POINT, BOX, BOX, BOX]}
    for path in pictures[:2]:
        record = record_of(" | ".join(PARTS), [path], **objects)
        assert trained_text(encoder, record) == " | ".join(EXPECTED[name])
    # The same boxes in other units; as Arrow has them; in the second of two pictures.
    answer, box = f"At {EXPECTED[name][1]}.", {"bbox": [BOX], "ref": None}
    for objects, paths in (
        ({"bbox": [[0.1, 0.1, 0.5, 0.5]], "bbox_type": "norm1"}, pictures[:1]),
        ({"bbox": [[100, 100, 500, 500]], "bbox_type": "norm1000"}, pictures[:1]),
        (box | {"bbox_type": None, "image_id": None}, pictures[:1]),
        (box | {"bbox_type": "real", "image_id": [1]}, [pictures[2], pictures[0]]),
        ({"bbox": [[20.05, 9.96, 100.04, 50.02]]}, pictures[:1]),
    ):
        assert trained_text(encoder, record_of("At <bbox>.", paths, **objects)) == answer
    # A question has them too, and so have items of text; what a user writes around them stays.
    items = [image(pictures[0]), text("What is at <bbox>"), text("?")]
    written = '{"bbox_2d": <bbox>, "label": "<ref-object>"}'
    record = {"messages": [user(*items), assistant(written)]}
    messages = encoder.prepare(record | {"objects": {"bbox": [BOX, BOX], "ref": ["cat"]}})
    assert messages[0]["content"][1:] == [text(f"What is at {EXPECTED[name][1]}"), text("?")]
    expected = written.replace("<bbox>", EXPECTED[name][1])
    assert messages[1]["content"] == expected.replace("<ref-object>", EXPECTED[name][0])
    # What was written is not read again, and what is closed is another format's.
    assert encoder.prepare({"messages": messages}) == messages
    closed = "<bbox>1, 2</bbox> and <bbox>3, 4</bbox>"
    assert encoder.prepare({"messages": [user("Hi"), assistant(closed)]})[1]["content"] == closed


@pytest.mark.parametrize(
    "answer, objects, words",
    [
        ("<bbox><bbox>", {"bbox": [BOX]}, '<bbox> tags in the text: 2, but in "objects": 1'),
        ("no tag", {"bbox": [BOX]}, "tags in the text: 0"),
        ("<bbox>", {}, 'text: 1, but in "objects": 0'),
        ("<ref-object>", {"bbox": []}, '<ref-object> tags in the text: 1, but in "objects": 0'),
        ("<bbox>", {"bbox": [BOX], "ref": ["cat"]}, "<ref-object> tags in the text: 0"),
        ("<bbox>", {"bbox": [[20, 10, 210, 50]]}, "reaches out of picture 0, .* 200 x 100"),
        ("<bbox>", {"bbox": [[1, 2, 3, 10**400]]}, "reaches out of picture 0"),
        ("<bbox>", {"bbox": [[0.1, 0.1, 0.5, 1]]}, 'shares of the picture: "bbox_type": "norm1"'),
        ("<bbox>", {"bbox": [BOX], "bbox_type": "norm1"}, "counts to 1 x 1"),
        ("<bbox>", {"bbox": [BOX], "bbox_type": "xywh"}, "'xywh': must be one of real, norm1, "),
        ("<bbox>", {"bbox": [[100, 50, 20, 10]]}, "x1 up to x2"),
        ("<bbox>", {"bbox": [[1, 2, 3]]}, "a box is"),
        ("<bbox>", {"bbox": [["1", 2, 3, 4]]}, "a box is"),
        ("<bbox>", {"bbox": [[1, 2, 3, float("nan")]]}, "a box is"),
        ("<bbox>", {"bbox": BOX}, "20: a box is"),
        ("<bbox>", {"bbox": [BOX], "image_id": [1]}, "a box in picture 1, but there are 1"),
        ("<bbox>", {"bbox": [BOX], "image_id": [0, 0]}, "2 image_id, but 1 boxes"),
        ("<bbox>", {"bbox": [BOX], "categories": [1]}, "a key 'categories': it takes ref, bbox"),
        ("<ref-object>", {"ref": ["a <bbox>"]}, "without tags"),
        ("<ref-object>", {"ref": ["<|im_end|>"]}, "message 1: .* control token <|im_end|>"),
    ],
)
def test_boxes_that_cannot_be_right_are_refused(tiny_folder, pictures, answer, objects, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        encoder_for(tiny_folder).measure(record_of(answer, pictures[:1], **objects))


def test_boxes_are_written_before_answers_are_scored(tiny_folder, pictures, tmp_path, capsys):
    """In prompts, and in held-out data; records that differ in their boxes alone are no copies."""
    path, picture = tmp_path / "d.jsonl", Path(shutil.copy(pictures[0], tmp_path))
    boxes = [BOX, [0, 0, 200, 100], BOX]
    records = [
        record_of("<ref-object><bbox>", [str(picture)], ref=["cat"], bbox=[b]) for b in boxes
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    whole = NAME_TOKENS + "<|box_start|>(0,0),(1000,1000)<|box_end|>"
    expected = [NAME_TOKENS + BOX_TOKENS, whole, NAME_TOKENS + BOX_TOKENS]
    data = set_up(tiny_config(train_data=[str(path)]), tiny_folder).data
    assert [p.reference for p in load_prompts(str(path), data.samples.encoder)] == expected
    assert held_out_answers(data, 3) == dict(enumerate(expected))
    assert _read_prompts(data, [0, 1, 2])[1:] == (expected, [])
    print_oddities(Records([str(path)]), data.index)
    assert f"duplicates: 1\n  {path}: line 3 repeats {path}: line 1\n" in capsys.readouterr().out
    # What is wrong since then is told with the prompt, and ends the run where no step can go on.
    picture.unlink()
    assert held_out_answers(data, 2) == {0: "", 1: ""}
    assert "line 2: message 0: no such file" in _read_prompts(data, [1])[2][0]
    path.write_text(path.read_text() + "\n")
    for read in (lambda: held_out_answers(data, 1), lambda: _read_prompts(data, [1])):
        with pytest.raises(DataHaveChanged):
            read()
