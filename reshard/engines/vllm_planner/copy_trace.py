"""The trace: every operation on tensors, and where it puts whose elements."""

from __future__ import annotations

from typing import Any


class Trace:
    """What is known of every storage: where its elements come from, in the order of the operations."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.kept: list[Any] = []  # storages that must not be freed, as their addresses are keys
        self.writes: list[list[Any]] = []

    def name(self, tensor: Any, called: str | None = None) -> str:
        """Return the name of a tensor's storage; it is a temporary one unless it is `called` otherwise."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.names or called:
            self.names[key] = called or f"t:{len(self.names)}"
            self.kept.append(storage)
        return self.names[key]

    def knows(self, tensor: Any) -> bool:
        return tensor.untyped_storage()._cdata in self.names

    def record(self, into: Any, what: list[Any]) -> None:
        if into.numel():
            self.writes.append([self.name(into), *described(into), *what])

    def leading_to(self, names: set[str]) -> list[list[Any]]:
        """Return the writes into storages of these names, and into all that these were copied from, in order."""
        found: list[list[Any]] = []
        for write in reversed(self.writes):
            if write[0] in names:
                found.append(write)
                if write[5] == "copy":
                    names.add(write[6])
        return found[::-1]

    def copied(self, into: Any, source: Any) -> None:
        source = source.expand(into.shape)
        dtype, _, offset, strides = described(source)
        self.record(into, ["copy", self.name(source), dtype, offset, strides])

    def constant(self, into: Any, value: Any) -> None:
        self.record(into, ["constant", value])

    def computed(self, into: Any, operation: str) -> None:
        """Record what an operation makes: on the host, where numbers are real, the number of a single element."""
        if into.device.type != "meta" and is_alone(into):
            self.constant(into, into.item())
        else:
            self.record(into, ["computed", operation])


def is_alone(tensor: Any) -> bool:
    """Whether a tensor is the one element of its storage."""
    return bool(tensor.untyped_storage().nbytes() == tensor.element_size())


def described(tensor: Any) -> tuple[str, list[int], int, list[int]]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype, list(tensor.shape), tensor.storage_offset(), list(tensor.stride())


def mode_of(trace: Trace) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    made = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
    empty = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
    filled = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            space, _, name = func._schema.name.partition("::")
            if name == "copy_" and args[1].device.type == "meta" != args[0].device.type:
                trace.copied(args[0], args[1])  # nothing can be copied to the host, and nobody reads it there any more
                return args[0]
            result = func(*args, **kwargs)
            if name == "copy_":
                trace.copied(args[0], args[1])
            elif name == "fill_":
                value = args[1]
                if not isinstance(value, torch.Tensor):
                    trace.constant(args[0], value)
                elif value.device.type != "meta":
                    trace.constant(args[0], value.item())
                else:
                    trace.copied(args[0], value)
            elif name == "zero_":
                trace.constant(args[0], 0)
            elif name in made:
                trace.constant(result, made[name])
            elif name in filled:
                trace.constant(result, args[filled[name]] if len(args) > filled[name] else kwargs["fill_value"])
            elif name in empty:
                pass
            elif name in ("clone", "_to_copy", "lift_fresh", "detach", "alias"):
                if not shares(result, args[0]):
                    self.bring(result, args[0])
            elif name in ("cat", "stack"):
                joined(trace, result, args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), name == "stack")
            else:
                inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
                outputs = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
                new = [one for one in outputs if not any(shares(one, other) for other in inputs)]
                for one in (*new, *written_to(func, args, kwargs)):
                    trace.computed(one, f"{space}.{name}")
            return result

        def bring(self, result: Any, source: Any) -> None:
            """Note what a new tensor is a copy of; a number from the host is a constant."""
            if source.device.type != "meta" and not trace.knows(source):
                if source.numel() == 1:
                    trace.constant(result, source.item())
                else:
                    trace.computed(result, "values from the host")
            else:
                trace.copied(result, source)

    return Mode()


def written_to(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the tensors among an operation's arguments that it writes to."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    given = zip((argument for argument in func._schema.arguments if not argument.kwarg_only), args)
    named = ((argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs)
    changed = [value for argument, value in (*given, *named) if argument.alias_info and argument.alias_info.is_write]
    return [one for one in tree_leaves(changed) if isinstance(one, Tensor)]


def shares(one: Any, other: Any) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def joined(trace: Trace, result: Any, parts: Any, dim: int, stacked: bool) -> None:
    at = 0
    for part in parts:
        if stacked:
            trace.copied(result.select(dim, at), part)
            at += 1
        elif part.numel():
            trace.copied(result.narrow(dim, at, part.shape[dim]), part)
            at += part.shape[dim]


def numbers_of_host(trace: Trace) -> Any:
    """Keep single numbers, and tables of whole numbers, on the host: their values are asked for while a model is built.
    What is meant for a GPU is not put there."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_map

    def off_the_gpu(value: Any) -> Any:
        is_device = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return torch.device("meta") if is_device and torch.device(value).type == "cuda" else value

    class Numbers(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args, kwargs = tree_map(off_the_gpu, (args, kwargs or {}))
            if type(kwargs.get("device")) is int:
                kwargs["device"] = torch.device("meta")
            number = func is torch.tensor and bool(args) and isinstance(args[0], (int, float, bool))
            table = func in (torch.full, torch.arange) and kwargs.get("dtype") in (torch.int32, torch.int64)
            if number or table:
                kwargs = {"device": "cpu", **kwargs}
            result = func(*args, **kwargs)
            if number:
                trace.constant(result, args[0])
            return result

    return Numbers()
