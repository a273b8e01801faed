"""The model class and its parameters, from `config.json` and the installed transformers. No weights, no repo code."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import BadInputError, VersionError
from ..files.system import by_errno
from ..text import listed, printable
from .quantization import without_quantization
from .source import model_config

__all__ = [
    "KV_GROUPS",
    "class_note",
    "decoding_as_told",
    "expected_dtypes",
    "meta_model",
    "model_class",
    "on_meta",
    "quiet_transformers",
]

KV_GROUPS = "num_key_value_groups"  # an attention module's number of query heads for each KV head
_TASKS = ("CausalLM", "Seq2SeqLM", "ImageTextToText")  # `AutoModelFor…`, asked in turn if the config names no class


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' advice and bars: our own errors and plan say what matters."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # it logs errors that it raises too
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def decoding_as_told(model: Any) -> Iterator[None]:
    """Surround `model.generate`, where transformers first looks at most values of a generation_config.json.

    Raises BadInputError, naming the file, if transformers' code for decoding fails on a value.
    """
    try:
        yield
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not frames[-1].startswith("transformers.generation."):
            raise
        raise BadInputError(
            f"{printable(Path(model.name_or_path) / 'generation_config.json')}: transformers cannot decode as it says:"
            f" {printable(str(error).partition(chr(10))[0])}",
            hint="mend the value that it means, or remove it from the file",
        ) from error


def meta_model(root: Path, *, dtype: str, attn_implementation: str | None = None) -> Any:
    """Build the model of the checkpoint in `root` on the meta device: shapes and names, no memory.

    `dtype` is a torch name. Only classes of the installed transformers are used, whatever the config's `auto_map` says.

    Raises:
        BadInputError: the configuration is not usable.
        VersionError: the installed transformers does not know the model.
    """
    return on_meta(*model_class(root), dtype=dtype, attn_implementation=attn_implementation)


def model_class(root: Path) -> tuple[type, Any]:
    """Return the class of the model of the checkpoint in `root`, its module imported, and its configuration, as if it
    were not quantized.

    Raises what `meta_model` does.
    """
    import transformers

    named = model_config(root).get("model_type")
    model_type = printable(named)
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(root, trust_remote_code=False)
    except Exception as error:
        unknown = named is not None and model_type not in transformers.CONFIG_MAPPING
        if isinstance(error, (ValueError, KeyError)) and unknown:
            words = f"{printable(root)}: transformers {transformers.__version__} does not know model type {model_type}"
            raise by_errno(error, words, VersionError, hint="another release of transformers may know it") from None
        words = f"{printable(root / 'config.json')}: not usable: {printable(error)}"
        raise by_errno(error, words, BadInputError) from None
    return _model_class(transformers, without_quantization(config))


def on_meta(model_class: Any, config: Any, *, dtype: str, attn_implementation: str | None = None) -> Any:
    """Build a model of a class and its configuration on the meta device. Raises BadInputError if that fails."""
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.device("meta"), _NothingDrawn():
            warnings.simplefilter("ignore")
            return model_class._from_config(config, dtype=getattr(torch, dtype))
    except Exception as error:
        words = f"{model_class.__name__} cannot be built from its config.json: {printable(error)}"
        raise by_errno(error, f"{printable(config.name_or_path)}: {words}", BadInputError) from None


class _NothingDrawn(TorchFunctionMode):
    """No random numbers for tensors without memory: torch's initializers leave their tensor as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _model_class(transformers: Any, config: Any) -> tuple[type, Any]:
    """Return the class that `architectures` names if it is for this configuration; else the class of `AutoModelFor…`.
    The configuration is the one that the class takes."""
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInputError("config.json: architectures is not a list of names")
    for found in (getattr(transformers, name, None) for name in names if name.isidentifier()):
        if found is not None and _is_model(transformers, found):
            own = _own_config(found, config)
            if own is not None:
                return found, own
    tasks = [name.rpartition("For")[2] for name in names if "For" in name and name.isidentifier()]
    for task in dict.fromkeys((*tasks, *_TASKS)):
        for found in _of_type(getattr(transformers, f"AutoModelFor{task}", None), config):
            if _is_model(transformers, found):
                return found, _own_config(found, config) or config
    if names:
        raise VersionError(
            f"transformers {transformers.__version__} has no architecture {listed(names)} for model type"
            f" {printable(config.model_type)}",
            hint="name the class in the architectures of config.json, as transformers calls it",
        )
    raise BadInputError(f"config.json names no architecture, and {type(config).__name__} has no causal model")


def _is_model(transformers: Any, found: Any) -> bool:
    """Whether a class is a model: the placeholder of an optional backend that is missing is none, nor a base class."""
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return is_model and bool(getattr(found, "config_class", None))


def _of_type(auto: Any, config: Any) -> tuple[Any, ...]:
    """Return the classes that one of transformers' `AutoModelFor…` knows for a configuration, the usual one first."""
    try:
        found = auto._model_mapping[type(config)]
    except (AttributeError, KeyError):  # no such task, or this model type does not have it
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _own_config(found: Any, config: Any) -> Any:
    """Return the configuration that a class takes: `config`, or the part of its kind, such as the text model's in a
    model with images. None if neither is of its kind."""
    if isinstance(config, found.config_class):
        return config
    return next((getattr(config, key) for key, kind in config.sub_configs.items() if kind is found.config_class), None)


def class_note(taken: type, config: Mapping[str, Any]) -> str | None:
    """Say why a class is taken that the `architectures` of a config.json do not name; None if they do, or name none."""
    names = config.get("architectures") or []
    if not names or taken.__name__ in names:
        return None
    return (
        f"config.json names the architecture {listed(names)}, which transformers does not have for model type"
        f" {printable(config.get('model_type'))}: {taken.__name__} is taken, as by its auto classes"
    )


def expected_dtypes(model: Any, dtype: str) -> dict[str, torch.dtype]:
    """Return the dtype of every entry of the model's state dict after `from_pretrained(dtype=…)`.

    The rule is transformers' own (`convert_and_load_state_dict_in_model`): the meta model's dtype, but fp32 for the
    entries that `_get_dtype_plan` keeps in fp32.
    """
    from transformers.core_model_loading import build_glob_alternation

    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(getattr(torch, dtype))
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        for name in wanted:
            match = pattern.search(name)
            if match is not None:
                wanted[name] = plan[by_group[match.lastgroup]]
    return wanted
