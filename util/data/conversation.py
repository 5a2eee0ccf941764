"""The conversation in a record: whatever its format, it becomes one.

What is wrong raises ValueError naming the message.
"""

import re
from collections.abc import Iterator

from util.data import keys
from util.media.source import check_media_item

ROLES = ("system", "user", "assistant")
# As LLaVA, its followers and Qwen's own script name them.
SPEAKERS = dict(zip(ROLES, ROLES)) | {"human": "user", "gpt": "assistant"}
MEDIA_TYPES = ("image", "video")
MEDIA_TAG = re.compile("<(image|video)>")


def from_messages(record: dict) -> list:
    """Read the format of OpenAI, LLaMA-Factory and ms-swift: messages of role and content."""
    return _list(record, "messages")


def from_conversations(record: dict) -> list:
    """Read the format of LLaVA and ShareGPT: turns of from and value."""
    return [_from_turn(i, turn) for i, turn in enumerate(_list(record, "conversations"))]


def _list(record: dict, key: str) -> list:
    if not isinstance(record[key], list):
        raise ValueError(f'must be an object with a list "{key}"')
    if not record[key]:
        raise ValueError("the conversation is empty")
    return record[key]


def _from_turn(i: int, turn) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"message {i}: must be an object with from and value")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"message {i}: unknown speaker {speaker!r}: use human, gpt or system")
    return {**turn, "role": SPEAKERS[speaker], "content": turn.get("value")}


# A format is a function from a record to a list of messages, by the key that tells it apart. Tags
# in the text, and the record's own lists of media, are the same in all of them.
FORMATS = {"messages": from_messages, "conversations": from_conversations}


def parse_conversation(record) -> list[dict]:
    """Return the messages of one record of a data file, checked, whichever format it has.

    A message is {"role": ..., "content": ...}; content is a string or a list of items
    {"type": "text", "text": ...}, {"type": "image", "image": ...}, {"type": "video", "video": ...}.
    An answer that is context alone has "loss": False too, one with reasoning "reasoning_content".
    Raises ValueError naming the message where a record is anything else.
    """
    record = record if isinstance(record, dict) else {}
    given = [key for key in FORMATS if record.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"both {_names(given, 'and')}: use one of them")
    if not given:
        raise ValueError(f"must be an object with a list {_names(FORMATS, 'or')}")
    keys.refuse_keys(record, keys.REFUSED_IN_RECORDS)
    messages = FORMATS[given[0]](record)
    messages = [_parse_message(i, message) for i, message in enumerate(messages)]
    if not keys.is_empty(system := record.get("system")):
        if not isinstance(system, str) or messages[0]["role"] == "system":
            raise ValueError('"system" must be a string, and the only system message')
        messages.insert(0, {"role": "system", "content": system})
    return _place_media(messages, record)


def _names(names, word: str) -> str:
    return f" {word} ".join(f'"{name}"' for name in names)


def _place_media(messages: list[dict], record: dict) -> list[dict]:
    """Put the record's own lists of media where the tags in its text stand, or its empty items."""
    media = {kind: _media_list(record, kind) for kind in MEDIA_TYPES}
    left = {kind: iter(items) for kind, items in media.items()}
    counts = dict.fromkeys(MEDIA_TYPES, 0)
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    # LLaVA-Video writes <image> for its clips.
    is_llava_video = not media["image"] and not any("<video>" in text for text in texts)
    for i, message in enumerate(messages):
        if isinstance(message["content"], list):
            for k, item in enumerate(message["content"]):
                if set(item) == {"type"}:
                    where, kind = f"message {i}, item {k}", item["type"]
                    if not media[kind]:
                        _check_media(where, item)  # which says what is missing
                    counts[kind] += 1
                    message["content"][k] = _parse_item(where, next(left[kind], media[kind][0]))
            continue
        if not MEDIA_TAG.search(message["content"]):
            continue
        content = []
        # Odd parts are tags. The line break that sets a tag apart is not part of the text.
        for k, part in enumerate(re.split(r"\n?<(image|video)>\n?", message["content"])):
            if k % 2 == 0:
                content += [{"type": "text", "text": part}] if part else []
            else:
                kind = "video" if is_llava_video and media["video"] else part
                counts[kind] += 1
                item = next(left[kind], None)
                content += [_parse_item(f"message {i}", item)] if item else []
        message["content"] = content
    for kind in MEDIA_TYPES:
        if counts[kind] != len(media[kind]):
            raise ValueError(
                f"<{kind}> tags in the text: {counts[kind]}, but in the record's list: "
                f"{len(media[kind])}. Put one tag, or one empty item, where each {kind} belongs"
            )
    return messages


def _media_list(record: dict, kind: str) -> list[dict]:
    """Return what a record lists under "image" or "images" (or video) as items."""
    values = [record.get(key) for key in (kind, f"{kind}s")]
    values = [value for value in values if value not in (None, [], "")]
    if len(values) == 2:
        raise ValueError(f'both "{kind}" and "{kind}s": use one of them')
    items = []
    for entry in values[0] if values and isinstance(values[0], list) else values:
        if isinstance(entry, dict) and entry.get("type", kind) != kind:
            raise ValueError(f'"{kind}s" lists an item of type {entry["type"]!r}')
        if entry is not None:
            is_item = isinstance(entry, dict) and not _is_stored(entry)
            items.append({**(entry if is_item else {kind: _unwrap(entry)}), "type": kind})
    return items


def _is_stored(value) -> bool:
    """Return whether a value is a file as data sets of Hugging Face hold it."""
    return isinstance(value, dict) and {"path"} <= set(value) <= {"bytes", "path"}


def _unwrap(value):
    """Return the path, address or data URL in what OpenAI and Hugging Face wrap it in."""
    if isinstance(value, dict) and {"url"} <= set(value) <= {"url", "detail"}:
        return value["url"]  # the detail is for --max_pixels to say
    if not _is_stored(value):
        return value
    return value["path"] if value.get("bytes") is None else value["bytes"]


def _parse_message(i: int, message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {i}: must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {i}: unknown role {role!r}: use system, user or assistant")
    if role == "system" and i > 0:
        raise ValueError(f"message {i}: a system message must come first")
    for kind in MEDIA_TYPES:
        if message.get(kind) or message.get(f"{kind}s"):
            raise ValueError(
                f'message {i}: has a key "{kind}": {kind}s are items of the content, or stand in '
                "the record's own list"
            )
    keys.refuse_keys(message, keys.REFUSED_IN_MESSAGES, f"message {i}: ")
    if isinstance(content, list):
        content = [
            _parse_item(f"message {i}, item {k}", item, may_be_empty=True)
            for k, item in enumerate(content)
        ]
    elif not isinstance(content, str):
        raise ValueError(f"message {i}: content must be a string or a list")
    parsed = {"role": role, "content": content}
    if not keys.is_empty(reasoning := message.get("reasoning_content")):
        if role != "assistant" or not isinstance(reasoning, str):
            raise ValueError(f'message {i}: "reasoning_content" must be a string, of an answer')
        parsed["reasoning_content"] = reasoning
    if role == "assistant" and not keys.is_trained(message, f"message {i}"):
        return parsed | {"loss": False}
    if role != "assistant" and (message.get("loss") or message.get("weight")):
        raise ValueError(f"message {i}: only answers are trained: --supervise all trains all text")
    if "<img>" in text_of(parsed) and "</img>" in text_of(parsed):
        raise ValueError(
            f"message {i}: <img>...</img>, of the first Qwen-VL, is not read: write <image> in its "
            'place, and list the files under "images"'
        )
    return parsed


def _parse_item(where: str, item, may_be_empty: bool = False) -> dict:
    # Rows that passed through Arrow carry every key of every item, with null where there is none.
    item = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else {}
    kind = item.get("type")
    if kind in ("image_url", "video_url"):  # of OpenAI
        url, kind = item.pop(kind, None), kind.removesuffix("_url")
        if kind in item:
            raise ValueError(f'{where}: both "{kind}" and "{kind}_url": use one of them')
        item |= {"type": kind, kind: url}
    if kind not in ("text", *MEDIA_TYPES):
        raise ValueError(f"{where}: unknown type {kind!r}: use text, image or video")
    if kind in MEDIA_TYPES:
        if may_be_empty and set(item) == {"type"}:
            return item  # for the next one of the record's list
        item[kind] = _unwrap(item.get(kind))
        _check_media(where, item)
        return item
    if not isinstance(item.get("text"), str):
        raise ValueError(f'{where}: an item of type text needs a string "text"')
    if extra := set(item) - {"type", "text"}:
        raise ValueError(f"{where}: unknown key {min(extra)!r}")
    return item


def _check_media(where: str, item: dict) -> None:
    try:
        check_media_item(item)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def text_of(message: dict) -> str:
    """Return all text of a message."""
    return "".join(owner[key] for owner, key in text_holders([message]))


def text_holders(messages: list[dict]) -> Iterator[tuple[dict, str]]:
    """Yield (owner, key) of every text, in order: of a message, or of an item of it."""
    for message in messages:
        if isinstance(message["content"], str):
            yield message, "content"
        else:
            yield from ((item, "text") for item in message["content"] if item["type"] == "text")


def media_of(messages: list[dict]) -> Iterator[tuple[int, dict]]:
    """Yield (message number, item) for every picture and clip, in order."""
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            yield from ((i, item) for item in message["content"] if item["type"] in MEDIA_TYPES)
