"""Which files go along with a checkpoint, by name and size alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.checkpoint import companions, kinds
from reshard.checkpoint.companions import Item, Left, choose, walk
from reshard.checkpoint.left_behind import left_text
from reshard.checkpoint.source import MANIFEST_NAME
from reshard.errors import UsageError
from reshard.resharded.layout import UNUSED_NAME, rank_file_name
from reshard.resharded.manifest import REFERENCE_NAME

TAKEN = {
    "templates": "chat_template.jinja additional_chat_templates/tool_use.jinja additional_chat_templates/rag.jinja",
    "tokenizers": "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokens.txt",
    "their words": "vocab.json vocab.txt merges.txt vocab-src.json entity_vocab.json dict.txt vocab.bpe emoji.json",
    "sentencepiece": "tokenizer.model spiece.model source.spm target.spm sentencepiece.bpe.model tokenizer.model.v3",
    "others": "bpe.codes tekken.json qwen.tiktoken prophetnet.tokenizer token_types.json word_pronunciation.json",
    "processors": "preprocessor_config.json processor_config.json video_preprocessor_config.json chat_template.json",
    "configurations": "config.json generation_config.json modules.json 1_Pooling/config.json params.json",
    "licences": "LICENSE LICENCE.txt License-model.md COPYING NOTICE.txt USE_POLICY.md licenses/LICENSE Gemma_LICENSE",
    "more licences": "THIRD_PARTY_NOTICES.txt third_party/LICENSE COPYRIGHT NOTICE LICENSE.pdf qwen-license.txt",
    "folders": "tokenizer/tokenizer.json tokenizer/vocab.txt processor/preprocessor_config.json a/b/c/d/config.json",
}
NEVER = {
    "hidden": ".env .netrc .npmrc .hidden.json .aws/config.json .ssh/LICENSE additional_chat_templates/.x.jinja",
    "key": "server.pem private.key id_rsa id_ed25519.pub token token.json hf_token.txt credentials.json a/client.p12",
    "key too": "client_secret.json my-service-account.json passwords.txt api_key.txt prod.env .netrc _netrc env.json",
    "keys by other names": "huggingface_token.txt hub_token openai_key.txt keys.json cookies.txt auth.json kaggle.json",
    "logins": "accounts.json sftp-config.json ssh_config.json pw.txt login.json bash_history.txt a/key.txt",
    "code": "modeling_x.py tokenization_x.py setup.sh lib.so analysis.ipynb run.js a/b.py __pycache__/x.json Makefile",
    "pickle": "vocab.pkl vocab.pickle stats.npy mel_filters.npz model.joblib",
    "archive": "tokenizer.zip tokenizer.json.gz assets.tar",
    "training": "trainer_state.json training_args.json training_args.yaml train_results.json all_results.json",
    "training too": "events.out.tfevents.1.host wandb/run/files/config.json runs/config.json logs/config.json x.log",
    "and its state": "args.json log.txt train_log.txt optimizer.json rng_state_0.json checkpoint-500/config.json",
    "weights": "pytorch_model.bin consolidated.00.pth tf_model.h5 x.gguf model.fp16.safetensors flax_model.msgpack",
    "their index": "pytorch_model.bin.index.json model.safetensors.index.fp16.json",
    "adapter": "adapter_config.json adapter_model.safetensors",
    "ours": f"{MANIFEST_NAME} {UNUSED_NAME} {REFERENCE_NAME} {rank_file_name(0)} README.md readme.MD Reshard.JSON",
    "deep": "a/b/c/d/e/config.json",
    "odd": "tokenizer\n.json tokenizer\u202e.json voc\\ab.json ../LICENSE /LICENSE a//LICENSE tok\u2028.json",
}
UNKNOWN = (
    "notes.pdf assets/voice.wav config.yaml docs/a.md README_zh.md data/train.jsonl eval/predictions.json x/notes.txt"
)


def items(*paths: str) -> list[Item]:
    return [Item(path, 1) for path in paths]


@pytest.mark.fault(37)
@pytest.mark.parametrize("kind", TAKEN)
def test_known_kinds_go_along(kind: str) -> None:
    paths = TAKEN[kind].split()
    assert choose(items(*paths)) == (tuple(sorted(paths)), ())


@pytest.mark.fault(37)
@pytest.mark.parametrize("kind", NEVER)
@pytest.mark.parametrize("include", [(), ("*",)], ids=["", "included"])
def test_what_never_does(kind: str, include: tuple[str, ...]) -> None:
    for path in NEVER[kind].split(" "):
        taken, left = choose(items(path, "config.json"), include=include)
        assert taken == ("config.json",), path
        assert [path.startswith(entry.path) for entry in left] == [True], path


@pytest.mark.parametrize("path", UNKNOWN.split())
def test_unknown_kinds_are_for_the_user_to_take(path: str) -> None:
    taken, left = choose(items(path))
    assert (taken, left) == ((), (Left(path, companions.UNKNOWN),))
    for pattern in (path, "*", "*." + path.rpartition(".")[2], path.rpartition("/")[0] + "/"):
        if pattern != "/":
            assert choose(items(path), include=[pattern]) == ((path,), ())


def test_every_file_that_a_tokenizer_of_transformers_reads() -> None:
    """Each tokenizer class names its files."""
    import transformers

    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                names |= set(ast.literal_eval(node.value).values())
    assert {"source.spm", "bpe.codes", "tokenizer.json"} <= names
    assert choose(items(*names)) == (tuple(sorted(names)), ())


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"--include \*\.yml: matches no file"):
        choose(items("config.json", "a.yaml"), include=["*.yaml", "*.yml"])


@pytest.mark.parametrize("held", ["model.safetensors", "reshard.json", "pytorch_model.bin", rank_file_name(0)])
def test_a_folder_of_another_model_stays_whole(held: str) -> None:
    """The files in its subfolders stay too, but not the files beside it."""
    found = items("tp4/config.json", f"tp4/{held}", "tp4/more/tokenizer.json", "config.json", "tokenizer/vocab.txt")
    taken, left = choose(found, include=["*"])
    assert taken == ("config.json", "tokenizer/vocab.txt")
    assert left == (Left("tp4/", kinds.PARTS.what),)


def test_a_folder_of_the_source_s_own_weights_is_no_other_model() -> None:
    found = items("config.json", "weights/model-1.safetensors", "weights/LICENSE")
    assert choose(found, read=["weights/model-1.safetensors"]) == (("config.json", "weights/LICENSE"), ())


def test_names_that_differ_only_by_case() -> None:
    """On a disk that ignores case, one would replace the other, so the lower-case one is taken."""
    taken, left = choose(items("Config.json", "config.json", "LICENSE", "license", "Tok/vocab.txt", "tok/merges.txt"))
    assert taken == ("config.json", "license", "tok/merges.txt")
    assert [entry.path for entry in left] == ["Config.json", "LICENSE", "Tok/vocab.txt"]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Item("vocab.json", companions.FILE_LIMIT + 1)
    assert choose([huge, Item("vocab.txt", companions.FILE_LIMIT)])[0] == ("vocab.txt",)
    half = companions.TOTAL_LIMIT // 8
    taken, left = choose([Item(f"{number}.json", half) for number in range(9)])
    assert len(taken) == 8
    assert "together" in left[0].why
    monkeypatch.setattr(companions, "MOST_FILES", 3)
    taken, left = choose(items(*(f"{number}.json" for number in range(5))))
    assert (len(taken), len(left)) == (3, 2)


def test_nothing_is_said_of_what_is_in_every_download() -> None:
    found = items(".gitattributes", ".git/config", ".cache/huggingface/x", ".DS_Store", "out.lock", "model.safetensors")
    own = items("tp4.part-0123456789abcdef-01234567/config.json", "tp4.part-fetched-x/model.safetensors")
    assert choose([*found, *own], read=["model.safetensors"]) == ((), ())


def test_names_that_are_no_text_are_names_all_the_same() -> None:
    assert choose(items("\udcff.txt", "家.json"))[0] == ("家.json", "\udcff.txt")


def test_what_the_place_says_of_a_file_counts() -> None:
    assert choose([Item("LICENSE", odd="a device")], include=["*"]) == ((), (Left("LICENSE", "a device"),))


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"\x80\x04\x95", "pickled"),
        (b"PK\x03\x04", "an archive"),
        (b"#!/bin/sh", "code"),
        (b"-----BEGIN OPENSSH PRIVATE KEY", "may be a key or a password"),
        (b"version https://git-lfs.github.com/spec/v1", "only a pointer of git-lfs: git lfs pull fetches it"),
        (b"#version: 0.2\n", ""),
        (b'{"a": 1}', ""),
        (b"\n\x0e\n\x05<unk>", ""),
        (b"", ""),
    ],
)
def test_first_bytes(head: bytes, why: str) -> None:
    assert kinds.known_by_content(head) == why


# The keys are made here, so that nobody who looks for keys finds one in this file.
_SECRETS = {
    "Hub": "note: hf_" + "aB" * 17,
    "GitHub": "ghp_" + "a1" * 18,
    "AWS": '{"id": "AKIA' + "B2" * 8 + '"}',
    "a chat service": "url with xoxb-" + "12" * 12,
    "an API": "export KEY=sk-proj-" + "a1" * 20,
    "a certificate in JSON": '{"pk": "-----BEGIN PRIVATE' + " KEY-----\\nMIIEvQIBADANBgkqhkiG9w0B" + '"}',
    "a field": '{"user": "me", "db_password" : "x"}',
    "another": '{"apiKey":"x"}',
}
_HARMLESS = {
    "a vocabulary": '{"password": 5, "secret": 6, "hf_": 7, "sk-": 8, "-----BEGIN": 9, " PRIVATE KEY-----": 10}',
    "merges": "pass word\nsec ret\nA KIA\n",
    "a template": json.dumps({"chat_template": '{{ {"password": "x"} }} -----BEGIN PRIVATE KEY----- ...'}),
    "fields": '{"use_auth_token": true, "pad_token": "<pad>", "secret": "", "api_key": null}',
}


@pytest.mark.fault(37)
@pytest.mark.parametrize("of", _SECRETS)
def test_a_key_inside_a_text(of: str) -> None:
    assert kinds.known_by_content(b"\n" * 3000 + _SECRETS[of].encode()) == "may be a key or a password"


@pytest.mark.parametrize("of", _HARMLESS)
def test_the_words_alone_are_no_key(of: str) -> None:
    assert kinds.known_by_content(_HARMLESS[of].encode()) == ""


STEPS = st.text(st.sampled_from("aA.b/\\ \n-_*é"), min_size=1, max_size=6)
ENDS = st.sampled_from(["", ".json", ".txt", ".jinja", ".py", ".pkl", ".safetensors", "LICENSE", ".PEM"])
PATHS = st.lists(st.builds(lambda step, end: step + end, STEPS, ENDS), min_size=1, max_size=12, unique=True)


@given(PATHS, st.sampled_from([(), ("*",)]))
def test_whatever_the_names_are(paths: list[str], include: tuple[str, ...]) -> None:
    """Every file is taken, left, or of no checkpoint; the names that are taken are safe below a folder on any disk."""
    taken, left = choose(items(*paths), include=include)
    assert len({path.casefold() for path in taken}) == len(taken)
    behind = [entry.path for entry in left]
    for path in paths:
        told = any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in behind)
        silent = any(step.lower() in kinds.SILENT for step in path.split("/"))
        assert (path in taken) != told or silent, path
    for path in taken:
        assert path in paths
        assert not Path(path).is_absolute()
        assert all(step.strip() and not step.startswith(".") and "\n" not in step for step in path.split("/"))
        assert "\\" not in path
        assert not path.lower().endswith((".py", ".pkl", ".safetensors", ".pem"))


def test_walk_enters_no_folder_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk does not enter folders of another model, and enters none once it has listed many files."""
    tree = {
        "": (["config.json"], ["tok", "wandb", ".git", "tp4"]),
        "tok/": (["vocab.txt"], ["inner"]),
        "tok/inner/": (["vocab.txt"], []),
        "tp4/": (["reshard.json", "config.json"], ["additional_chat_templates"]),
    }
    asked = []

    def look(folder: str) -> tuple[list[Item], list[str]]:
        asked.append(folder)
        files, folders = tree[folder]
        return items(*(folder + name for name in files)), folders

    taken, left = choose(walk(look))
    assert asked == ["", "tok/", "tp4/", "tok/inner/"]
    assert taken == ("config.json", "tok/inner/vocab.txt", "tok/vocab.txt")
    assert [entry.path for entry in left] == ["tp4/", "wandb/"]
    monkeypatch.setattr(companions, "_MOST_LISTED", 2)
    taken, left = choose(walk(look))
    assert taken == ("config.json", "tok/vocab.txt")
    assert ("tok/inner/", True) in [(entry.path, "not looked at" in entry.why) for entry in left]


def test_one_line() -> None:
    left = [
        Left("assets/a.png", companions.UNKNOWN),
        Left("assets/b.png", companions.UNKNOWN),
        Left("modeling_x.py", "code", ("config.json",)),
        Left("tok/x.pdf", companions.UNKNOWN),
        *(Left(f"{number}.py", "code") for number in range(9)),
    ]
    assert left_text(["config.json", "tok/vocab.txt"], left) == (
        "left behind: assets/, tok/x.pdf (of no known kind: --include PATTERN takes it along),"
        " modeling_x.py, 0.py, 1.py and 7 more (code); config.json names modeling_x.py, which OUT lacks"
    )
