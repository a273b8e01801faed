"""Who reads a module's weight: its own forward alone, or code around it too. Found in the source of the model's
classes.

A weight that only its module's own forward reads can be cut there and the output put together again: nothing else
notices. So each expression `….weight` in the classes of a model counts, but for those that ask about its dtype or
device, and those in code that does not run in inference: constructors, initialisation, branches for training.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["leaf_forward", "read_elsewhere"]

_READ = {"weight", "bias", "forward"}  # `forward` called by name passes the functions around a module by
_HARMLESS = {
    *("dtype", "device", "_is_hf_initialized", "requires_grad", "is_floating_point"),
    *("div_", "mul_"),  # by a number (rwkv): each rank scales its own part
    *("SCB", "quant_state"),  # of bitsandbytes' own parameters, which the ranks do not have
}
_NOT_IN_INFERENCE = (
    *("__init__", "post_init", "_init_", "init_", "tie_", "_tie_", "resize_", "_resize_", "set_", "reset_"),
    *("_reset_", "load_", "_load_", "apply_weight_norm", "remove_weight_norm", "get_input_embeddings"),
    *("get_output_embeddings", "convert_", "from_pretrained", "save_pretrained", "_get_resized_", "freeze_"),
    *("prune_", "replace_batch_norm", "_make_linear_from_emb", "_bnb_"),
)
# A variable whose weight is read → the names of the modules that it may be, where the code around does not say.
_VARIABLES = {
    "bias": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),  # layoutlmv3
    "new_bias": ("relative_attention_bias",),  # udop
    "query_embedder": ("queries_embedder",),  # oneformer
}
_Read = tuple[tuple[str, ...], frozenset[str]]  # the path of a module, and the flags that must be set for it to be read
# Classes of linear layers that write the product themselves.
_LINEAR = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def read_elsewhere(model: nn.Module) -> set[str]:
    """Return the names of the modules whose parameters are read by other code than their own forward.

    A class whose source cannot be read counts as one that reads the parameters of all modules inside it, and so does
    any class of torch's that is made of modules, such as `nn.MultiheadAttention`.
    """
    found: set[str] = set()
    by_last: dict[str, list[str]] = {}
    instances: dict[type, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
        instances.setdefault(type(module), []).append(name)
    for kind, names in instances.items():
        reads = _reads_of(kind)
        if reads is None:
            found |= {inner for name in names for inner in _inside(model, name)}
            continue
        for path, flags in reads:
            holders = [name for name in names if _are_set(model.get_submodule(name), flags)]
            if not holders:
                continue
            if path[0] != "self":
                found |= _called(path[-1], model, by_last) if path[-1] != "cls" else set()
            elif path[-1] == "*":
                found |= {inner for name in holders for inner in _children(model, name, path[1:-1])}
            else:
                found |= {".".join(filter(None, (name, *path[1:]))) for name in holders}
    return found


def _are_set(module: nn.Module, flags: frozenset[str]) -> bool:
    """Whether flags of a module are set, as far as they are known before it runs. It does not train."""
    return "training" not in flags and not any(getattr(module, flag, True) is False for flag in flags)


def _children(model: nn.Module, name: str, path: tuple[str, ...]) -> Iterator[str]:
    holder = ".".join(filter(None, (name, *path)))
    try:
        found = model.get_submodule(holder)
    except AttributeError:
        return
    yield from (f"{holder}.{own}" for own, _ in found.named_children())


def _called(variable: str, model: nn.Module, by_last: dict[str, list[str]]) -> set[str]:
    """Return the modules that a variable may stand for: those of its name; else all embeddings if it is called one;
    else all modules."""
    found = {name for last in (variable, *_VARIABLES.get(variable, ())) for name in by_last.get(last, ())}
    if found:
        return found
    kind = nn.Embedding if "embedding" in variable else nn.Module
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)}


def leaf_forward(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Say what the forward of a module of the kind `base` does: "plain" if it is that of `base`; "same" if it gives its
    argument to that as it is and does no more than scale the result; "other" if it makes the argument itself. None if
    it is anything else, or if the module's weight is not a parameter of its own."""
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if "weight" not in own or own - {"weight", "bias"} or module._forward_pre_hooks or module._forward_hooks:
        return None
    found: Any = type(module).forward
    if found is base.forward or (type(module).__module__, type(module).__name__) in _LINEAR:
        return "plain"
    return _around(found)


@lru_cache(maxsize=4096)
def _around(forward: Any) -> str | None:
    """As `leaf_forward`, of a forward that is not torch's: what it returns is `super().forward(…)`, perhaps scaled."""
    function = _parsed(forward)
    if not isinstance(function, ast.FunctionDef):
        return None
    if any(True for _ in _own_reads(function)):
        return None
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    calls = [_scaled_call(value) for value in returned]
    if not calls or not all(calls):
        return None
    statements = [node for node in function.body if not _is_docstring(node)]
    first = function.args.args[1].arg if len(function.args.args) > 1 else None
    given = calls[0].args if calls[0] else []
    same = len(statements) == 1 and len(given) == 1 and isinstance(given[0], ast.Name) and given[0].id == first
    return "same" if same else "other"


def _own_reads(function: ast.FunctionDef) -> Iterator[str]:
    """Yield what a forward reads of its own module's weight and sizes, but for dtypes and devices."""
    asked = {
        id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    }
    own = {"weight", "bias", "embedding_dim", "out_features"}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in own and id(node) not in asked:
            yield node.attr


def _scaled_call(value: ast.expr | None) -> ast.Call | None:
    """Return the call of `super().forward` that is all of an expression, but for a factor that is an attribute."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
        sides = (value.left, value.right)
        factors = [side for side in sides if ast.unparse(side).startswith("self.")]
        value = next((side for side in sides if side not in factors), None) if len(factors) == 1 else None
    is_call = isinstance(value, ast.Call) and ast.unparse(value.func) == "super().forward"
    return value if is_call and isinstance(value, ast.Call) else None


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _inside(model: nn.Module, name: str) -> Iterator[str]:
    for inner, _ in model.get_submodule(name).named_modules(prefix=name, remove_duplicate=False):
        if inner != name:
            yield inner


@lru_cache(maxsize=4096)
def _reads_of(kind: type) -> frozenset[_Read] | None:
    """Return the paths of modules whose parameters a class reads, such as ("self", "dense"), or ("self", "layers", "*")
    for those in a list; a path that does not begin with "self" ends with the name of a module anywhere. None if nothing
    tells."""
    if kind.__module__.startswith("torch."):
        return frozenset() if issubclass(kind, _CONTAINERS) or not _has_modules(kind) else None
    found: set[_Read] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "transformers.modeling_utils", "transformers.generation")):
            continue
        if base is object or base.__module__ in ("builtins", "typing", "abc"):
            continue
        if base.__module__.startswith("transformers.") and not issubclass(base, nn.Module):
            continue  # mixins of transformers: for saving, adapters and the like
        tree = _parsed(base)
        if tree is None:
            return None
        found |= set(_reads(tree, _READ))
    home = sys.modules.get(kind.__module__)
    found |= _reads_of_functions(home) if home else set()
    return frozenset(found)


@lru_cache(maxsize=1024)
def _reads_of_functions(home: ModuleType) -> frozenset[_Read]:
    """Return what the functions of a Python module read, outside its classes."""
    functions = [node for name, node in _definitions(home).items() if "." not in name]
    return frozenset(read for node in functions if isinstance(node, ast.FunctionDef) for read in _reads(node, _READ))


def _has_modules(kind: type) -> bool:
    """Whether a class of torch's is made of modules."""
    return issubclass(kind, (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)) or (
        issubclass(kind, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    )


def _parsed(of: Any) -> ast.stmt | None:
    """Return the definition of a class or of a method; None if there is no source of it."""
    found = inspect.unwrap(of)
    home = sys.modules.get(found.__module__)
    return _definitions(home).get(found.__qualname__) if home else None


@lru_cache(maxsize=1024)
def _definitions(home: ModuleType) -> dict[str, ast.stmt]:
    """Return the classes, methods and functions of a Python module, by their qualified names."""
    try:
        tree = ast.parse(inspect.getsource(home))
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, ast.stmt] = {}

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.If, ast.Try)):  # defined if a package is there, or if it is not
                add([*node.body, *node.orelse], prefix)

    add(tree.body, "")
    return found


def _reads(tree: ast.AST, names: set[str]) -> Iterator[_Read]:
    """Yield the path of each module of which a parameter is read, in code that runs in inference."""
    yield from _walk(tree, names, {}, frozenset())


def _walk(node: ast.AST, names: set[str], known: dict[str, tuple[str, ...]], flags: frozenset[str]) -> Iterator[_Read]:
    if isinstance(node, ast.FunctionDef):
        if node.name.startswith(_NOT_IN_INFERENCE):
            return
        known = {**known, **_assigned(node)}
    if isinstance(node, ast.If):
        for step in node.body:
            yield from _walk(step, names, known, flags | _needed(node.test))
        for other in (node.test, *node.orelse):
            yield from _walk(other, names, known, flags)
        return
    inner = node.value if isinstance(node, ast.Attribute) and node.attr in _HARMLESS else None
    if isinstance(inner, ast.Attribute) and inner.attr in names:
        yield from _walk(inner.value, names, known, flags)
        return
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("isinstance", "hasattr"):
            return
        if node.func.id == "getattr" and isinstance(node.args[1], ast.Constant) and node.args[1].value in names:
            yield _path(node.args[0], known), flags
    if isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.ctx, ast.Load):
        path = _path(node.value, known)
        if path not in (("self",), ("super()",)) and not (node.attr == "forward" and path[-1][:1].isupper()):
            yield path, flags
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, names, known, flags)


def _needed(test: ast.expr) -> frozenset[str]:
    """Return the attributes of `self` that a condition wants to be true."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return frozenset().union(*map(_needed, test.values))
    is_own = isinstance(test, ast.Attribute) and isinstance(test.value, ast.Name) and test.value.id == "self"
    return frozenset({test.attr}) if is_own and isinstance(test, ast.Attribute) else frozenset()


def _assigned(function: ast.FunctionDef) -> dict[str, tuple[str, ...]]:
    """Return the paths of the local names that a function gives modules, by name."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(function):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = node.value if isinstance(node, ast.Assign) else getattr(node, "iter", None)
        if isinstance(target, ast.Name) and isinstance(value, (ast.Attribute, ast.Subscript)):
            path = _path(value, {})
            found[target.id] = path if isinstance(node, ast.Assign) else (*path, "*")
    return found


def _path(node: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names that lead to a module. What is no chain of names from `self` begins with "?"."""
    if isinstance(node, ast.Name):
        return known.get(node.id, ("self",) if node.id == "self" else ("?", node.id))
    if isinstance(node, ast.Attribute):
        base = _path(node.value, known)
        return (*base, node.attr) if base[0] == "self" and "*" not in base else ("?", node.attr)
    if isinstance(node, ast.Subscript):
        base = _path(node.value, known)
        return (*base, "*") if base[0] == "self" else ("?", base[-1])
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "super":
        return ("super()",)
    return ("?", "?")
