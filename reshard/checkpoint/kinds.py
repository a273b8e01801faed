"""Kinds of files beside the weights, by name and first bytes: which go along with a checkpoint, and which never do.

A file that goes along may be published later. So only known kinds go along, and a file that can be code, a secret or a
record of somebody's work never does, not even if the user asks for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = [
    "CARD",
    "KNOWN",
    "KNOWN_AT_TOP",
    "NEVER",
    "OURS",
    "PARTS",
    "SILENT",
    "WEIGHTS",
    "Kind",
    "is_licence",
    "is_weights",
    "known_by_content",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of files or folders: `what` they are, and the shell patterns of their names, all in lower case."""

    what: str
    names: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.names)


_A_WEIGHT = "weights that are not read"
_A_KEY = "may be a key or a password"
WEIGHTS = Kind(
    _A_WEIGHT,
    (
        *("*.safetensors", "*.index.json", "*.index.*.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml"),
        *("*.h5", "*.hdf5", "*.msgpack", "*.onnx", "*.onnx_data*", "*.tflite", "*.pb", "*.distcp", "*.ot", "*.t7"),
        *("*.mlmodel", "*.caffemodel", "*.engine", "*.trt", "*.nemo", "*.keras", "*.pt2", "*.llamafile"),
    ),
)
LICENCES = Kind(
    "licence",
    (
        *("licen[cs]e*", "*[-_ ]licen[cs]e", "*[-_ ]licen[cs]e[-_. ]*", "unlicense*", "copying*", "copyright*"),
        *("notice*", "third[-_ ]party*", "use_policy*", "*usage_policy*", "*use[-_]policy*", "patents*", "authors*"),
        *("eula*", "terms*", "citation*", "attribution*", "acknowledg*"),
    ),
)

# Never copied; the first kind that matches says why. Patterns match files and folders at any depth.
NEVER = (
    Kind("hidden", (".*",)),
    Kind(
        _A_KEY,
        (
            *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.gpg", "*.kdbx", "*.crt", "*.cer"),
            *("*.der", "*.csr", "*.ovpn", "*.env", "env", "env.*", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
            *("*netrc", "*npmrc", "*pypirc", "*htpasswd*", "authorized_keys*", "known_hosts*", "kubeconfig*"),
            *("*secret*", "*credential*", "*passw*", "*api[-_]key*", "*apikey*", "*private[-_]key*", "*access[-_]key*"),
            *("*service[-_]account*", "*oauth*", "token", "token.*", "*.token", "stored_tokens*"),
            *("*hf[-_]token*", "*access[-_]token*", "*auth[-_]token*", "*api[-_]token*", "*refresh[-_]token*"),
            *(
                "*token.txt",
                "*[-_]token",
                "key.*",
                "keys.*",
                "*[-_]key.*",
                "*[-_]keys.*",
                "auth.*",
                "*cookie*",
                "login*",
            ),
            *("accounts.*", "kaggle.json", "sftp*", "ssh[-_]*", "pw.*", "pwd.*", "vault*", "rclone*", "*[-_]history*"),
        ),
    ),
    Kind(
        "code",
        (
            *("*.py", "*.pyc", "*.pyd", "*.pyi", "*.pyx", "*.ipynb", "*.so", "*.so.*", "*.dll", "*.dylib", "*.exe"),
            *("*.a", "*.o", "*.sh", "*.bash", "*.zsh", "*.bat", "*.cmd", "*.ps1", "*.js", "*.mjs", "*.ts", "*.wasm"),
            *("*.c", "*.cc", "*.cpp", "*.cu", "*.cuh", "*.h", "*.hpp", "*.go", "*.rs", "*.rb", "*.pl", "*.lua", "*.r"),
            *("*.jl", "*.java", "*.class", "*.jar", "*.m", "*.swift", "*.php", "*.sql", "makefile", "dockerfile*"),
            *("__pycache__", "node_modules", "*.egg-info"),
        ),
    ),
    Kind("pickled", ("*.pkl", "*.pickle", "*.joblib", "*.dill", "*.sav", "*.cloudpickle", "*.mar", "*.npy", "*.npz")),
    Kind(
        "an archive",
        ("*.zip", "*.tar", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.zst", "*.7z", "*.rar", "*.whl", "*.lz4", "*.dmg"),
    ),
    Kind(
        "a record of training",
        (
            *("trainer_*", "training_*", "train_*", "args.json", "*_args.json", "hyperparameters*", "optimizer*"),
            *("optim.*", "scheduler.*", "rng_state*", "*_results.json", "results.json", "metrics*.json"),
            *("*history*.json", "events.out.*", "*tfevents*", "*.log", "*.log.*", "*[-_]log.*", "log.*", "logs.*"),
            *("log_*", "nohup*", "slurm*", "*.out", "*.err", "wandb*", "mlruns*", "mlflow*", "tensorboard*", "neptune"),
            *("runs", "logs", "log", "*_logs", "checkpoint-*", "global_step*", "mp_rank_*", "state.json"),
        ),
    ),
    Kind("an adapter: the base model alone is taken", ("adapter_*",)),
)
OURS = Kind(
    "a name that reshard gives itself",
    ("reshard.json", "shard-*-model-*", "unused.safetensors", "reference.logits"),
)
CARD = Kind("the card: publish writes one of its own", ("readme.md",))
# Files of every clone or download, and our own beside an OUT that is being made.
SILENT = Kind(
    "of no checkpoint, so that nothing is said of it",
    (
        *(".git", ".gitattributes", ".gitignore", ".gitmodules", ".cache", ".huggingface", ".ds_store"),
        *("*.lock", "*.part-fetched-*", f"*.part-{'?' * 16}-{'?' * 8}"),
    ),
)
# If a folder holds a file of this kind, nothing in it goes along.
PARTS = Kind("another part of a model, or another model", ("reshard.json", "shard-*-model-*", *WEIGHTS.names))

# Kinds that go along. At the top, tokenizers and processors have files of every name in JSON and text.
KNOWN = (
    LICENCES,
    Kind("chat template", ("*.jinja", "*.jinja2", "*.j2")),
    Kind(
        "tokenizer",
        (
            *("*.model", "*.model.v*", "*.spm", "*.spiece", "*.tiktoken", "*.tokenizer", "*.bpe", "*.codes", "*.vocab"),
            *("vocab.txt", "vocab*.json", "*_vocab.json", "*_vocab.txt", "merges*.txt", "dict.txt", "tekken.json"),
            *("*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
        ),
    ),
    Kind(
        "configuration",
        (
            *("config.json", "*_config.json", "config_*.json", "modules.json", "model_index.json"),
            *("chat_template*.json", "*processor*.json"),
        ),
    ),
)
KNOWN_AT_TOP = Kind("configuration or text", ("*.json", "*.txt"))

# Kinds told by the first bytes, whatever the name says.
_SIGNS = (
    *((sign, "pickled") for sign in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x93NUMPY")),
    *((sign, "an archive") for sign in (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")),
    *((sign, _A_WEIGHT) for sign in (b"\x89HDF", b"GGUF")),
    *((sign, "code") for sign in (b"\x7fELF", b"#!/")),
    (b"-----BEGIN ", _A_KEY),
    (b"version https://git-lfs", "only a pointer of git-lfs: git lfs pull fetches it"),
)
# Keys inside a text, in the form that their issuers give them: how each begins, and the whole of it.
_KEYS = (
    (b"PRIVATE KEY-----", rb"PRIVATE KEY-----(?:\\[nr]|\s)+[\w+/-]{16}"),
    (b"hf_", rb"\bhf_[A-Za-z]{34}\b"),
    (b"gh", rb"\bgh[opsur]_\w{36}"),
    (b"github_pat_", rb"\bgithub_pat_\w{60}"),
    (b"glpat-", rb"\bglpat-[\w-]{20}"),
    (b"AKIA", rb"\bAKIA[0-9A-Z]{16}\b"),
    (b"AIza", rb"\bAIza[\w-]{35}"),
    (b"xox", rb"\bxox[abeoprs]-[\w-]{20}"),
    (b"sk-", rb"\bsk-(?:ant-|proj-)?\w{32}"),
)
# A key is also the text of a JSON field with one of these in its name, in lower case. In a vocabulary these words have
# numbers.
_FIELDS = (
    *(b"password", b"passwd", b"passphrase", b"secret", b"apikey", b"privatekey", b"accesskey", b"accesstoken"),
    *(b"api_key", b"private_key", b"access_key", b"access_token", b"auth_token", b"hub_token", b"hf_token", b"api-key"),
)
_VALUE = rb'[\w-]{0,32}"\s*:\s*"[^"]'


def is_licence(path: str) -> bool:
    """Whether a file states the terms under which the model may be used."""
    return path.rpartition("/")[2].lower() in LICENCES


def is_weights(path: str) -> bool:
    """Whether a file holds weights of any format, or says where they are."""
    return path.rpartition("/")[2].lower() in WEIGHTS


def known_by_content(content: bytes) -> str:
    """Say why a file that begins with `content` is not copied; empty if it is. The longer `content` is, the surer."""
    why = next((what for sign, what in _SIGNS if content.startswith(sign)), "")
    return why or (_A_KEY if _holds_key(content) else "")


def _holds_key(text: bytes) -> bool:
    # Looking for a plain word first is a hundred times as fast as one expression for all.
    if any(start in text and re.search(whole, text) for start, whole in _KEYS):
        return True
    lower = text.lower()
    return any(word in lower and re.search(word + _VALUE, lower) for word in _FIELDS)
