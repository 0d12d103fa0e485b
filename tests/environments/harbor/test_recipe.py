"""What of a Dockerfile can be had without an image, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgejax.environments.harbor.recipe import read_environment
from forgejax.errors import ConfigError


def write(folder: Path, dockerfile: str) -> Path:
    (folder / "data" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "data/c.txt", "data/deep/d.txt"):
        (folder / name).write_text(name)
    (folder / "Dockerfile").write_text(dockerfile)
    return folder


@pytest.mark.parametrize(
    ("dockerfile", "work", "laid"),
    [
        ("FROM ubuntu:24.04\nWORKDIR /app\nCOPY . .\n", "/app", {"a.txt", "b.txt", "data/c.txt", "data/deep/d.txt"}),
        ("FROM python:3.11-slim\nWORKDIR /srv/space\nCOPY a.txt ./\n", "/srv/space", {"a.txt"}),
        ('FROM scratch\nCOPY --chmod=755 ["a.txt", "/app/run.sh"]\n', "/app", {"run.sh"}),
        (
            "# a comment\nFROM debian\nCOPY a.txt b.txt \\\n  in/\nCOPY data /app/\n",
            "/app",
            {"in/a.txt", "in/b.txt", "c.txt", "deep/d.txt"},
        ),
    ],
)
def test_files_go_where_the_dockerfile_says(tmp_path: Path, dockerfile: str, work: str, laid: set[str]) -> None:
    placed = read_environment(write(tmp_path / "environment", dockerfile), "/app")
    placed.lay(tmp_path / "laid")
    files = {str(file.relative_to(tmp_path / "laid")) for file in (tmp_path / "laid").rglob("*") if file.is_file()}
    assert (placed.work, files) == (work, laid)


def test_variables_are_read_in_both_spellings_and_a_folder_without_a_dockerfile_is_all_copied(tmp_path: Path) -> None:
    folder = write(tmp_path / "environment", "FROM debian\nENV A=1 B='two words'\nENV C three\n")
    assert read_environment(folder, "/app").variables == {"A": "1", "B": "two words", "C": "three"}
    (folder / "Dockerfile").unlink()
    assert [name for _, name in read_environment(folder, "/app").copies] == ["a.txt", "b.txt", "data"]
    assert read_environment(tmp_path / "none", "/app").copies == ()


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("FROM nvidia/cuda:12\n", r"line 1: the task needs the image nvidia/cuda:12"),
        ("FROM debian\n\nRUN apt install gcc\n", r"line 3: RUN needs an image to be built"),
        ("FROM debian\nCOPY --from=builder /x /app/x\n", r"line 2: --from=builder needs an image"),
        ("FROM debian\nCOPY a.txt /etc/passwd\n", r"/etc/passwd lies outside the working directory /app"),
        ("FROM debian\nCOPY a.txt ../x\n", r"lies outside the working directory /app"),
        ("FROM debian\nCOPY ../../secret /app/\n", r"is not in|lies outside"),
        ("FROM debian\nCOPY nothing.txt /app/\n", r"line 2: nothing.txt is not in"),
        ("FROM debian\nCOPY a.txt\n", r"line 2: COPY a.txt names no place"),
        ("FROM debian\nWORKDIR /usr/src\n", r"line 2: the working directory /usr/src is the system's"),
    ],
)
def test_what_needs_an_image_is_refused_with_its_line(tmp_path: Path, dockerfile: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_environment(write(tmp_path / "environment", dockerfile), "/app")
