"""The comparison page of a real run, in a real browser. UPDATE_SCREENSHOTS=1 renews docs/."""

import json
import os
import shutil

import pytest

import compare
import finetune
import test_on_official_model
import test_on_trained_model_by_us
from helpers import REPO, call, shown

UPDATE = os.environ.get("UPDATE_SCREENSHOTS") == "1"


def copy_prompts(folder) -> None:
    """Write prompts.json and its media: what train_data and test_data hold."""
    rows = []
    for source, name in (("train_data", "data.json"), ("test_data", "prompts.json")):
        shutil.copytree(REPO / source, folder, dirs_exist_ok=True)
        records = json.loads((folder / name).read_text(encoding="utf-8"))
        rows += [{"id": f"{source} {i}", **record} for i, record in enumerate(records)]
    (folder / "prompts.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def page_files(browser, tmp_path_factory):
    """A short run on train_data, answered and compared: (page, base answers, trained answers)."""
    folder = tmp_path_factory.mktemp("browser")
    copy_prompts(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)  # so that the page shows no path of this machine
        run = "train_output/run"
        # The pictures in docs/ show the default run; for the tests a few steps of it are enough.
        steps = () if UPDATE else ("--max_steps", 12, "--learning_rate", 3e-3)
        flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--num_workers", 0)
        call(finetune, *flags, "--train_data", "data.json", "--output_dir", run, *steps)
        flags = ("--model_dir", run, "--prompts", "prompts.json", "--device", "cpu")
        flags = (*flags, "--max_new_tokens", 64 if UPDATE else 16, "--save")
        call(test_on_official_model, *flags, "base.json")
        call(test_on_trained_model_by_us, *flags, "trained.json")
        call(compare, "base.json", "trained.json", "--output", "compare.html")
    if UPDATE:
        shutil.copy(folder / run / "loss.png", REPO / "docs" / "loss.png")
    paths = [folder / name for name in ("compare.html", "base.json", "trained.json")]
    return paths


def test_filters_and_search(page_files, open_page):
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
    page.get_by_role("button", name="All").click()
    page.get_by_role("searchbox").fill("\u5efa\u7b51")
    assert shown(page) == ["train_data 4"]


def test_pictures_are_shown_and_clips_play(page_files, open_page):
    page = open_page(page_files[0])
    widths = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(widths) > 10 and all(widths)
    clips = page.locator("video")
    assert clips.count() == 2
    for clip in clips.all():
        clip.scroll_into_view_if_needed()
        clip.evaluate("clip => clip.play()")
        page.wait_for_function("clip => clip.currentTime > 0.2", arg=clip.element_handle())
        assert clip.evaluate("clip => clip.videoWidth") > 0


def test_the_loss_curve_and_the_settings(page_files, open_page):
    page = open_page(page_files[0])
    assert page.locator("svg polyline").count() == 2
    box = page.locator("svg polyline.mean").bounding_box()
    assert box["width"] > 300 and box["height"] > 20
    assert not page.get_by_text("max_new_tokens").is_visible()
    page.get_by_text("Models and settings").click()
    assert page.get_by_text("max_new_tokens").is_visible()


def test_looks(page_files, check_looks):
    sides = "article .answer.first", "article .answer.second"
    page = check_looks(page_files[0], *sides, "article")
    if UPDATE and page:
        page.set_viewport_size({"width": 1200, "height": 1240})
        page.screenshot(path=REPO / "docs" / "compare.png")


def test_without_scripts_everything_can_be_read(page_files, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_files[0].as_uri())
    assert page.locator("article").count() == 18 and not page.locator(".tools").is_visible()
    assert page.get_by_text("What stands on the launch pad").is_visible()
    context.close()


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
