"""Proof that it learns to see: a model from random weights, trained by finetune.py alone.

    python -m benchmarks.learn --output_dir DIR
    python -m benchmarks.learn --output_dir DIR --num_train 320 --num_held_out 50

Draws scenes and clips, trains the embedded tiny model on one part and asks it about another part
that shares no picture with it. Clips are asked about again with their frames in reverse order,
and everything again with black pictures: a model that sees turns its answers around, and then
knows no more than what is right most often.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import av
from PIL import Image, ImageDraw

from benchmarks.common import REPO, print_header, print_row

SIDE = 56  # pixels of a picture: 2 x 2 tokens
FINER = 4  # pictures are drawn so many times larger, for soft edges
NUM_FRAMES = 4  # of a clip: two time steps of two frames
FPS = 2  # what finetune.py samples by default, so that every frame is seen
# A background near the mean on which pixels are normalized, and colours that only add to it. On
# nearly black ones motion was half right after 400 steps, on these after 200 nearly always.
BACKGROUND = (70, 110)
COLOURS = {
    "red": (255, 90, 90),
    "green": (90, 255, 90),
    "blue": (90, 90, 255),
    "yellow": (255, 255, 90),
    "purple": (255, 90, 255),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "cross", "triangle")
SCENES = ("shape", "place", "count", "motion")
QUESTIONS = {
    "colour": "Colour?",
    "shape": "Shape?",
    "place": "Where?",
    "count": "How many?",
    "motion": "Which way?",
}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


# ---------------------------------------------------------------- scenes


def draw_scene(scene: str, dice: random.Random) -> tuple[list[Image.Image], dict[str, str]]:
    """Return the frames of a random scene of SCENES, one for a picture, and {question: answer}."""
    background = tuple(dice.randrange(*BACKGROUND) for _ in range(3))
    look = (dice.choice(SHAPES), dice.choice(list(COLOURS)))
    if scene == "motion":
        way = dice.choice(list(WAYS))
        places, radius = move(way, dice)
        return [draw_picture([(*look, *xy, radius)], background) for xy in places], {scene: way}
    if scene == "shape":
        x, y = dice.uniform(0.42, 0.58), dice.uniform(0.42, 0.58)
        shapes, answer = [(*look, x, y, dice.uniform(0.26, 0.4))], look[0]
    elif scene == "place":
        x, y = dice.uniform(0.2, 0.4), dice.uniform(0.2, 0.4)
        down, across = dice.choice(("top", "bottom")), dice.choice(("left", "right"))
        x, y = x if across == "left" else 1 - x, y if down == "top" else 1 - y
        shapes, answer = [(*look, x, y, dice.uniform(0.14, 0.22))], f"{down} {across}"
    else:
        number = dice.randint(1, 4)
        centres = dice.sample([(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)], number)
        shapes, answer = [], str(number)
        for x, y in centres:
            x, y = x + dice.uniform(-0.06, 0.06), y + dice.uniform(-0.06, 0.06)
            shapes.append((*look, x, y, dice.uniform(0.12, 0.18)))
    return [draw_picture(shapes, background)], {"colour": look[1], scene: answer}


def move(way: str, dice: random.Random) -> tuple[list[tuple[float, float]], float]:
    """Return where a shape that moves `way` is in each frame, and its radius.

    The same places in reverse order are as likely, so that without the order of the frames nobody
    can tell left from right.
    """
    radius, step = dice.uniform(0.13, 0.2), dice.uniform(0.15, 0.2)
    x, y = dice.uniform(0.43, 0.57), dice.uniform(0.25, 0.75)
    if way in ("up", "down"):
        x, y = y, x
    shifts = [step * (i - (NUM_FRAMES - 1) / 2) for i in range(NUM_FRAMES)]
    return [(x + WAYS[way][0] * shift, y + WAYS[way][1] * shift) for shift in shifts], radius


def draw_picture(shapes: list[tuple], background: tuple[int, int, int]) -> Image.Image:
    """Return a picture of (shape, colour, x, y, radius), in shares of its side."""
    picture = Image.new("RGB", (FINER * SIDE, FINER * SIDE), background)
    draw = ImageDraw.Draw(picture)
    for shape, colour, *lengths in shapes:
        x, y, radius = (FINER * SIDE * length for length in lengths)
        box, arm = (x - radius, y - radius, x + radius, y + radius), 0.3 * radius
        if shape == "circle":
            draw.ellipse(box, COLOURS[colour])
        elif shape == "triangle":
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], COLOURS[colour])
        else:
            draw.rectangle((box[0], y - arm, box[2], y + arm), COLOURS[colour])
            draw.rectangle((x - arm, box[1], x + arm, box[3]), COLOURS[colour])
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---------------------------------------------------------------- data


def draw_train(folder: Path, num_samples: int) -> set[str]:
    """Write folder/train.json and its media; return the hashes of all pictures.

    Every scene is asked about with all its questions, one turn each, in random order.
    """
    dice, hashes, records = random.Random(0), set(), []
    (folder / "train").mkdir(parents=True)
    for i in range(num_samples):
        frames, answers = draw_scene(SCENES[i % len(SCENES)], dice)
        hashes |= hash_pictures(frames)
        turns = dice.sample(list(answers.items()), len(answers))
        records.append(make_record(str(i), write_media(frames, folder / f"train/{i}"), turns))
    (folder / "train.json").write_text(json.dumps(records))
    return hashes


def draw_held_out(folder: Path, num_samples: int) -> set[str]:
    """Write held_out.json, reversed.json (clips only) and black.json; return hashes as above.

    Every scene is asked about with one question.
    """
    dice, hashes = random.Random(1), set()
    parts = {"held_out": [], "reversed": [], "black": []}
    for name in parts:
        (folder / name).mkdir(parents=True)
    for i in range(num_samples):
        kind = list(QUESTIONS)[i % len(QUESTIONS)]
        scene = dice.choice(SCENES[:3]) if kind == "colour" else kind
        frames, answers = draw_scene(scene, dice)
        hashes |= hash_pictures(frames)
        black = [Image.new("RGB", frame.size) for frame in frames]
        variants = {"held_out": (frames, answers[kind]), "black": (black, answers[kind])}
        if kind == "motion":
            variants["reversed"] = (frames[::-1], OPPOSITE[answers[kind]])
        for name, (shown, answer) in variants.items():
            file = write_media(shown, folder / name / str(i))
            parts[name].append(make_record(f"{kind} {i}", file, [(kind, answer)]))
    for name, records in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return hashes


def hash_pictures(frames: list[Image.Image]) -> set[str]:
    return {hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames}


def make_record(id: str, file: Path, turns: list[tuple[str, str]]) -> dict:
    """Return a conversation about a file: (question of QUESTIONS, answer) in each turn."""
    # The default system prompt would be a third of all tokens.
    messages = [{"role": "system", "content": ""}]
    for kind, answer in turns:
        content = [{"type": "text", "text": QUESTIONS[kind]}]
        if len(messages) == 1:
            media_type = "image" if file.suffix == ".png" else "video"
            content.insert(0, {"type": media_type, media_type: f"{file.parent.name}/{file.name}"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return {"id": id, "messages": messages}


def write_media(frames: list[Image.Image], path: Path) -> Path:
    """Write a picture as PNG, several frames as an H.264 clip; return the path with its suffix."""
    if len(frames) == 1:
        frames[0].save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    options = {"crf": "18", "preset": "ultrafast", "threads": "1"}
    with av.open(str(path.with_suffix(".mp4")), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path.with_suffix(".mp4")


# ---------------------------------------------------------------- training and asking


def run_script(folder: Path, script: str, flags: str) -> None:
    """Run a script of this repository, in `folder`: paths in `flags` are from there."""
    command = [sys.executable, str(REPO / script), *flags.split()]
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)


def ask(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """Answer folder/name.json; return {group: {"right", "most": shares}}.

    A group is a kind of question, or all of them about images or videos. "most" is what the most
    frequent answers would get right.
    """
    flags = f"--model_dir run --prompts {name}.json --save {name}_answers.json --device cpu"
    flags += " --batch_size 64 --max_new_tokens 12"
    run_script(folder, "test_on_trained_model_by_us.py", flags)
    rows = {kind: [] for kind in QUESTIONS}
    for row in json.loads((folder / f"{name}_answers.json").read_text())["answers"]:
        rows[row["id"].split()[0]].append(row)
    groups = {kind: [kind] for kind in QUESTIONS}
    groups |= {"all images": [k for k in QUESTIONS if k != "motion"], "all videos": ["motion"]}
    scores = {}
    for group, kinds in groups.items():
        right = [row["answer"] == row["reference"] for kind in kinds for row in rows[kind]]
        references = [Counter(row["reference"] for row in rows[kind]) for kind in kinds]
        most = sum(max(counts.values(), default=0) for counts in references)
        if right:
            scores[group] = {"right": sum(right) / len(right), "most": most / len(right)}
    return scores


def print_table(parts: dict) -> None:
    print_header("question", "held out", "frames reversed", "black", "most frequent answer")
    for group, scores in parts["held_out"].items():
        row = [parts[name].get(group, {}).get("right") for name in parts] + [scores["most"]]
        print_row(group, *("" if value is None else f"{value:.1%}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for all files")
    parser.add_argument("--num_train", type=int, default=24_000, help="samples to train on")
    parser.add_argument("--num_held_out", type=int, default=1_500, help="samples to ask about")
    arguments = parser.parse_args()
    folder = arguments.output_dir.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: name a new folder")
    clock = [time.perf_counter()]
    shared = draw_train(folder, arguments.num_train) & draw_held_out(folder, arguments.num_held_out)
    assert not shared, "a held-out picture is also trained on"
    clock.append(time.perf_counter())
    flags = "--model_name_or_path tiny --device cpu --train_data train.json --output_dir run"
    flags += f" --max_pixels {SIDE**2} --video_max_pixels {SIDE**2} --video_fps {FPS}"
    flags += " --num_epochs 1 --batch_size 16 --learning_rate 3e-4 --num_workers 1"
    flags += " --save_steps 1000000"
    run_script(folder, "finetune.py", flags)
    clock.append(time.perf_counter())
    parts = {name: ask(folder, name) for name in ("held_out", "reversed", "black")}
    clock.append(time.perf_counter())
    laps = (end - begin for begin, end in pairwise(clock))
    seconds = dict(zip(("drawing", "training", "answering"), laps))
    print_table(parts)
    print(f"\n{arguments.num_train:,} training samples")
    print(", ".join(f"{name}: {value:.0f} s" for name, value in seconds.items()))
    results = {"scores": parts, "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
