"""Files of others can't run programs, show what is none of their business, or fill the memory."""

import av
import pytest

import zoo
from helpers import POLICY, image, video
from util.media import video_reader
from util.vision_util import load_media, probe_media

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EndComments\n{} loop\n%%EOF\n"
WMF = b"\xd7\xcd\xc6\x9a\0\0" + bytes(100)


@pytest.mark.parametrize("form, content", [("EPS", EPS), ("WMF", WMF)])
def test_pictures_that_other_programs_would_draw_are_refused_by_name(tmp_path, form, content):
    (tmp_path / "x.jpg").write_bytes(content)
    for source in (str(tmp_path / "x.jpg"), content):
        for read in (probe_media, load_media):
            with pytest.raises(ValueError, match=f"{form} is no format .* convert it to PNG"):
                read(image(source), POLICY)


@pytest.mark.parametrize("name", ["private.txt", "notes.nfo", "list.mp4"])
def test_text_is_no_video(tmp_path, name):
    """FFmpeg draws it, as a terminal would; or takes it for a list of files."""
    (tmp_path / "a.mp4").touch()
    start = "ffconcat version 1.0\nfile a.mp4\n" if name == "list.mp4" else "my password\n"
    (tmp_path / name).write_text(start * 40)
    for read in (probe_media, load_media):
        with pytest.raises(ValueError, match="convert it to mp4"):
            read(video(str(tmp_path / name)), POLICY)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_is_refused_for_its_size_before_it_is_decoded(tmp_path):
    for side in (10_001, 13_000, 50_000):
        source = zoo.bomb(tmp_path / "a.png", side)
        for read in (probe_media, load_media):
            with pytest.raises(ValueError, match=f"{side**2:,} pixels, over .* resize the file"):
                read(image(source), POLICY)
    assert probe_media(image(zoo.bomb(tmp_path / "a.png", 9_999)), POLICY)


def test_a_clip_is_refused_for_its_size_before_it_is_decoded(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(video_reader, "MAX_FRAME_PIXELS", 200 * 200)
    path = zoo.make_zoo_clip(clips, "motion_jpeg.avi")
    load_media(video(path), POLICY)
    # Frames can be larger than the header says.
    large = zoo.encode_image(zoo.smooth(1000, 1000), "JPEG")

    def enlarge(packets):
        new = [av.Packet(large if i > 20 else bytes(packet)) for i, packet in enumerate(packets)]
        for packet, old in zip(new, packets):
            packet.pts, packet.dts, packet.time_base = old.pts, old.dts, old.time_base
            packet.is_keyframe = True
        return new

    liar = zoo.copy_packets(path, tmp_path / "a.avi", enlarge)
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_media(video(liar), POLICY)
    monkeypatch.setattr(video_reader, "MAX_FRAME_PIXELS", 96 * 144 - 1)
    with pytest.raises(ValueError, match="144 x 96 pixels, over .* resize the file"):
        probe_media(video(path), POLICY)
