"""Names are plain on every system, and no path leaves its root."""

import pytest

from lorapilot import workspace


@pytest.mark.parametrize("name", ["a", "Model-v1.5_final.safetensors", "0", "x" * 100, "console", "com10", "a.con"])
def test_is_safe_name_accepts(name):
    assert workspace.is_safe_name(name) is True


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-rf",
        "_private",
        "a/b",
        "a\\b",
        "../up",
        "/etc",
        "C:",
        "a b",
        "a\n",
        "a\0",
        "name.",
        "x" * 101,
        "ümlaut",
        "ａ",  # full width
        "e\u0301",  # combining accent
        "a\u202etxt",  # right-to-left override
        "CON",
        "con.txt",
        "Nul",
        "aux.safetensors",
        "com1",
        "LPT9.log",
        "prn",
    ],
)
def test_is_safe_name_refuses(name):
    assert workspace.is_safe_name(name) is False


def test_inside_resolves(tmp_path):
    assert workspace.inside(tmp_path, "a/./b/../c.txt") == tmp_path.resolve() / "a" / "c.txt"
    assert workspace.inside(tmp_path, "") == tmp_path.resolve()


@pytest.mark.parametrize("relative", ["..", "../other", "a/../../other", "/etc/passwd", "a/b/../../../x"])
def test_inside_refuses_to_leave(tmp_path, relative):
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(ValueError, match="is outside"):
        workspace.inside(root, relative)


def test_inside_refuses_a_neighbour_with_the_same_beginning(tmp_path):
    (tmp_path / "root-2").mkdir()
    with pytest.raises(ValueError, match="is outside"):
        workspace.inside(tmp_path / "root", "../root-2/file")


def test_inside_follows_links_and_refuses_those_that_leave(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "alias").symlink_to(root / "real")
    (root / "out").symlink_to(tmp_path)
    (root / "chain").symlink_to(root / "out")
    assert workspace.inside(root, "alias/x") == root.resolve() / "real" / "x"
    for way_out in ("out", "out/file", "chain/file"):
        with pytest.raises(ValueError, match="is outside"):
            workspace.inside(root, way_out)


def test_inside_accepts_a_root_that_is_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    assert workspace.inside(tmp_path / "root", "x") == tmp_path.resolve() / "disk" / "x"


def test_folders_are_made_in_the_workspace(workspace, settings):
    from lorapilot import workspace as places

    for name in ("datasets", "models", "outputs", "cache", "logs"):
        assert getattr(places, name)() == settings.WORKSPACE / name
        assert (settings.WORKSPACE / name).is_dir()
    made = sorted(path.name for path in settings.WORKSPACE.iterdir())
    assert made == ["cache", "datasets", "logs", "models", "outputs"]
