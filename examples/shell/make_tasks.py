"""Small shell-and-code tasks in Harbor's format, drawn by a seed: eight kinds in three difficulties.

    python examples/shell/make_tasks.py --out tasks --count 24

Each folder has an instruction, files to work on, tests that write a reward of 0 or 1, and a solution of one command.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tyro

WORDS = ("apple", "bread", "cloud", "drum", "eagle", "flute", "grape", "house")
_TOML = """\
version = "1.0"

[metadata]
difficulty = "{difficulty}"
category = "shell"

[verifier]
timeout_sec = 20.0

[agent]
timeout_sec = 60.0
"""
_TEST = """\
#!/bin/bash
# 1 where the check succeeds within its time, else 0.
mkdir -p /logs/verifier
if timeout 5 bash -c {check} > /dev/null 2>&1; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""


@dataclass(frozen=True, kw_only=True)
class ShellTask:
    """``check`` is a command that succeeds once the task is done; ``solution`` does it; ``files`` are there before."""

    kind: str
    difficulty: str
    instruction: str
    check: str
    solution: str
    files: dict[str, str] = field(default_factory=dict)


def write_word(rng: random.Random) -> ShellTask:
    word, out = rng.sample(WORDS, 2)
    return ShellTask(
        kind="write",
        difficulty="easy",
        instruction=f"Write {word} into {out}.txt.",
        check=f'[ "$(cat {out}.txt)" = {word} ]',
        solution=f"echo {word} > {out}.txt",
    )


def count_lines(rng: random.Random) -> ShellTask:
    source, out = rng.sample(WORDS, 2)
    lines = rng.randint(3, 40)
    return ShellTask(
        kind="count",
        difficulty="easy",
        instruction=f"Write how many lines {source}.txt has into {out}.txt.",
        check=f'[ "$(tr -d " \\n" < {out}.txt)" = {lines} ]',
        solution=f"wc -l < {source}.txt > {out}.txt",
        files={f"{source}.txt": "".join(f"{rng.choice(WORDS)}\n" for _ in range(lines))},
    )


def copy_file(rng: random.Random) -> ShellTask:
    source, out = rng.sample(WORDS, 2)
    secret = f"{rng.getrandbits(40):010x}"
    return ShellTask(
        kind="copy",
        difficulty="easy",
        instruction=f"Copy {source}.txt to {out}.txt.",
        check=f'[ "$(cat {out}.txt)" = {secret} ]',
        solution=f"cp {source}.txt {out}.txt",
        files={f"{source}.txt": f"{secret}\n"},
    )


def find_fact(rng: random.Random) -> ShellTask:
    word, out, holder, *others = rng.sample(WORDS, 6)
    files = {f"{name}.log": f"{rng.getrandbits(40):010x}\n" for name in others}
    return ShellTask(
        kind="find",
        difficulty="medium",
        instruction=f"Write the name of the log that has {word} in it into {out}.txt.",
        check=f'[ "$(cat {out}.txt)" = {holder}.log ]',
        solution=f"grep -l {word} *.log > {out}.txt",
        files={**files, f"{holder}.log": f"{rng.getrandbits(40):010x}\n{word}\n"},
    )


def sort_lines(rng: random.Random) -> ShellTask:
    source, out = rng.sample(WORDS, 2)
    numbers = [rng.randint(1, 999) for _ in range(12)]
    return ShellTask(
        kind="sort",
        difficulty="medium",
        instruction=f"Sort the numbers of {source}.txt into {out}.txt.",
        check=f'[ "$(tr "\\n" " " < {out}.txt)" = "{" ".join(map(str, sorted(numbers)))} " ]',
        solution=f"sort -n {source}.txt > {out}.txt",
        files={f"{source}.txt": "".join(f"{number}\n" for number in numbers)},
    )


def fix_script(rng: random.Random) -> ShellTask:
    script, word = rng.sample(WORDS, 2)
    wrong = rng.choice(("ehco", "ecoh", "echoo"))
    return ShellTask(
        kind="fix",
        difficulty="medium",
        instruction=f"{script}.sh fails at {wrong}. Fix it.",
        check=f'[ "$(bash {script}.sh)" = {word} ]',
        solution=f"sed -i s/{wrong}/echo/ {script}.sh",
        files={f"{script}.sh": f"{wrong} {word}\n"},
    )


def sum_column(rng: random.Random) -> ShellTask:
    source, out = rng.sample(WORDS, 2)
    rows = [[rng.randint(1, 99) for _ in range(3)] for _ in range(8)]
    column = rng.randint(1, 3)
    return ShellTask(
        kind="csv",
        difficulty="hard",
        instruction=f"Write the sum of column {column} of {source}.csv into {out}.txt.",
        check=f'[ "$(tr -d " \\n" < {out}.txt)" = {sum(row[column - 1] for row in rows)} ]',
        solution=f"awk -F, '{{s+=${column}}} END {{print s}}' {source}.csv > {out}.txt",
        files={f"{source}.csv": "".join(",".join(map(str, row)) + "\n" for row in rows)},
    )


def write_function(rng: random.Random) -> ShellTask:
    name = rng.choice(WORDS)
    number = rng.randint(2, 9)
    does, sign = rng.choice((("adds", "+"), ("subtracts", "-"), ("multiplies by", "*")))
    check = (
        f"from {name} import {name}; assert [{name}(x) for x in (0, 5, -7)] == [x {sign} {number} for x in (0, 5, -7)]"
    )
    return ShellTask(
        kind="function",
        difficulty="hard",
        instruction=f"Write a Python function {name} into {name}.py that {does} {number}.",
        check=f"python3 -c '{check}'",
        solution=f"echo 'def {name}(x): return x {sign} {number}' > {name}.py",
    )


KINDS: tuple[Callable[[random.Random], ShellTask], ...] = (
    write_word,
    find_fact,
    sum_column,
    count_lines,
    fix_script,
    write_function,
    copy_file,
    sort_lines,
)


def draw_task(index: int, seed: int) -> ShellTask:
    """The kinds take turns."""
    return KINDS[index % len(KINDS)](random.Random(f"{seed}-{index}"))


def write_tasks(folder: Path, count: int, seed: int) -> None:
    """Writes ``count`` task folders below ``folder``."""
    for index in range(count):
        task = draw_task(index, seed)
        place = folder / f"{task.kind}-{index:05d}"
        for part in ("environment", "tests", "solution"):
            (place / part).mkdir(parents=True)
        (place / "task.toml").write_text(_TOML.format(difficulty=task.difficulty))
        (place / "instruction.md").write_text(f"{task.instruction}\n")
        for name, content in task.files.items():
            (place / "environment" / name).write_text(content)
        quoted = "'" + task.check.replace("'", "'\\''") + "'"
        (place / "tests" / "test.sh").write_text(_TEST.format(check=quoted))
        (place / "solution" / "solve.sh").write_text(f"#!/bin/bash\n{task.solution}\n")


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path
    count: int = 24
    seed: int = 0


def main(options: Options) -> None:
    options.out.mkdir(parents=True)
    write_tasks(options.out, options.count, options.seed)
    print(f"{options.out}: {options.count} tasks")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
