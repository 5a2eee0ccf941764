"""The comparison page of a real run, in a real browser. UPDATE_SCREENSHOTS=1 renews docs/."""

import json
import os
import shutil

import pytest
from PIL import Image

import compare
import finetune
import test_on_official_model
import test_on_trained_model_by_us
from helpers import REPO, call, shown

UPDATE = os.environ.get("UPDATE_SCREENSHOTS") == "1"


def all_prompts() -> list[dict]:
    """Return the samples of train_data and the prompts of test_data, with absolute paths."""
    rows = []
    for folder, name in (("train_data", "data.json"), ("test_data", "prompts.json")):
        records = json.loads((REPO / folder / name).read_text(encoding="utf-8"))
        for i, record in enumerate(records):
            for message in record["messages"]:
                for item in message["content"] if isinstance(message["content"], list) else ():
                    for kind in {"image", "video"} & set(item):
                        item[kind] = str(REPO / folder / item[kind])
            rows.append({"id": f"{folder} {i}", **record})
    return rows


@pytest.fixture(scope="module")
def page_files(browser, tmp_path_factory):
    """A short run on train_data, answered and compared: (page, base answers, trained answers)."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "prompts.json").write_text(json.dumps(all_prompts()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)  # so that the page shows no path of this machine
        run = "train_output/run"
        # The pictures in docs/ show the default run; for the tests a few steps of it are enough.
        steps = () if UPDATE else ("--max_steps", 20, "--learning_rate", 3e-3)
        flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--num_workers", 0)
        flags = (*flags, "--train_data", REPO / "train_data" / "data.json")
        call(finetune, *flags, "--output_dir", run, *steps)
        flags = ("--model_dir", run, "--prompts", "prompts.json", "--device", "cpu")
        flags = (*flags, "--max_new_tokens", 64, "--save")
        call(test_on_official_model, *flags, "base.json")
        call(test_on_trained_model_by_us, *flags, "trained.json")
        call(compare, "base.json", "trained.json", "--output", "compare.html")
    if UPDATE:
        (REPO / "docs").mkdir(exist_ok=True)
        shutil.copy(folder / run / "loss.png", REPO / "docs" / "loss.png")
    paths = [folder / name for name in ("compare.html", "base.json", "trained.json")]
    return paths


def test_filters(page_files, open_page):
    page = open_page(page_files[0])
    base, trained = (json.loads(path.read_text(encoding="utf-8")) for path in page_files[1:])
    pairs = list(zip(base["answers"], trained["answers"]))
    changed = [a["id"] for a, b in pairs if a["answer"] != b["answer"]]
    assert len(shown(page)) == len(pairs) == 18 and changed
    page.get_by_role("button", name="Changed").click()
    assert shown(page) == changed
    page.get_by_role("button", name="Better").click()
    better = shown(page)
    assert 0 < len(better) <= 12
    assert page.locator("article:visible .tag").all_text_contents() == ["better"] * len(better)
    assert page.get_by_role("button", name="Better").get_attribute("aria-pressed") == "true"
    assert page.get_by_role("button", name="Changed").get_attribute("aria-pressed") == "false"
    assert page.get_by_role("status").inner_text() == f"{len(better)} of 18"
    page.get_by_role("button", name="All").click()
    assert len(shown(page)) == 18


def test_search(page_files, open_page):
    page = open_page(page_files[0])
    search = page.get_by_role("searchbox")
    search.fill("LAUNCH time")  # both words, in any order and case
    assert shown(page) == ["train_data 2"]
    search.fill("\u6d41\u7a0b\u5efa\u7b51")
    assert shown(page) == [] and page.get_by_text("No prompt matches").is_visible()
    search.fill("\u5efa\u7b51")
    assert shown(page) == ["train_data 4"]
    page.get_by_role("button", name="Better").click()  # filter and search hold together
    assert set(shown(page)) <= {"train_data 4"}
    page.get_by_role("button", name="All").click()
    search.fill("")
    assert len(shown(page)) == 18


def test_clips_play(page_files, open_page):
    page = open_page(page_files[0])
    clips = page.locator("video")
    assert clips.count() == 2
    for clip in clips.all():
        clip.scroll_into_view_if_needed()
        clip.evaluate("clip => clip.play()")
        page.wait_for_function("clip => clip.currentTime > 0.2", arg=clip.element_handle())
        assert clip.evaluate("clip => clip.videoWidth") > 0


def test_pictures_are_shown_and_enlarge(page_files, open_page):
    page = open_page(page_files[0])
    widths = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(widths) > 10 and all(widths)
    picture = page.locator("img").first
    before = picture.bounding_box()["width"]
    picture.click()
    assert picture.bounding_box()["width"] > 1.5 * before
    picture.click()
    assert picture.bounding_box()["width"] == before


def test_the_loss_curve_and_the_settings(page_files, open_page):
    page = open_page(page_files[0])
    assert page.locator("svg polyline").count() == 2
    box = page.locator("svg polyline.mean").bounding_box()
    assert box["width"] > 300 and box["height"] > 20
    assert not page.get_by_text("max_new_tokens").is_visible()
    page.get_by_text("Models and settings").click()
    assert page.get_by_text("max_new_tokens").is_visible()


@pytest.mark.parametrize("size", ["light", "dark", "phone"])
def test_looks(page_files, open_page, size, tmp_path):
    page = open_page(page_files[0], size)
    width = page.viewport_size["width"]
    # Nothing sticks out to the side.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    first, second = (page.locator(f"article .answer.{side}").first for side in ("first", "second"))
    is_beside = first.bounding_box()["x"] < second.bounding_box()["x"]
    assert is_beside == (size != "phone")
    path = tmp_path / f"{size}.png"
    page.screenshot(path=path)
    image = Image.open(path).convert("L")
    assert (image.getpixel((2, 2)) < 60) == (size == "dark")
    if UPDATE and size == "light":
        page.set_viewport_size({"width": width, "height": 1240})
        page.screenshot(path=REPO / "docs" / "compare.png")


def test_without_scripts_everything_can_be_read(page_files, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_files[0].as_uri())
    assert page.locator("article").count() == 18 and not page.locator(".tools").is_visible()
    assert page.get_by_text("What stands on the launch pad").is_visible()
    context.close()


def test_hostile_answers_do_nothing(page_files, open_page, tmp_path, monkeypatch):
    attack = "document.title='owned'"
    hostile = f'</script><script>{attack}</script><img src=x onerror="{attack}">'
    paths = []
    for i, path in enumerate(page_files[1:]):
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["model"] = hostile
        for row in saved["answers"]:
            row |= {"id": hostile, "answer": f"{i}{hostile}", "reference": hostile}
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(saved))
    output = tmp_path / "hostile.html"
    monkeypatch.chdir(REPO)
    call(compare, *paths, "--output", output)
    page = open_page(output)
    page.wait_for_timeout(200)
    assert page.title() == "0 / 1"
    assert page.locator("article .answer .text").first.inner_text() == "0" + hostile


def test_the_policy_stops_what_slips_through(page_files, browser, tmp_path):
    source = page_files[0].read_text(encoding="utf-8")
    slipped = (
        "<script>document.title='owned'</script><img src=https://example.com/x onerror=alert(1)>"
    )
    (tmp_path / "x.html").write_text(source.replace("<main>", f"<main>{slipped}"))
    page = browser.new_page()
    failures, responses, complaints = [], [], []
    page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
    page.on("response", lambda response: responses.append(response.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto((tmp_path / "x.html").as_uri())
    page.wait_for_timeout(200)
    assert page.title() == "base / trained" and len(complaints) >= 2
    assert failures == [("https://example.com/x", "csp")]
    assert not any(address.startswith("https") for address in responses)
    assert len(shown(page)) == 18  # the page's own script ran
    page.close()
