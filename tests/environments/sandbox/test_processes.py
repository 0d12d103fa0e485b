"""Whose processes are whose."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

from forgejax.environments.sandbox.processes import (
    end_tree,
    find_parent,
    find_root,
    list_members,
    measure_memory,
)


def test_a_later_process_with_the_same_number_is_none_of_a_sandboxs() -> None:
    process = subprocess.Popen(["sleep", "66.5"])
    root = find_root(process.pid)
    earlier = replace(root, began=root.began - 1)
    end_tree(earlier)
    assert process.poll() is None
    members = list_members([root, earlier])
    assert list(members[root]) == [process.pid] and members[root][process.pid] > 0 and members[earlier] == {}
    end_tree(root)
    assert process.wait(timeout=5) == -9


def test_all_that_a_process_starts_is_below_it_whatever_session_it_went_to() -> None:
    script = "import subprocess as s; s.Popen(['setsid', 'sh', '-c', 'echo; sleep 67.5 & wait']).wait()"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    root, until = find_root(process.pid), time.monotonic() + 10.0
    while len(members := list_members([root])[root]) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(members) == 3 and max(members) != process.pid and find_parent(process.pid) not in members
    held = sum(members.values())
    assert measure_memory(members, held) == held and 0 < measure_memory(members, 1) < held
    for member in members:
        end_tree(find_root(member))
    process.wait(timeout=5)
    process.stdout.close()
