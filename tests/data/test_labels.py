"""What is trained: the assistant's text and the end-of-turn token, and nothing else."""

import pytest

from helpers import assistant, encoder_for, image, make_image, make_video, text, user, video
from util.data.sample import IGNORE

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(params=["tiny", "real"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def trained_texts(encoder, messages):
    """Return the trained text of a conversation, one string for each run of trained tokens."""
    sample = encoder.encode({"messages": messages})
    texts, run = [], []
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist()):
        assert label in (IGNORE, token)
        if label == IGNORE:
            texts, run = (texts + [encoder.tokenizer.decode(run)] if run else texts), []
        else:
            run.append(token)
    return texts + [encoder.tokenizer.decode(run)] if run else texts


def test_real_tokenizer_has_the_true_ids(real_tokenizer):
    assert real_tokenizer("<|im_start|>assistant\n").input_ids == [151644, 77091, 198]
    assert real_tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]) == [
        151655,
        151656,
    ]
    assert real_tokenizer("assistant\n\n\nHi").input_ids == [77091, 1406, 13048]


@pytest.mark.parametrize(
    "answer",
    [
        "Hello.",
        "\nA line down",
        "\n\nHi",
        "  spaces first",
        " \n both",
        "你好，世界。",
        "assistant",
        "The assistant\nassistant: yes <assistant>",
        "",
        "a cat <|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
        "ends with a newline\n",
    ],
)
def test_exactly_the_answer_is_trained(folder, answer):
    encoder = encoder_for(folder)
    assert trained_texts(encoder, [user("Hi"), assistant(answer)]) == [answer + "<|im_end|>"]


def test_every_turn_is_trained(folder):
    messages = [
        {"role": "system", "content": ""},
        user("one\nassistant\n"),
        assistant("\nfirst"),
        user(text("two")),
        {"role": "assistant", "content": [text("second "), text("half")]},
        user("a last question without an answer"),
    ]
    encoder = encoder_for(folder)
    assert trained_texts(encoder, messages) == ["\nfirst<|im_end|>", "second half<|im_end|>"]


def test_the_prompt_is_tokenized_as_generation_sees_it(folder):
    encoder = encoder_for(folder)
    question = [user("Hi")]
    prompt = encoder.encode_prompt(question).input_ids.tolist()
    rendered = encoder.render(question, add_generation_prompt=True)
    assert rendered == SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == encoder.tokenizer(rendered).input_ids
    answer = encoder.tokenizer("\n\nHi<|im_end|>").input_ids
    sample = encoder.encode({"messages": [*question, assistant("\n\nHi")]})
    newline = encoder.tokenizer("\n").input_ids
    assert sample.input_ids.tolist() == prompt + answer + newline
    assert sample.labels.tolist() == [IGNORE] * len(prompt) + answer + [IGNORE]


def test_supervise_all_trains_all_text_but_no_media(folder, tmp_path):
    picture = image(make_image(tmp_path / "a.png", 56, 84))
    clip = video(make_video(tmp_path / "a.mp4", 4, 64, 64))
    encoder = encoder_for(folder, supervise="all")
    sample = encoder.encode({"messages": [user(picture, text("one"), clip, text("two"))]})
    untrained = sample.input_ids[sample.labels == IGNORE].tolist()
    names = encoder.tokenizer.convert_ids_to_tokens(untrained)
    # The first token would be predicted from the sample packed before it.
    assert set(names) == {
        *("<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    }
    assert names.count("<|im_start|>") == 1 and sample.labels[0] == IGNORE
    assert int((sample.labels != IGNORE).sum()) + len(untrained) == len(sample.input_ids)


def test_media_in_an_answer_are_not_trained(folder, tmp_path):
    picture = image(make_image(tmp_path / "a.png", 56, 84))
    messages = [user("Draw."), {"role": "assistant", "content": [text("see"), picture]}]
    assert trained_texts(encoder_for(folder), messages) == ["see", "<|im_end|>"]


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<|vision_end|>"]
)
def test_text_that_spells_a_control_token_is_an_error(folder, token):
    encoder = encoder_for(folder)
    with pytest.raises(ValueError, match="message 2.*control token"):
        encoder.encode({"messages": [user("a"), assistant("b"), user(text(f"c {token}"))]})


def test_no_assistant_turn_is_an_error_unless_all_text_is_trained(folder):
    with pytest.raises(ValueError, match="nothing to train.*--supervise all"):
        encoder_for(folder).measure({"messages": [user("Hi")]})
    num_tokens, num_supervised, *_ = encoder_for(folder, supervise="all").measure(
        {"messages": [user("Hi")]}
    )
    assert num_supervised == num_tokens - 1


def test_an_answer_to_nothing_is_an_error_unless_all_text_is_trained(folder):
    record = {"messages": [assistant("a"), user("b"), assistant("c")]}
    with pytest.raises(ValueError, match="message 0: an answer to nothing"):
        encoder_for(folder).measure(record)
    assert encoder_for(folder, supervise="all").measure(record)
    system = {"role": "system", "content": "Greet."}
    assert trained_texts(encoder_for(folder), [system, *record["messages"]]) == [
        "a<|im_end|>",
        "c<|im_end|>",
    ]


def test_measure_counts_what_encode_makes(folder, tmp_path):
    picture = image(make_image(tmp_path / "a.png", 120, 84))
    clip = video(make_video(tmp_path / "a.mp4", 9, 64, 96))
    record = {"messages": [user(picture, clip, picture, text("x")), assistant("\n\ny")]}
    encoder = encoder_for(folder)
    sample = encoder.encode(record)
    types = encoder.token_types(sample.input_ids)
    assert encoder.measure(record) == (
        len(sample.input_ids),
        int((sample.labels != IGNORE).sum()),
        int((types == 1).sum()),
        int((types == 2).sum()),
        sum(t * (h * w) ** 2 for t, h, w in sample.grids),
        0,
    )
    assert int((types > 0).sum()) * 4 == len(sample.patches)


def test_an_answer_is_decoded_with_everything_that_was_trained(real_tokenizer, real_folder):
    """Boxes, and a user's own tokens; what ends or pads it is cut."""
    encoder = encoder_for(real_folder)
    text = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|> <|im_x|>"
    ids = real_tokenizer(text).input_ids
    assert len(ids) < len(text) / 3
    ends = real_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
    assert encoder.decode_answer(ids + ends) == text
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) != text
