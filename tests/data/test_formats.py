"""The three formats of conversations, JSON and JSONL, several files and their rates."""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assistant, encoder_for, image, make_image, text, tiny_config, user
from util.config import UserError
from util.data import index as index_module
from util.data import keys, workers
from util.data.batch import prepare_data
from util.data.conversation import parse_conversation
from util.data.files import Records
from util.data.index import Index, build_index
from util.data.plan import Plan
from util.data.sample import IGNORE
from util.run import StopSignal

EXPECTED = [
    {"role": "system", "content": "Be brief."},
    user(image("a.png"), text("What is "), image("b.png"), text("this?")),
    assistant("A cat."),
]


def test_the_three_formats_give_the_same_conversation():
    tagged = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is <image>this?"},
        {"role": "assistant", "content": "A cat."},
    ]
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat is <image>this?"},
        {"from": "gpt", "value": "A cat."},
    ]
    for record in (
        {"messages": EXPECTED},
        {"messages": tagged, "images": ["a.png", "b.png"], "videos": None},
        {"conversations": turns, "image": ["a.png", "b.png"]},
        {"conversations": turns, "images": [{"image": "a.png"}, "b.png"], "id": 7},
    ):
        assert parse_conversation(record) == EXPECTED
    # Where content is typed, tags are text.
    typed = [user(text("what is <image>?"))]
    assert parse_conversation({"messages": typed}) == typed


def test_a_single_video_as_llava_writes_it():
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Rain."}]
    messages = parse_conversation({"conversations": turns, "video": "a.mp4", "image": None})
    assert messages[0]["content"] == [{"type": "video", "video": "a.mp4"}, text("What?")]
    turns[0]["value"] = "<image>\nWhat?"  # as LLaVA-Video does
    assert parse_conversation({"conversations": turns, "video": "a.mp4"}) == messages
    # As rows of several formats come out of Arrow.
    record = {"conversations": None, "messages": messages, "image": None}
    assert parse_conversation(record) == messages


# What a message about a record begins with: the message in it, or what is wrong with all of it.
PLACES = re.compile(
    r"message \d+\b|must be an object|the conversation is empty|<\w+> tags in|both |\"\w+\" lists|"
    r"no assistant message|nothing to train|not valid JSON at column \d+|not UTF-8 text|"
    r"not JSON that Python can read"
)
# A picture of one pixel.
PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAEAAAAALAAAAAABAAEAAAICRAEAOw=="
WORDS = [
    *("messages", "conversations", "role", "content", "from", "value", "type", "text", "image"),
    *("video", "images", "videos", "user", "assistant", "system", "human", "gpt", "<image>"),
    *("<video>\n", "a<image><image>", "<|im_end|>", "<|image_pad|>", "min_pixels", "max_pixels"),
    *("resized_height", "resized_width", "fps", "nframes", "video_start", "total_pixels"),
    *("/dev/zero", ".", "file://", "a\0b", "http://localhost/", "data:,", PICTURE, "\ud800", "😀"),
]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=12,
)
# Conversations that are right but for what stands in some places.
conversations = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "assistant", "tool"]),
            "content": st.text(max_size=5) | st.sampled_from(WORDS) | json_values,
        },
        optional={"type": json_values},
    ),
    max_size=4,
)
records = st.fixed_dictionaries(
    {"messages": conversations}, optional={"images": json_values, "video": json_values}
)


some_json = st.one_of(json_values, records).map(lambda value: json.dumps(value).encode())


@settings(max_examples=500, deadline=None)
@given(some_json | st.binary(max_size=40), st.sampled_from(["a.json", "a.jsonl"]))
def test_any_file_gives_samples_or_an_error_that_names_the_place(
    tiny_folder, tmp_path_factory, content, name
):
    encoder, folder = encoder_for(tiny_folder), tmp_path_factory.getbasetemp()
    (folder / name).write_bytes(b"[%s]" % content if name == "a.json" else content)
    try:
        records = Records([str(folder / name)])
    except UserError as error:
        assert str(error).startswith(str(folder / name)), error
        return
    for i in range(len(records)):
        try:
            measured = encoder.measure(records[i], folder)
        except ValueError as error:
            assert PLACES.match(str(error)), error
            str(error).encode()  # can be printed
        else:
            sample = encoder.encode(records[i], folder)
            num_supervised = int((sample.labels != IGNORE).sum())
            assert measured[:2] == (len(sample.input_ids), num_supervised)
            assert measured[1] > 0


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"messages": "\\ud83d"}', "surrogate"),
        ("[" * 100_000, "recursion"),
        ("1" * 5000, "4300 digits"),
    ],
)
def test_json_that_python_cannot_read_is_an_error(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        Records([str(tmp_path / "a.jsonl")])[0]
    (tmp_path / "a.json").write_text(f"[{text}]")
    with pytest.raises(ValueError, match=words) as info:
        Records([str(tmp_path / "a.json")])[0]
    assert isinstance(info.value, UserError) or words == "surrogate"


def write_jsonl(path, conversations, ending="\n"):
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations]
    path.write_text(ending.join(lines), encoding="utf-8", newline="")
    return str(path)


def test_jsonl_with_blank_lines_crlf_and_no_last_line_break(tmp_path):
    conversations = [[user(f"你好 {i}"), assistant("x")] for i in range(5)]
    records = Records([write_jsonl(tmp_path / "a.jsonl", conversations, "\r\n\r\n \n\t   \r\n")])
    assert [records[i]["messages"] for i in range(len(records))] == conversations
    assert records.where(1) == f"{tmp_path}/a.jsonl: line 5"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.jsonl", None, "No such file"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n\n", "no records"),
        ("lines.json", b'{"a": 1}\n{"a": 2}\n', "line 2.*must end in .jsonl"),
        ("rate.json:0", b"[3]", "sampling rate"),
        ("rate.json:1e9", b"[3]", "sampling rate"),
        ("bracket.json", b'[{"messages": [}\n]', "bracket.json: .*JSON.*line 1.*column 16"),
        ("third.json", b'[\n {"a": 1},\n oops\n]', "line 3.*column 2"),
        ("object.json", b'{"messages": []}', "non-empty JSON list"),
        ("bytes.json", b'["\xff\xfe"]', "UTF-8"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name.split(":")[0]).write_bytes(content)
    with pytest.raises(UserError, match=words):
        Records([str(tmp_path / name)])


def test_several_files_each_with_its_folder(tmp_path, tiny_folder):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_image(tmp_path / name / "p.png", 60, 60 if name == "one" else 200)
    conversation = [user(image("p.png")), assistant("x")]
    first = write_jsonl(tmp_path / "one" / "a.jsonl", [conversation] * 2)
    second = tmp_path / "two" / "b.json"
    second.write_text(json.dumps([{"messages": conversation}]))
    records = Records([first, f"{second}:0.5"])
    index, problems = build_index(records, encoder_for(tiny_folder))
    assert not problems and len(index) == 3
    assert index.num_image_tokens[2] > index.num_image_tokens[1]
    assert records.groups() == [(0, 2, 1.0), (2, 3, 0.5)]
    assert records.where(2) == f"{second}: sample 0"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.1, 0.5, 1.0, 2.0, 2.5])), min_size=1),
    st.integers(1, 7),
)
def test_an_epoch_takes_each_file_at_its_rate(files, batch_size):
    sizes = np.cumsum([0] + [size for size, _ in files])
    groups = [(int(a), int(b), rate) for a, b, (_, rate) in zip(sizes, sizes[1:], files)]
    lengths = np.full(sizes[-1], 10, dtype=np.int32)
    plan = Plan(Index(*[lengths] * 6), batch_size, 1000, 0, 1, groups)
    seen = [i for step in plan.steps(0, plan.num_steps_per_epoch) for i in step.samples]
    for first, last, rate in groups:
        counts = np.bincount(seen, minlength=sizes[-1])[first:last]
        assert sum(counts) == max(1, round(rate * (last - first)))  # no file is left out
        assert max(counts) - min(counts) <= 1


def test_the_index_is_kept_and_made_anew_when_something_changes(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(index_module, "CACHE_DIR", tmp_path / "cache")
    measured = []
    measure = index_module._measure
    monkeypatch.setattr(
        index_module, "_measure", lambda *args: measured.append(args[-1]) or measure(*args)
    )

    def count(conversations, **flags):
        measured.clear()
        path = write_jsonl(tmp_path / "a.jsonl", conversations)
        build_index(Records([path]), encoder_for(tiny_folder, **flags))
        return len(measured)

    data = [[user("Hi"), assistant(f"{i}")] for i in range(5)]
    assert (count(data), count(data)) == (5, 0)
    assert (count(data, max_pixels=78400), count(data, max_pixels=78400)) == (5, 0)
    assert count(data, supervise="all") == 5
    data[3] = [user("Ho"), assistant("3")]
    assert (count(data), count(data)) == (5, 0)
    data.append([user("no answer")])  # what is wrong may have been put right: look again
    assert (count(data), count(data)) == (6, 1)


def test_a_process_that_dies_while_measuring_is_an_error_and_no_hang():
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)  # as a system does that runs out of memory

    records = Mock(where="sample {}".format)
    with pytest.raises(UserError, match="was killed, before or at sample 0, .*--num_workers"):
        list(workers.run_all(die, "index", np.arange(300), records, None))


def test_measuring_leaves_no_process_behind_whenever_it_ends():
    """Also in a process that only notes SIGTERM, as one that has trained does."""
    StopSignal()
    before = set(multiprocessing.active_children())  # of other tests
    for num_taken in (0, 1, 20, 300):
        results = workers.run_all(
            lambda *task: task[-1], "index", np.arange(300), Mock(where=str), None
        )
        assert [i for i, _ in itertools.islice(results, num_taken)] == list(range(num_taken))
        results.close()
        deadline = time.monotonic() + 10
        while set(multiprocessing.active_children()) - before:
            assert time.monotonic() < deadline


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_a_million_lines_open_in_seconds_and_little_memory(tmp_path, tiny_folder, monkeypatch):
    """With the index at hand: measuring a million samples takes many minutes."""
    line = json.dumps({"messages": [user("What is it? " * 10), assistant("A cat. " * 10)]}) + "\n"
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for _ in range(100):
            file.write(line * 10_000)
    monkeypatch.setattr(index_module, "CACHE_DIR", tmp_path)
    config, encoder = tiny_config(train_data=[str(path)]), encoder_for(tiny_folder)
    records = Records([str(path)])
    row = encoder.measure(records[999_999])
    name = f"index-{index_module._index_key(records, encoder)}.npy"
    values = np.tile(row, (1_000_000, 1)).tobytes()
    (tmp_path / name).write_bytes(hashlib.sha256(values).digest() + values)
    del records, values
    before, memory = resource.getrusage(resource.RUSAGE_SELF), resident_bytes()
    data = prepare_data(config.train_data, encoder, config)
    assert len(data.index) == 1_000_000 and data.samples[999_999].labels is not None
    assert data.plan.step(200_000).num_tokens == 4 * row[0]
    assert resident_bytes() - memory < 200e6
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


# ------------------------------------------------------------------ keys


TWO_TURNS = [user("one"), assistant("First."), user("two"), assistant("Second.")]


def trained_texts(tiny_folder, record, **flags) -> list[str]:
    encoder = encoder_for(tiny_folder, **flags)
    return [text for text, is_trained in encoder.segments(encoder.prepare(record)) if is_trained]


@pytest.mark.parametrize("no", [{"loss": False}, {"weight": 0}, {"loss": False, "weight": None}])
def test_an_answer_that_is_not_to_be_trained_is_context(tiny_folder, no):
    first, second = "First.<|im_end|>", "Second.<|im_end|>"
    messages = [TWO_TURNS[0], TWO_TURNS[1] | no, TWO_TURNS[2], TWO_TURNS[3] | {"loss": True}]
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "First."} | no]
    turns += [{"from": "human", "value": "two"}, {"from": "gpt", "value": "Second.", "weight": 1}]
    for record in ({"messages": messages}, {"conversations": turns}):
        assert trained_texts(tiny_folder, record) == [second]
    assert trained_texts(tiny_folder, {"messages": TWO_TURNS}) == [first, second]
    assert trained_texts(tiny_folder, {"messages": TWO_TURNS}, supervise="last") == [second]
    # All text but that answer, and what is trained and what not make the whole.
    pieces = trained_texts(tiny_folder, {"messages": messages}, supervise="all")
    whole = encoder_for(tiny_folder).render(messages)
    assert first not in "".join(pieces) and whole.replace(first, "") == "".join(pieces)
    last = [*TWO_TURNS[:3], TWO_TURNS[3] | no]
    with pytest.raises(ValueError, match="nothing to train"):
        encoder_for(tiny_folder, supervise="last").measure({"messages": last})


def test_the_records_own_system_prompt_is_the_first_message():
    first, *others = EXPECTED
    record = {"messages": others, "system": first["content"]}
    assert parse_conversation(record) == EXPECTED
    assert parse_conversation({"messages": others, "system": ""}) == others
    with pytest.raises(ValueError, match='"system" must be a string, and the only'):
        parse_conversation({"messages": EXPECTED, "system": "x"})


def test_media_as_openai_trl_and_hugging_face_write_them():
    url = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    empty, stored = {"type": "image"}, {"bytes": None, "path": "b.png"}
    content = [text("What is "), text("this?")]
    for message, images in (
        (user(url, content[0], url | {"image_url": "b.png"}, content[1]), None),
        (user(empty, content[0], empty | {"image": None}, content[1]), ["a.png", stored]),
        (user(empty, content[0], image("b.png"), content[1]), ["a.png"]),
        (user("<image>What is <image>this?"), [{"path": "a.png"}, stored]),
    ):
        record = {"messages": [EXPECTED[0], message, EXPECTED[2]], "images": images}
        assert parse_conversation(record) == EXPECTED
    record = {"messages": [user(url | {"max_pixels": 9}), assistant("x")]}
    limited = [image("a.png") | {"max_pixels": 9}]
    assert parse_conversation(record)[0]["content"] == limited
    assert list(keys.ignored_keys(record)) == ["item.detail"]
    with pytest.raises(ValueError, match="item 0: unknown key 'size'"):
        parse_conversation({"messages": [user(url | {"size": 9})]})
    with pytest.raises(ValueError, match='item 0: both "image" and "image_url"'):
        parse_conversation({"messages": [user(url | {"image": "b.png"})]})
    picture = b"\x89PNG"
    record = {"messages": [user(empty), assistant("x")], "image": {"bytes": picture, "path": "a"}}
    assert parse_conversation(record)[0]["content"] == [{"type": "image", "image": picture}]
    with pytest.raises(ValueError, match="tags in the text: 2, but in the record's list: 1"):
        parse_conversation({"messages": [user(empty, empty)], "images": ["a.png"]})


@pytest.mark.parametrize(
    "more, in_message, words",
    [
        ({"tools": "[]"}, {}, 'a key "tools": tools are not trained'),
        ({"audios": ["a.wav"]}, {}, "sound is not read"),
        ({"rejected_response": "No."}, {}, "pairs are not trained"),
        ({"kto_tag": False}, {}, "pairs are not trained"),
        ({}, {"tool_calls": [{"id": 1}]}, 'message 1: has a key "tool_calls"'),
        ({}, {"reasoning": "Hm"}, 'is read from "reasoning_content"'),
        ({}, {"reasoning_content": ["Hm"]}, "message 1: .*must be a string"),
        ({}, {"weight": 0.5}, '"weight": 0.5: must be true or false'),
        ({}, {"loss": "false"}, "must be true or false"),
        ({}, {"loss": True, "weight": 0}, "contradict each other"),
        ({}, {"content": "Picture 1: <img>a.png</img>"}, "of the first Qwen-VL"),
    ],
)
def test_a_key_that_would_change_what_is_trained_is_refused(more, in_message, words):
    with pytest.raises(ValueError, match=words):
        parse_conversation({"messages": [user("Hi"), assistant("A.") | in_message]} | more)


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from([*WORDS, *keys.REFUSED_IN_RECORDS, *keys.REFUSED_IN_MESSAGES, "loss"])
    | st.text(max_size=5),
    value=json_values,
    in_message=st.booleans(),
)
def test_any_further_key_is_honoured_refused_or_listed(key, value, in_message):
    """Ignored, it changes nothing, and check_data.py lists it."""
    plain = {"messages": [user("Hi"), assistant("Hello.")]}
    record = json.loads(json.dumps(plain))
    owner = record["messages"][1] if in_message else record
    owner.setdefault(key, value)
    if keys.is_empty(owner[key]) or owner[key] != value:
        return
    known = keys.MESSAGE_KEYS if in_message else keys.RECORD_KEYS
    refused = keys.REFUSED_IN_MESSAGES if in_message else keys.REFUSED_IN_RECORDS
    try:
        parsed = parse_conversation(record)
    except ValueError as error:
        assert key in known or (key in refused and f'has a key "{key}"' in str(error))
        return
    assert key not in refused
    if key not in known:
        assert parsed == plain["messages"]
        assert list(keys.ignored_keys(record)) == [f"message.{key}" if in_message else key]
