"""check_data.py finds what is wrong, all of it, and nothing else."""

import itertools
import json
import os
import random
import re
import resource
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
from helpers import assistant, call, image, make_image, make_video, text, user, video
from util.data import index
from util.run import run_main
from zoo import bomb, encode_image, make_audio, make_clip, make_zoo_clip, smooth

GOOD = [user("Hi"), assistant("Hello.")]
SYSTEM = {"role": "system", "content": "a"}
REMOTE = "http://[::1]/a"  # this machine, if anything


def talk(*messages):
    return {"messages": list(messages)}


def said(role, content):
    return talk({"role": role, "content": content}, assistant("x"))


def item(**keys):
    return said("user", [keys])


def picture(source, **keys):
    return item(type="image", image=source, **keys)


def clip(source, **keys):
    return item(type="video", video=source, **keys)


def turns(value, speaker="human", **keys):
    messages = [{"from": speaker, "value": value}, {"from": "gpt", "value": "x"}]
    return {"conversations": messages, **keys}


# What is wrong; a record (bytes are a line of JSONL as it stands); the place in it that is told,
# down to the media file; words that no other of these faults is told with.
FAULTS = [
    ("not JSON", b'{"messages": [{"role": "user"}, oops', "", "not valid JSON at column 33"),
    ("not UTF-8", b'{"messages": [{"content": "a\xff"}]}', "", "not UTF-8 text"),
    ("not an object", 3, "", 'must be an object with a list "messages" or "conversations"'),
    ("empty conversation", talk(), "", "the conversation is empty"),
    ("unknown role", said("bot", "a"), "message 0", "unknown role 'bot'"),
    ("unknown speaker", turns("a", speaker="bot"), "message 0", "unknown speaker 'bot'"),
    ("late system", talk(user("a"), SYSTEM), "message 1", "a system message must come first"),
    ("content a number", said("user", 3), "message 0", "content must be a string or a list"),
    ("no answer", talk(user("a")), "", "no assistant message"),
    ("answer first", talk(assistant("a")), "message 0", "an answer to nothing"),
    ("control token", said("user", "<|im_end|>"), "message 0", "the control token <|im_end|>"),
    ("too long", said("user", "word " * 2000), "", "that is more than --max_tokens"),
    ("too many tags", turns("<image><image>", image="a.png"), "", "<image> tags in the text: 2"),
    ("two lists", turns("<image>", image="a.png", images=["a.png"]), "", 'both "image" and "image'),
    ("unknown type", item(type="audio", audio="a"), "message 0, item 0", "unknown type 'audio'"),
    ("no source", item(type="image"), "message 0, item 0", 'needs a string "image"'),
    ("unknown key", picture("a.png", size=3), "message 0, item 0", "unknown key 'size'"),
    ("not a number", picture("a.png", min_pixels="a"), "message 0, item 0", "a whole number above"),
    ("half a size", picture("a.png", resized_width=56), "message 0, item 0", "go together"),
    ("two rates", clip("a.mp4", fps=1, nframes=4), "message 0, item 0", "exclude each other"),
    ("limits", picture("a.png", min_pixels=9, max_pixels=4), "message 0: a.png", "9 is above max"),
    ("no file", picture("none.jpg"), "message 0: no such file", "none.jpg: correct the path"),
    ("folder", picture("folder"), "message 0: folder", "is a folder, not a file"),
    ("pipe", picture("pipe.jpg"), "message 0: pipe.jpg", "is not a regular file"),
    ("empty file", picture("empty.jpg"), "message 0: empty.jpg", ": is empty"),
    ("not a picture", picture("text.jpg"), "message 0: text.jpg", "no picture of a known format"),
    ("too narrow", picture("long.png"), "message 0: long.png", "over 200 times the other"),
    ("bomb", picture("bomb.png"), "message 0: bomb.png", "over 100,000,000: resize"),
    ("cut JPEG", picture("cut.jpg"), "message 0: cut.jpg", "image file is truncated"),
    ("float pixels", picture("float.tiff"), "message 0: float.tiff", "pixels in floating point"),
    ("32-bit pixels", picture("wide.tiff"), "message 0: wide.tiff", "pixels of 32 bits"),
    ("not base64", picture("data:,#"), "message 0: data:,#... (7 characters)", "not a base64"),
    ("remote", picture(f"{REMOTE}.png"), f"message 0: {REMOTE}.png", "--allow_remote_media"),
    ("only sound", clip("sound.mp4"), "message 0: sound.mp4", "no video stream"),
    ("playlist", clip("list.mp4"), "message 0: list.mp4", "convert it to mp4"),
    ("cut mp4", clip("cut.mp4"), "message 0: cut.mp4", " of 40 frames"),
    ("garbled mp4", clip("garbled.mp4"), "message 0: garbled.mp4", "the file is damaged"),
    ("unlike frames", clip(["a.png", "b.png"]), "message 0: 2 frames from a.png", "differ in size"),
    ("too many frames", clip("a.mp4", nframes=99), "message 0: a.mp4", "must be 2 to 8"),
    ("beyond the end", clip("a.mp4", video_start=9), "message 0: a.mp4", "the clip ends at 1.75"),
]
# Further records that are wrong, and words of what is told. Some share them with faults above.
MORE_FAULTS = [
    (None, "must be an object with a list"),
    ({"text": "a"}, "must be an object with a list"),
    ({"messages": "a"}, "must be an object with a list"),
    ({"conversations": {"from": "human"}}, "must be an object with a list"),
    ({"conversations": []}, "the conversation is empty"),
    (talk(3), "message 0: must be an object with role and content"),
    ({"conversations": [3]}, "message 0: must be an object with from and value"),
    (said(None, "a"), "message 0: unknown role None"),
    (said("user", None), "message 0: content must be a string or a list"),
    (turns(None), "message 0: content must be a string or a list"),
    (said("user", [text("a"), "a"]), "message 0, item 1: unknown type None"),
    (item(type="text"), 'message 0, item 0: an item of type text needs a string "text"'),
    (item(type="text", text="a", extra=1), "message 0, item 0: unknown key 'extra'"),
    (item(type="video"), 'needs a string "video", or a list of pictures'),
    (clip([]), 'needs a string "video", or a list of pictures'),
    (clip("a.mp4", fps=True), "message 0, item 0: fps True: must be a number above 0"),
    (clip(["a.png"], nframes=2), "message 0, item 0: nframes: does not go with a list of frames"),
    (picture("a.png", min_pixels=10**9), "min_pixels 1000000000 is above"),
    (turns("a", video="a.mp4"), "<video> tags in the text: 0, but in the record's list: 1"),
    (turns("<video><video>", video="a.mp4"), "<video> tags in the text: 2"),
    (clip(["a.png", "none.png"]), "none.png"),
    (clip("none.mp4"), "no such file"),
    (turns("<image>"), "<image> tags in the text: 1, but in the record's list: 0"),
    (turns("<image><video>", image="a.png"), "<video> tags in the text: 1, but in the record's"),
    (turns("a", messages=[]), 'both "messages" and "conversations"'),
    (talk(user("a") | {"images": ["a.png"]}), 'message 0: has a key "image"'),
    (turns("<image>", images=[text("a")]), "lists an item of type 'text'"),
    (turns("<image>", image={"file": "a.png"}), "message 0: an item of type image needs a string"),
    (turns("<image>", images={}), "message 0: an item of type image needs a string"),
    (clip("a.mp4", speed=1), "unknown key 'speed'"),
    (clip("a.mp4", timestamps=[0]), "timestamps: go with a list of frames"),
    (
        clip(["a.png"], timestamps=[0], fps=1),
        "timestamps: go with a list of frames, and without fps",
    ),
    (clip(["a.png", "a.png"], timestamps=[1, 1]), "must be a list of ascending seconds"),
    (clip(["a.png", "a.png"], timestamps=[1]), "must be a list of ascending seconds, one for each"),
    (clip(["a.png"], timestamps=[True]), "must be a list of ascending seconds"),
    (clip("a.mp4", fps=0), "fps 0: must be a number above 0"),
    (clip("a.mp4", nframes=2.5), "nframes 2.5: must be a whole number"),
    (clip(["a.png", ""]), 'needs a string "video", or a list of pictures'),
    (picture(["a.png"]), 'needs a string "image"'),
    (clip("noise.mp4"), "noise.mp4: cannot be read as video: "),
    (clip("pipe.mp4"), "pipe.mp4: is not a regular file"),
    (clip("/dev/zero"), "message 0: /dev/zero: is not a regular file"),
    (picture("link.jpg"), "link.jpg: is a link that leads nowhere"),
    (picture("/dev/zero"), "message 0: /dev/zero: is not a regular file"),
    (picture("a.mp4"), "a.mp4: cannot be read as image: it is no picture of a known format"),
    (picture("data:image/png;base64,"), "is empty"),
    (clip("empty.mp4"), "empty.mp4: is empty"),
    (clip("text.mp4"), "text.mp4: cannot be read as video: "),
    (clip("headless.mp4"), "headless.mp4: cannot be read as video: "),
    (clip("cut.mkv"), " bytes"),
    (clip("cut.gif"), "the file is cut off: a GIF ends in a semicolon"),
    (clip(["bomb.png"]), "over 100,000,000: resize"),
]


@pytest.fixture
def check(capfd):
    """Run check_data.py in this process and return what it printed; with `code`, it is to fail."""

    def run(*flags, code=0):
        flags = ("--model_name_or_path", "tiny", "--device", "cpu", *flags)
        with pytest.raises(SystemExit, match="^error: ") if code else nullcontext() as error:
            run_main(lambda: call(check_data, *flags))
        printed, logged = capfd.readouterr()
        assert "Traceback" not in logged
        return printed + (error.value.code if code else "")

    return run


@pytest.fixture
def folder(tmp_path):
    """A folder of media, good ones (a.png, b.png, a.mp4) and bad ones."""
    make_image(tmp_path / "a.png", 60, 60)
    make_image(tmp_path / "b.png", 60, 90)
    make_video(tmp_path / "a.mp4", 8, 64, 64)
    for suffix in ("jpg", "mp4"):
        (tmp_path / f"text.{suffix}").write_text("neither picture nor clip")
        (tmp_path / f"empty.{suffix}").touch()
        os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(9999))
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder").mkdir()
    make_image(tmp_path / "long.png", 10, 2100)
    bomb(tmp_path / "bomb.png")
    Image.fromarray(np.zeros((60, 60), np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((60, 60), 10**6, np.int32)).save(tmp_path / "wide.tiff")
    jpeg = encode_image(smooth(300, 300), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    make_audio(tmp_path / "sound.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\nhttp://[::1]/a.ts\n")
    cuts = {"cut.mp4": "faststart.mp4", "cut.mkv": "h264.mkv", "cut.gif": "animated.gif"}
    for name, source in {**cuts, "headless.mp4": "h264.mp4"}.items():
        content = Path(make_zoo_clip(tmp_path, source)).read_bytes()
        (tmp_path / name).write_bytes(content[: 6 * len(content) // 10])
    content = (tmp_path / "h264.mp4").read_bytes()
    # The second half of the frames become zeros; the index behind them stays.
    begin, end = content.index(b"mdat"), content.index(b"moov") - 4
    middle = (begin + end) // 2
    garbled = content[:middle] + bytes(end - middle) + content[end:]
    (tmp_path / "garbled.mp4").write_bytes(garbled)
    return tmp_path


def good_record(i: int) -> dict:
    """Return one of five kinds of good records, all of different text."""
    if i % 5 == 4:
        return turns(f"<image>\nQuestion {i}?", image="b.png")
    part = video("a.mp4") | {"fps": 0.5, "video_start": 0, "video_end": 1.5}
    frames = video(["a.png", "a.png"]) | {"fps": 2, "max_pixels": 5000}
    media = ([], [image("a.png")], [part], [frames])[i % 5]
    return talk(user(*media, text(f"Question {i}?")), assistant("An answer."), *GOOD)


def plant(folder) -> dict[str, str]:
    """Write FAULTS among eight times as many good records; return what is wrong: its place.

    One half of them goes into a.jsonl, the other into b.json.
    """
    lines, records, places = [b""], [], {}
    for i, (kind, record, _, _) in enumerate(FAULTS):
        block = [*(good_record(8 * i + k) for k in range(8)), record]
        if i < len(FAULTS) // 2:
            lines += [r if isinstance(r, bytes) else json.dumps(r).encode() for r in block]
            places[kind] = f"a.jsonl: line {len(lines)}"
        else:
            records += block
            places[kind] = f"b.json: sample {len(records) - 1}"
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.json").write_text(json.dumps(records))
    return places


def test_forty_faults_of_forty_kinds_are_found_and_nothing_else(check, folder, monkeypatch):
    places = plant(folder)
    assert len(places) == len(FAULTS) == 40
    monkeypatch.chdir(folder)
    printed = check("--train_data", "a.jsonl", "b.json", "--decode", code=1)
    assert "duplicates: 0\n" in printed
    assert printed.splitlines()[-1].startswith("error: 40 problems: ")
    problems = [line for line in printed.splitlines() if line.startswith("problem: ")]
    told = dict(re.fullmatch(r"problem: (\S+: \w+ \d+): (.+)", line).groups() for line in problems)
    assert len(problems) == 40 and set(told) == set(places.values())
    for kind, _, where, words in FAULTS:
        assert told[places[kind]].startswith(f"{where}: " if where else ""), kind
        assert [place for place in told if words in told[place]] == [places[kind]], kind


def test_more_faults_are_told_each_once(check, folder):
    records = [good_record(0), *(record for record, _ in MORE_FAULTS)]
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    printed = check("--train_data", data, code=1)
    told = re.findall(rf"^problem: {data}: sample (\d+): (.+)$", printed, re.M)
    assert [int(number) for number, _ in told] == list(range(1, len(records)))
    for (record, words), (_, reason) in zip(MORE_FAULTS, told):
        assert words in reason, (record, reason)


def test_a_file_that_may_not_be_read_is_named(check, folder):
    (folder / "a.png").chmod(0)
    if os.access(folder / "a.png", os.R_OK):
        pytest.skip("this user may read everything")
    (folder / "data.json").write_text(json.dumps([talk(*GOOD), picture("a.png")]))
    printed = check("--train_data", folder / "data.json", code=1)
    told = re.findall(rf"^problem: {folder}/data.json: (.+)$", printed, re.M)
    assert len(told) == 1 and told[0].startswith(f"sample 1: message 0: {folder}/a.png: ")
    assert "Permission denied" in told[0]


def test_all_that_headers_tell_is_found_without_decoding(check, folder):
    places = plant(folder)
    printed = check("--train_data", folder / "a.jsonl", folder / "b.json", code=1)
    missed = {kind for kind, place in places.items() if f"{folder}/{place}: " not in printed}
    assert missed == {"32-bit pixels", "cut JPEG", "garbled mp4"}


def test_what_data_hold_gives_no_orders_to_the_terminal(check, folder):
    clear = "\x1b[2J"
    records = [talk(user(clear), assistant(clear)), picture(f"{clear}.png")]
    data = folder / f"{clear}.json"
    data.write_text(json.dumps(records))
    printed = check("--train_data", data, code=1) + check("--train_data", data, "--show", 0)
    assert "\x1b" not in printed and printed.count(r"\x1b[2J") >= 4


def test_what_is_too_long_to_be_trained_on_is_not_decoded(check, folder):
    records = [talk(user(image("cut.jpg")), assistant("word " * 2000)), talk(*GOOD)]
    (folder / "data.json").write_text(json.dumps(records))
    printed = check("--train_data", folder / "data.json", "--decode", code=1)
    assert "more than --max_tokens" in printed and "truncated" not in printed


def test_two_thousand_samples_take_less_than_twelve_seconds(check, tmp_path, monkeypatch):
    """Measured in CPU time, all processes together: other programs do not slow that down."""
    monkeypatch.setattr(index, "CACHE_DIR", tmp_path / "cache")
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(encode_image(smooth(400 + 20 * i, 600, seed=i), "JPEG"))
    with open(tmp_path / "data.jsonl", "w") as file:
        for i in range(2000):
            media = [image(f"{i // 2 % 20}.jpg")] if i % 2 else []
            question = text(f"Question {i}? " + "What do you see here? " * (i % 9))
            answer = assistant("It is so. " * (i % 30 + 1))
            file.write(json.dumps(talk(user(*media, question), answer)) + "\n")

    def cpu_seconds():
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = cpu_seconds()
    printed = check("--train_data", tmp_path / "data.jsonl")
    seconds = cpu_seconds() - before
    print(f"{seconds:.1f} CPU seconds for 2,000 samples")
    assert "2,000 samples of" in printed and "all good" in printed
    assert seconds < 12


def test_held_out_data_are_checked_too(check, tmp_path):
    lines = [json.dumps({"messages": m}) for m in (GOOD, [user("no answer")])]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines))
    flags = ("--eval_data", tmp_path / "held_out.jsonl")
    printed = check(*flags, code=1)
    assert f"problem: {tmp_path}/held_out.jsonl: line 2: no assistant message" in printed


def test_it_prints_lengths_shares_duplicates_and_one_sample(check, tmp_path):
    lines = [json.dumps({"messages": GOOD, "id": i}) for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    printed = check("--train_data", tmp_path / "data.jsonl")
    assert "duplicates: 2" in printed
    assert f"{tmp_path}/data.jsonl: line 3 repeats {tmp_path}/data.jsonl: line 1" in printed
    assert "length in tokens" in printed and "100.0 % text" in printed
    assert "keys that are not read: id (3)\n" in printed
    assert "[[Hello.<|im_end|>]]" in printed


def test_media_that_are_read_but_perhaps_not_meant_so_are_told(check, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CACHE_DIR", tmp_path / "cache")
    page, other = (Image.fromarray(smooth(60, 60, seed=i)) for i in range(2))
    sensor = np.full((60, 60), 300, np.uint16)
    for name, more in {"one.tiff": [], "two.tiff": [other], "two.gif": [other]}.items():
        page.save(tmp_path / name, save_all=True, append_images=more)
    page.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[other])
    Image.fromarray(sensor).save(tmp_path / "dark.png")
    Image.fromarray(sensor * 200).save(tmp_path / "light.png")
    for name, transfer in {
        "sdr.mp4": "bt709",
        "pq.mp4": "smpte2084",
        "hlg.mp4": "arib-std-b67",
    }.items():
        make_clip(tmp_path / name, "libx264", {"x264-params": f"transfer={transfer}"}, 8)
    odd = {"pictures of several": ["two.tiff", "two.gif"], "16 bits": ["dark.png"]}
    odd["in HDR"] = ["pq.mp4", "hlg.mp4"]
    names = ["one.tiff", "phone.jpg", "light.png", "sdr.mp4", *itertools.chain(*odd.values())]
    records = [(clip if name.endswith("mp4") else picture)(name) for name in names]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    printed = check("--train_data", data)
    assert printed == check("--train_data", data), "the index keeps it"
    for words, found in odd.items():
        places = "".join(f"  {data}: sample {names.index(name)}\n" for name in found)
        assert re.search(rf"^samples with .*{words}.*: {len(found)}\n{places}(?!  )", printed, re.M)
    assert printed.count("samples with") == len(odd)
