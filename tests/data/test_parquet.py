"""Parquet files: the same records as JSON, pictures inside, read by row group."""

import base64
import json
import os
import resource
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from check_data import print_oddities
from compare import load_answers
from helpers import assistant, encoder_for, image, make_image, set_up, text, tiny_config, user
from util.config import UserError
from util.data import files
from util.data import index as index_module
from util.data.conversation import parse_conversation
from util.data.files import DataHaveChanged, Records
from util.data.index import build_index
from util.tools.generate import answer_row, load_prompts, save_answers
from util.tools.page import embed

STORED = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def picture(seed: int, height: int = 60, width: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows(num: int) -> list[dict]:
    """Return records whose pictures are stored as Hugging Face's data sets do; some have none."""
    return [
        {
            "messages": [user("<image>" * (i % 3 > 0) + f"What is {i}?"), assistant(f"It is {i}.")],
            "images": [{"bytes": picture(i), "path": "a.png"}] if i % 3 else None,
            "id": i,
        }
        for i in range(num)
    ]


def write(path: Path, records: list[dict], **options) -> str:
    table = pa.Table.from_pylist(records)
    if "images" in table.column_names and pa.types.is_struct(table.schema.field("images").type):
        table = table.cast(table.schema.set(1, pa.field("images", STORED)))
    pq.write_table(table, path, **options)
    return str(path)


def test_a_parquet_file_gives_the_samples_of_a_json_file(tiny_folder, tmp_path):
    """Items, which Arrow fills with nulls, and paths; turns, tags and names from its folder."""
    path, _ = make_image(tmp_path / "a.png", 60, 90), make_image(tmp_path / "b.png", 90, 60, 1)
    answer = {"role": "assistant", "content": [text("A.")], "loss": True}
    typed = [
        {"messages": [user(image(path), text("What?")), answer]},
        {"messages": [user(text("Hi"), text("!")), answer | {"loss": None}]},
        {"messages": [user(text("B?")), answer | {"loss": False}, user(text("C?")), answer]},
    ]
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}]
    tagged = [{"conversations": turns, "images": ["b.png"], "system": "Be brief."}] * 3
    encoder = encoder_for(tiny_folder)
    for name, some in (("typed", typed), ("tagged", tagged)):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
        found = Records([write(tmp_path / f"{name}.parquet", some, row_group_size=2)])
        expected = Records([str(tmp_path / f"{name}.json")])
        assert len(found) == len(expected) == 3 and found.where(1).endswith("parquet: sample 1")
        for i in (0, 1, 2, 0):
            a, b = (encoder.encode(r[i], r.folder(i)) for r in (found, expected))
            assert torch.equal(a.labels, b.labels) and torch.equal(a.patches, b.patches)
            assert torch.equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_rows_are_found_in_any_order_also_by_several_processes(
    tiny_folder, tmp_path, monkeypatch, size
):
    monkeypatch.setattr(index_module, "CACHE_DIR", tmp_path)
    expected = rows(310)
    path = write(tmp_path / "a.parquet", expected, row_group_size=size)
    records = Records([path])
    for i in (309, 0, 5, 4, *np.random.default_rng(0).permutation(310).tolist()):
        assert records[i] == expected[i]
    encoder = encoder_for(tiny_folder)
    index, problems = build_index(records, encoder)
    assert not problems and (index.num_image_tokens > 0).tolist() == [i % 3 > 0 for i in range(310)]
    run = set_up(tiny_config(train_data=[path], num_workers=2), tiny_folder)
    sample = run.data.samples[304]
    assert sample.patches.float().mean() == encoder.encode(expected[304]).patches.float().mean()


def test_pictures_as_bytes_alone_are_read():
    content = picture(0)
    record = {"messages": [user("<image>?"), assistant("x")], "images": [content]}
    assert parse_conversation(record)[0]["content"][0] == {"type": "image", "image": content}


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("a.parquet", lambda content: content[:-100], "not a Parquet file that can be read"),
        ("a.parquet", lambda content: b'[{"messages": []}]', "not a Parquet file that can be read"),
        ("a.parquet", lambda content: b"<html>", "a web page"),
        ("a.json", lambda content: content, "must end in .parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, change, words):
    path = Path(write(tmp_path / name, rows(3)))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}: is .*{words}"):
        Records([str(path)])


def test_what_is_wrong_inside_is_told_when_it_is_read(tmp_path, caplog, monkeypatch):
    path = write(tmp_path / "a.parquet", rows(30), row_group_size=10)
    records = Records([path])
    page = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(page)
        file.write(b"\xff" * 50)
    with pytest.raises(DataHaveChanged, match="was changed while it was in use"):
        records[15]
    records = Records([path])
    with pytest.raises(ValueError, match="not a row that can be read"):
        records[15]
    assert records[29] == rows(30)[29]  # the other row groups are there
    pq.write_table(pa.Table.from_pylist(rows(2)).slice(0, 0), path)
    with pytest.raises(UserError, match="holds no records"):
        Records([path])
    assert not caplog.text
    monkeypatch.setattr(files, "LARGE_GROUP", 1000)
    Records([write(tmp_path / "b.parquet", rows(30))])
    assert "a smaller row_group_size" in caplog.text


def test_pictures_inside_go_into_checks_and_saved_answers(tiny_folder, tmp_path, capsys):
    path = write(tmp_path / "a.parquet", [*rows(3), *rows(2)])
    encoder, saved = encoder_for(tiny_folder), str(tmp_path / "a.json")
    print_oddities(Records([path]), build_index(Records([path]), encoder)[0])
    printed = capsys.readouterr().out
    assert f"duplicates: 2\n  {path}: sample 3 repeats {path}: sample 0\n" in printed
    assert "keys that are not read: id (5)" in printed
    prompts = load_prompts(path, encoder)
    answers = [answer_row(prompt, "A.", 1.0, encoder, tmp_path) for prompt in prompts]
    save_answers(SimpleNamespace(save=saved), "tiny", answers, {})
    messages = load_answers(saved)["answers"][1]["messages"]
    assert messages[0]["content"][0]["image"].endswith(base64.b64encode(picture(1)).decode())
    assert embed(messages[0]["content"][0], tmp_path, [])["uri"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 20_000])
def test_memory_does_not_grow_with_the_file(tmp_path, tiny_folder, size):
    """20,000 pictures of 20 KB, in groups and in one: opened, and every tenth measured."""
    noise, record = os.urandom(20_000), rows(2)[1]
    record["images"][0]["bytes"] = picture(0) + noise  # what follows a PNG is not read
    path, table = tmp_path / "a.parquet", pa.Table.from_pylist([record] * 100)
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(20_000 // size):
            writer.write_table(pa.concat_tables([table] * (size // 100)), row_group_size=size)
    del table
    pa.default_memory_pool().release_unused()
    encoder, before = encoder_for(tiny_folder), resident_bytes()
    records = Records([str(path)])
    expected = encoder.measure(record)
    assert path.stat().st_size > 400e6 and len(records) == 20_000
    most = 0
    for i in range(0, 20_000, 10):
        assert encoder.measure(records[i]) == expected
        most = max(most, resident_bytes() - before)
    assert most < 300e6
