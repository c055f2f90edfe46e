"""The manifest: strict lines, the shipped list, and which entry would bring a file."""

import pytest

from lorapilot.errors import Missing
from models_registry import manifest
from models_registry.enums import Architecture
from models_registry.manifest import parse, parse_line

SHA = "a" * 64


def test_line_with_every_column():
    entry = parse_line(
        "flux1-dev | hf_file | black-forest-labs/FLUX.1-dev:flux1-dev.safetensors | diffusion_models | | 23802932552 |"
        " flux-1-dev-non-commercial | yes | flux | kohya, builtin | transformer"
    )
    assert (entry.name, entry.kind, entry.subdir, entry.include) == ("flux1-dev", "hf_file", "diffusion_models", ())
    assert (entry.repository, entry.repository_path) == ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors")
    assert (entry.expected_size_bytes, entry.licence, entry.is_gated) == (
        23802932552,
        "flux-1-dev-non-commercial",
        True,
    )
    assert (entry.architecture, entry.stacks, entry.role) == ("flux", ("kohya", "builtin"), "transformer")
    assert (entry.family, entry.category, entry.is_registrable) == ("FLUX.1", "diffusion_models", True)
    assert entry.target() == "diffusion_models/flux1-dev.safetensors"
    assert entry.target("other/place") == "other/place/flux1-dev.safetensors"
    assert entry.licence_address == "https://huggingface.co/black-forest-labs/FLUX.1-dev"


def test_line_with_the_least_columns():
    entry = parse_line("t5|hf_repo|google/t5-v1_1-xxl|tokenizers/google_t5-v1_1-xxl")
    assert (entry.include, entry.expected_size_bytes, entry.is_gated, entry.stacks) == ((), None, False, ())
    assert (entry.target(), entry.category) == ("tokenizers/google_t5-v1_1-xxl", "tokenizers")


@pytest.mark.parametrize(
    ("source", "include", "file_name", "sha256"),
    [
        ("https://civitai.com/api/download/models/1", "photo.safetensors", "photo.safetensors", ""),
        ("https://example.org/a/b.safetensors?x=1", "", "b.safetensors", ""),
        (f"https://example.org/b.safetensors#sha256={SHA}", "", "b.safetensors", SHA),
    ],
)
def test_line_of_an_address(source, include, file_name, sha256):
    entry = parse_line(f"x|url|{source}|checkpoints|{include}")
    assert (entry.file_name, entry.sha256, entry.repository) == (file_name, sha256, "")
    assert entry.target() == f"checkpoints/{file_name}"


@pytest.mark.parametrize(
    ("cell", "size"),
    [("", None), ("0", 0), ("6938078334", 6938078334), ("6.9GB", 6_900_000_000), ("1.5 GiB", 3 * 2**29), ("4kb", 4000)],
)
def test_sizes(cell, size):
    assert parse_line(f"x|hf_repo|a/b|c||{cell}").expected_size_bytes == size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x|hf_file|a/b:c.safetensors", "3 columns"),
        ("x|hf_repo|a/b|c||||||||more", "12 columns"),
        ("../x|hf_repo|a/b|c", "the name"),
        ("|hf_repo|a/b|c", "the name"),
        ("x|git|a/b|c", "kind is 'git'"),
        ("x|hf_file|a/b|c", "owner/repository:path"),
        ("x|hf_file|a/b:../c.safetensors|c", "owner/repository:path"),
        ("x|hf_file|a/b:/c.safetensors|c", "owner/repository:path"),
        ("x|hf_file|b:c.safetensors|c", "owner/repository:path"),
        ("x|hf_file|a/b:c.safetensors|c|*.json", "leave include empty"),
        ("x|hf_file|a/b:c.ckpt|c", "c.ckpt: a pickle file can run any program"),
        ("x|hf_file|a/b:c.BIN|c", "c.BIN: a pickle file"),
        ("x|hf_repo|a/b|", "needs a folder"),
        ("x|hf_repo|a/b|c|*.json,*.bin", "[*].bin: a pickle file"),
        ("x|hf_repo|a/b|../c", "the folder"),
        ("x|hf_repo|a/b|/c", "the folder"),
        ("x|hf_repo|a/b|c//d", "the folder"),
        ("x|hf_repo|a/b|.hidden", "the folder"),
        ("x|hf_repo|a/b|c\\d", "the folder"),
        ("x|url|example.org/x.safetensors|c", "starts with https://"),
        ("x|url|https://me:pw@example.org/x.safetensors|c", "starts with https://"),
        ("x|url|https://example.org/x.safetensors#sha256=12|c", "64 lower-case"),
        ("x|url|https://example.org/download/1|c", "no plain file name"),
        ("x|url|https://example.org/1|c|../x.safetensors", "no plain file name"),
        ("x|url|https://example.org/1|c|x.pt", "x.pt: a pickle file"),
        ("x|url|https://example.org:1x/x.safetensors|c", "no address"),
        ("x|url|https://example.org/a b.safetensors|c", "no spaces"),
        ("x|hf_repo|a/b|c||much", "the size"),
        ("x|hf_repo|a/b|c||1.5", "the size"),
        ("x|hf_repo|a/b|c||-1", "the size"),
        (f"x|hf_repo|a/b|c||{'9' * 5000}", "the size"),
        ("x|hf_repo|a/b|c||||maybe", "gated is 'maybe'"),
        ("x|hf_repo|a/b|c|||||SDXL!", "the architecture"),
        ("x|hf_repo|a/b|c||||||kohya,other", "stacks is 'other'"),
        ("x|hf_repo|a/b|c|||||||brain", "role is 'brain'"),
    ],
)
def test_wrong_lines(line, reason):
    with pytest.raises(manifest.WrongLine, match=reason):
        parse_line(line)


def test_parse_reports_wrong_lines_and_uses_the_others():
    found = parse("\ufeff# comment\n\na|hf_repo|a/b|c\nb|wrong\n  # another\nA|hf_repo|a/b|d\nc|hf_repo|a/b|c\n")
    assert [entry.name for entry in found.entries] == ["a", "c"]
    assert [problem.line for problem in found.problems] == [4, 6]
    assert str(found.problems[1]) == "Line 6: there is a model called A above."


def test_parse_refuses_two_models_in_one_place():
    found = parse("a|hf_file|a/b:x.safetensors|vae\nb|hf_file|c/d:e/X.safetensors|vae\n")
    assert [str(problem) for problem in found.problems] == ["Line 2: vae/X.safetensors is where a goes."]


def test_shipped_manifest_has_a_base_model_of_every_kind_that_is_recognised():
    """But for Stable Diffusion 2, whose publisher has taken it off the hub."""
    offered = {entry.architecture for entry in manifest.load().entries if entry.is_registrable}
    assert set(Architecture.values) - offered == {Architecture.SD2, Architecture.UNKNOWN}


def test_shipped_manifest_has_no_problems():
    found = manifest.load()
    assert (found.problems, len(found.entries) > 40) == ((), True)
    assert {stack for entry in found.entries for stack in entry.stacks} == set(manifest.STACKS)
    tokenizers = [entry for entry in found.entries if entry.role == "tokenizer"]
    assert [entry.subdir for entry in tokenizers] == [
        f"tokenizers/{entry.source.replace('/', '_')}" for entry in tokenizers
    ]


def test_load_reads_a_changed_file_again(manifest_of):
    assert manifest.load().entries == ()
    manifest_of("a|hf_repo|a/b|c", "b|hf_repo|a/b|d")
    assert [entry.name for entry in manifest.load().entries] == ["a", "b"]
    assert manifest.find("b").subdir == "d"
    with pytest.raises(Missing):
        manifest.find("c")


def test_load_of_a_file_that_cannot_be_read(settings, tmp_path):
    settings.MODELS_MANIFEST = tmp_path / "nothing"
    assert [problem.line for problem in manifest.load().problems] == [0]
    settings.MODELS_MANIFEST.write_bytes(b"\xff\xfe\x00")
    assert "no readable text" in str(manifest.load().problems[0])


@pytest.mark.parametrize(
    ("path", "repository", "name"),
    [
        ("vae/ae.safetensors", "", "ae"),
        ("/anywhere/else/ae.safetensors", "", "ae"),
        ("ae.safetensors", "c/lumina", "ae"),
        ("split/vae/ae.safetensors", "c/lumina", "ae"),
        ("ae.safetensors", "some/other", None),
        ("other.safetensors", "", None),
        ("twice.safetensors", "", None),
        ("twice.safetensors", "c/two", "twice-b"),
        ("vae/model.safetensors", "c/folder", "folder"),
        ("vae/model.bin", "c/folder", None),
        ("unet/model.safetensors", "c/folder", None),
        ("vae/model.safetensors", "", None),
    ],
)
def test_entry_for_file_goes_by_what_the_file_is(manifest_of, path, repository, name):
    manifest_of(
        "ae|hf_file|c/lumina:split/vae/ae.safetensors|vae",
        "twice-a|hf_file|c/one:twice.safetensors|a",
        "twice-b|hf_file|c/two:twice.safetensors|b",
        "folder|hf_repo|c/folder|diffusers/folder|vae/*",
    )
    found = manifest.entry_for_file(path, repository=repository)
    assert (found and found.name) == name
