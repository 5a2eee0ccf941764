"""Pictures and clips come from files, URIs, bytes, and the network where that is allowed."""

import base64
import dataclasses
import http.server
import threading
import time
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

import zoo
from helpers import POLICY, encoder_for, image, user, video
from util.media import source as media_source
from util.vision_util import load_media, probe_media


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_source_gives_the_same(clips, tmp_path, kind):
    path = tmp_path / "a:b c%20d"
    content = zoo.encode_image(zoo.smooth(60, 90), "PNG")
    if kind == "video":
        content = Path(zoo.make_zoo_clip(clips, "h264.mkv")).read_bytes()
    path.write_bytes(content)
    data = base64.b64encode(content).decode()
    uris = (f"data:{kind}/any;base64,{data}", f"data:;base64,{data[:50]}\n{data[50:]}")
    opened = [Image.open(path)] if kind == "image" else []
    expected, shape = load_media({"type": kind, kind: str(path)}, POLICY)
    for source in (path.as_uri(), content, *uris, *opened, *opened):  # PIL images can be used again
        item = {"type": kind, kind: source}
        assert probe_media(item, POLICY) == shape
        assert torch.equal(load_media(item, POLICY)[0], expected)


def test_media_in_the_data_are_found_whatever_they_are(tiny_folder, tmp_path):
    content = zoo.encode_image(zoo.smooth(60, 90), "PNG")
    (tmp_path / "a b.png").write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    encoder = encoder_for(tiny_folder)
    items = [
        *(image(s) for s in ("a b.png", uri, content, "file://" + str(tmp_path / "a%20b.png"))),
        video(["a b.png", uri, content]) | {"max_pixels": 30000},
    ]
    [message] = encoder.prepare({"messages": [user(*items)]}, tmp_path)
    found = [item[item["type"]] for item in message["content"]]
    assert found[0] == found[3] == found[4][0] == str(tmp_path / "a b.png")
    assert found[1:3] == found[4][1:] == [uri, content]
    bad = "data:image/png;base64," + "A" * 5000
    record = {"messages": [user(image(bad)), {"role": "assistant", "content": "x"}]}
    with pytest.raises(ValueError) as info:
        encoder.measure(record)
    assert "message 0" in str(info.value) and len(str(info.value)) < 300


# ------------------------------------------------------------------ the network


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a picture, faults, and answers that never come to an end."""

    picture = zoo.encode_image(zoo.smooth(60, 90), "PNG")

    def do_GET(self):
        self.server.paths.append(self.path)
        name, num_asked = self.path[1:].removesuffix(".png"), self.server.paths.count(self.path)
        if name == "missing":
            return self.send_error(404)
        if name.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            return self.end_headers()
        if name in ("503", "429", "reset") and num_asked < 3:
            return None if name == "reset" else self.send_error(int(name))
        if name == "stall":
            return self.server.done.wait(20)
        self.send_response(200)
        self.end_headers()
        chunk, pause = {"trickle": (b"x", 0.05), "endless": (bytes(1 << 16), 0)}.get(name, (b"", 0))
        while chunk and not self.server.done.wait(pause):
            self.wfile.write(chunk)
        self.wfile.write(self.picture)

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the client has had enough
            pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.paths, server.done = True, [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_only_when_allowed(server, monkeypatch):
    item = image(server.url + "/a.png")
    with pytest.raises(ValueError, match="--allow_remote_media"):
        probe_media(item, POLICY)
    assert not server.paths
    remote = dataclasses.replace(POLICY, allow_remote_media=True)
    assert probe_media(item, remote) == load_media(item, remote)[1]
    monkeypatch.setattr(media_source, "REMOTE_SECONDS", 0.5)
    monkeypatch.setattr(media_source, "MAX_REMOTE_BYTES", 1 << 20)
    for path, reason in (
        ("missing", "404"),
        ("stall", "answer|timed out"),
        ("trickle", "no complete answer"),
        ("endless", "larger than 1 MiB"),
    ):
        start = time.monotonic()
        with pytest.raises(ValueError, match=reason):
            probe_media(image(f"{server.url}/{path}.png"), remote)
        assert time.monotonic() - start < 5


def test_a_server_that_is_busy_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(media_source, "RETRY_SECONDS", (0.01, 0.01))
    for name in ("503", "429", "reset"):
        assert media_source.fetch(f"{server.url}/{name}.png") == Server.picture
    assert len(server.paths) == 9
    monkeypatch.setattr(media_source, "RETRY_SECONDS", ())
    server.paths.clear()
    for name, reason in (("503", "503"), ("reset", "closed connection|reset")):
        with pytest.raises(ValueError, match=reason):
            media_source.fetch(f"{server.url}/{name}.png")


def test_redirects_lead_to_no_private_address(server, monkeypatch):
    url = f"{server.url}/to/{server.url}/a.png"
    assert media_source.fetch(url) == Server.picture  # from one such address to another
    for target in ("ftp://127.0.0.1/a.png", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="redirect|Found"):
            media_source.fetch(f"{server.url}/to/{target}")
    server.paths.clear()
    monkeypatch.setattr(media_source, "is_public", lambda url: "/to/" in url)
    with pytest.raises(ValueError, match="redirects to .* not a public address"):
        media_source.fetch(url)
    assert len(server.paths) == 1


def test_public_addresses():
    private = ("127.0.0.1:80", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]")
    private += ("[fe80::1]", "192.168.1.1", "0.0.0.0", "2130706433", "localhost")
    assert not any(media_source.is_public(f"http://{host}/a.png") for host in private)
    assert media_source.is_public("https://1.1.1.1/a.png")


def test_a_playlist_does_not_call_out(server, tmp_path):
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXTINF:10,\n{server.url}/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises((ValueError, av.error.FFmpegError)):
        load_media(video(str(path)), dataclasses.replace(POLICY, allow_remote_media=True))
    assert not server.paths
