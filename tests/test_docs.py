"""The docs are held to the code: what they show runs, what they name exists, what they promise of imports is kept."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from forgejax.agents import EpisodeSpec, ProcessScaffold
from forgejax.agents.recipes import lay_recipe
from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.run.config import load_config, load_saved
from forgejax.sharding import MeshConfig, resolve
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SessionSpec

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.toml"
DOCS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STRUCTURE = (ROOT / "docs/structure.md").read_text(encoding="utf-8")


class OneAnswer:
    """A sampler that gives the same reply to every request and keeps what it was asked."""

    def __init__(self, reply: list[int]) -> None:
        self.reply = reply
        self.requests: list[SampleRequest] = []

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)
        ids = np.asarray([*self.reply, *sorted(request.stop_ids)[:1]], np.int32)
        if on_tokens is not None:
            on_tokens(ids.tolist())
        return Completion(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            versions=np.zeros(len(ids), np.int32),
            oldest_versions=np.zeros(len(ids), np.int32),
            finish_reason=FinishReason.STOP,
            law=request.law,
        )


def snippet(name: str) -> str:
    """The fenced block of the README behind ``<!-- snippet: name -->``."""
    found = re.search(rf"<!-- snippet: {name} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found is not None, f"the README has no snippet {name!r}"
    return found[1]


def overrides(command: str) -> list[str]:
    """The options in ``make train ARGS="..."``."""
    make, target, arguments = shlex.split(command)
    assert (make, target) == ("make", "train")
    return shlex.split(arguments.removeprefix("ARGS="))


async def test_the_readmes_agent_answers_through_the_gateway_with_the_readmes_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_agent.py").write_text(snippet("agent"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    config = load_config(QUICKSTART, overrides(snippet("command")))
    chat = ChatFormat.load(ROOT / config.tokenizer)
    sampler = OneAnswer(chat.codec.encode("42"))
    gateway = Gateway(sampler, chat, config.engine.max_context, GatewayConfig(port=0))
    scaffold = ProcessScaffold(config.agent)
    await gateway.start()
    await scaffold.start()
    try:
        session = gateway.open(SessionSpec())
        result = await scaffold.run(
            EpisodeSpec(
                id="one",
                question="Calculate 40 + 2.",
                base_url=session.base_url,
                api_key=session.api_key,
                model=session.model,
                context_length=session.context_length,
                deadline_s=config.agent.deadline_s,
            )
        )
        turns = await gateway.close(session.id)
    finally:
        await scaffold.close()
        await gateway.stop()
    assert (result.answer, result.error) == ("42", None)
    asked = chat.render(
        [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": "Calculate 40 + 2."}], ()
    )
    assert [turn.completion.prompt_ids.tolist() for turn in turns] == [list(asked)]


def test_the_readmes_toml_means_the_same_as_its_options(tmp_path: Path) -> None:
    own = re.sub(r"\[agent\]\n.*?(?=\n\[)", lambda _: snippet("toml"), QUICKSTART.read_text(), count=1, flags=re.DOTALL)
    (tmp_path / "mine.toml").write_text(own, encoding="utf-8")
    by_file = load_config(tmp_path / "mine.toml").agent
    by_option = load_config(QUICKSTART, overrides(snippet("command"))).agent
    assert (by_file.kind, by_file.command, by_file.deadline_s) == ("process", ("python", "my_agent.py"), 60.0)
    assert (by_option.kind, by_option.command) == (by_file.kind, by_file.command)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_names_a_tokenizer_that_is_there_or_can_be_fetched(path: Path) -> None:
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    config = load_saved(given | {"agent": lay_recipe(given.get("agent", {}))}, str(path))
    fetched = (ROOT / "scripts" / "fetch_model.py").read_text(encoding="utf-8")
    folder = Path(config.tokenizer_folder)
    assert (ROOT / folder / "tokenizer.json").is_file() or (
        folder.parent == Path("models") and f'folder="{folder.name}"' in fetched
    )


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_every_path_a_doc_links_to_or_names_exists(doc: Path) -> None:
    text = doc.read_text(encoding="utf-8")
    linked = [doc.parent / link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    named = [ROOT / path for path in re.findall(r"`((?:forgejax|scripts|examples|tests)/[\w/.-]*)`", text)]
    assert [str(path) for path in linked + named if not path.exists()] == []


@pytest.mark.parametrize("doc", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda doc: doc.name)
def test_every_make_target_a_doc_names_exists(doc: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", doc.read_text(encoding="utf-8"), re.MULTILINE)) <= set(targets)


def test_every_mesh_the_readme_names_resolves() -> None:
    names = re.findall(r"--mesh=([\w-]+)", README)
    assert "v5e-64" in names
    assert {name: resolve(MeshConfig(name=name)).chips for name in names if name.startswith("v5e")}["v5e-64"] == 64


def rooms() -> dict[str, set[str]]:
    """Each room of the first table in docs/structure.md, and what it says the room imports."""
    rows = re.findall(r"^\| \[`forgejax/(\w+)/`\].*\| ([^|]+) \|$", STRUCTURE, re.MULTILINE)
    words = {name: imports.replace("`", "") for name, imports in rows}
    return {name: set() if imports == "nothing" else set(imports.split(", ")) for name, imports in words.items()}


def folders() -> dict[str, set[str]]:
    """Each folder of the second table, and what of its own room it imports; "" stands for what lies loose there."""
    rows = re.findall(r"^\| `(\w+/\w+)` .*\| ([^|]+) \|$", STRUCTURE, re.MULTILINE)
    names = {name: set() if imports == "nothing" else set(imports.split(", ")) for name, imports in rows}
    return {name: {"" if each == "what lies loose" else each for each in imports} for name, imports in names.items()}


def test_the_structure_page_names_exactly_the_rooms_folders_and_loose_files_that_exist() -> None:
    package = ROOT / "forgejax"
    assert set(rooms()) == {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(folders()) == {path.parent.relative_to(package).as_posix() for path in package.glob("*/*/__init__.py")}
    loose = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert loose == {"errors.py", "imports.py", "plain.py"} and all(f"`{name}`" in STRUCTURE for name in loose)
    run = {path.stem for path in (package / "run").glob("*.py")} - {"__init__"}
    told = STRUCTURE[STRUCTURE.index("`run` has no folders") : STRUCTURE.index("`scripts/train.py` is the entrance")]
    assert set(re.findall(r"`(\w+)`", told)) == run | {"run"}


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_imports_only_what_the_structure_page_allows(room: str) -> None:
    found = {
        module.split(".")[1]
        for path in (ROOT / "forgejax" / room).rglob("*.py")
        for module in imported(path)
        if module.startswith("forgejax.")
    }
    assert found <= rooms()[room] | {room, "errors"}


@pytest.mark.parametrize("folder", sorted(folders()))
def test_a_folder_imports_of_its_room_only_what_the_structure_page_allows(folder: str) -> None:
    room, name = folder.split("/")
    parts = {path.parent.name for path in (ROOT / "forgejax" / room).glob("*/__init__.py")}
    found = set()
    for path in (ROOT / "forgejax" / folder).rglob("*.py"):
        inside = [module.split(".") for module in imported(path) if module.startswith(f"forgejax.{room}.")]
        found |= {module[2] if module[2] in parts else "" for module in inside}
    assert found <= folders()[folder] | {name}


def test_the_rooms_form_no_circle() -> None:
    arrows = {(room, other) for room, imports in rooms().items() for other in imports}
    above = dict.fromkeys({name for arrow in arrows for name in arrow}, 0)
    for _ in range(len(above)):
        for room, other in arrows:
            above[other] = max(above[other], above[room] + 1)
    assert max(above.values()) < len(above)


@pytest.mark.parametrize("room", ["agents", "chat", "environments", "gateway", "grammar", "pool", "report"])
def test_the_rooms_beside_the_engines_never_import_jax(room: str) -> None:
    modules = [module for path in (ROOT / "forgejax" / room).rglob("*.py") for module in imported(path)]
    assert [module for module in modules if module.split(".")[0] in ("jax", "jaxlib", "flax", "optax")] == []


def test_no_folder_is_fuller_than_a_reader_can_take_in_and_no_function_longer_than_a_screen() -> None:
    counts: dict[Path, int] = {}
    long = []
    for path in (ROOT / "forgejax").rglob("*.py"):
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                long += [f"{path.name}:{node.name}"] if node.end_lineno - node.lineno >= 60 else []
    assert {folder.name: count for folder, count in counts.items() if count > 14} == {}
    assert long == []


def imported(path: Path) -> list[str]:
    """Every module that the file imports, at any level of it."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.append(node.module)
    return modules


def test_the_pins_satisfy_every_declared_dependency_and_hold_no_address() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = declared["project"]
    wanted = [
        Requirement(each)
        for each in (
            *project["dependencies"],
            *project["optional-dependencies"]["dev"],
            *declared["build-system"]["requires"],
        )
    ]
    assert [str(each) for each in wanted if each.name.lower() not in pins] == []
    assert [str(each) for each in wanted if not each.specifier.contains(pins[each.name.lower()])] == []
    assert {"tensorflow", "seqio"}.isdisjoint(pins)
    assert "://" not in text
