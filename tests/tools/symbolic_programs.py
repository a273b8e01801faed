"""Programs of views and copies, drawn by hypothesis: run on real tensors and on symbolic ones."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


@st.composite
def programs(draw: st.DrawFn) -> tuple[tuple[int, ...], list]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    steps, at = [], torch.zeros(shape)
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["permute", "reshape", "narrow", "cat", "unsqueeze", "flip_chunks"]))
        if kind == "permute":
            step = (kind, draw(st.permutations(range(at.ndim))))
        elif kind == "reshape":
            step = (kind, draw(factorings(at.numel())))
        elif kind == "unsqueeze":
            step = (kind, draw(st.integers(-1, at.ndim)))
        else:
            dim = draw(st.integers(0, at.ndim - 1))
            start = draw(st.integers(0, at.shape[dim] - 1))
            step = (kind, dim, start, draw(st.integers(1, at.shape[dim] - start)))
        at = run(at, step)
        if at.ndim == 0 or at.numel() > 2000:
            break
        steps.append(step)
    return shape, steps


@st.composite
def factorings(draw: st.DrawFn, size: int) -> list[int]:
    shape = []
    while size > 1:
        factor = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape.append(factor)
        size //= factor
    return shape or [1]


def run(tensor, step):
    kind, *args = step
    if kind == "permute":
        return tensor.permute(*args[0])
    if kind == "reshape":
        return tensor.reshape(args[0])
    if kind == "unsqueeze":
        return tensor.unsqueeze(args[0])
    dim, start, length = args
    if kind == "narrow":
        return tensor.narrow(dim, start, length)
    if kind == "cat":
        return torch.cat([tensor, tensor.narrow(dim, start, length)], dim=dim)
    return torch.cat(list(reversed(torch.chunk(tensor, length, dim))), dim=dim)
