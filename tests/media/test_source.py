"""Local files and data URLs: what may be opened, and what never is."""

import os

import pytest

from opsin.errors import MediaError, MediaTooLarge, UnsupportedMedia
from opsin.media.image import load_image
from opsin.media.limits import Deadline, MediaLimits
from opsin.media.source import open_source
from tests.media.samples import picture, saved


@pytest.fixture
def root(tmp_path):
    """A media root with one picture, and a secret beside it."""
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "in side").mkdir()
    (folder / "in side" / "a.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "secret.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "media-not").mkdir()
    (tmp_path / "media-not" / "a.png").write_bytes(saved(picture(), "PNG"))
    return folder


def test_files_under_a_media_root_are_read_by_any_name(root):
    limits = MediaLimits(media_root=(str(root),))
    path = root / "in side" / "a.png"
    for name in (path, str(path), path.as_uri(), "in side/a.png", "in side/../in side/a.png"):
        assert load_image(name, limits).size == (32, 24)


def test_row_22_nothing_outside_the_media_root_is_read(root, monkeypatch):
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    monkeypatch.chdir(root.parent)
    limits = MediaLimits(media_root=(root,))
    secret = root.parent / "secret.png"
    outside = [
        secret,
        secret.as_uri(),
        "secret.png",
        "../secret.png",
        "in side/../../secret.png",
        "link.png",
        root / "link.png",
        "folder/secret.png",
        root.parent / "media-not" / "a.png",
        f"file://{root}/../secret.png",
        f"file://{root}/%2e%2e/secret.png",
        "~/x.png",
        "/etc/passwd",
        "/proc/self/environ",
    ]
    for name in outside:
        with pytest.raises(MediaError, match="--media-root") as caught:
            load_image(name, limits)
        assert caught.value.status == 400


def test_row_22_a_reply_does_not_tell_whether_a_file_exists(root):
    limits = MediaLimits(media_root=(root,))
    said = set()
    for name in ("secret.png", "absent.png"):
        with pytest.raises(MediaError) as caught:
            load_image(f"../{name}", limits)
        said.add(caught.value.line().replace(name, ""))
    assert len(said) == 1


def test_without_any_root_a_server_reads_no_file(root):
    with pytest.raises(MediaError, match="--media-root DIR"):
        load_image(root / "in side" / "a.png", MediaLimits(media_root=()))


def test_a_missing_file_a_folder_and_a_device_are_named(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases = [
        (tmp_path / "absent.png", "no such file"),
        (tmp_path, "director|folder"),
        ("/dev/zero", "not a file"),
        (pipe, "not a file"),
        ("", "not a file name"),
        ("a\x00b", "not a file name"),
        ("x" * 5000, "too long"),
        ("file://elsewhere/a.png", "this machine"),
        ("file://", "this machine"),
    ]
    for source, words in cases:
        with pytest.raises(MediaError, match=f"(?i){words}") as caught:
            load_image(source)
        assert len(caught.value.line()) < 500


@pytest.mark.parametrize("scheme", ["ftp", "gs", "s3", "jar", "rtsp", "concat"])
def test_other_schemes_are_refused(scheme):
    with pytest.raises(UnsupportedMedia, match=f"scheme {scheme}://"):
        load_image(f"{scheme}://a.example/x.png")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,AAAAA", "not valid base64"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:,", "0 bytes"),
    ],
)
def test_broken_data_urls_say_what_is_wrong(url, words):
    with pytest.raises(MediaError, match=words):
        load_image(url)


def test_row_07_data_url_size_is_checked_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("base64.b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(MediaTooLarge, match="--max-media-bytes"):
        load_image("data:image/png;base64," + "A" * 2000, MediaLimits(max_bytes=1000))


def test_data_urls_keep_their_media_type_and_percent_encoded_base64():
    with open_source(
        "data:text/x;charset=u;base64,aGk%3D", "image", MediaLimits(), Deadline(5)
    ) as opened:
        assert (opened.media_type, opened.file.read()) == ("text/x", b"hi")


def test_error_texts_hold_no_control_characters_credentials_or_long_payloads():
    for source in (
        "x\x1b[31m\n" + "y" * 900,
        "http://user:password@a.example/?key=secret#f",
        "data:image/png;base64," + "QUJD" * 1000,
    ):
        with pytest.raises(MediaError) as caught:
            load_image(source)
        line = caught.value.line()
        assert len(line) < 500
        assert not {"\x1b", "\n"} & set(line)
        assert "password@" not in line
        assert "secret" not in line
