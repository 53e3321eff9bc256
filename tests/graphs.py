"""CUDA graphs in Python, for a device that has none: what is recorded is a list of PyTorch's operations."""

from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


impl = attrgetter("_cdata")  # of a generator: its Python object may be another one each time


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class CUDAGraph(TorchDispatchMode):
    """As with a real one, nothing that is recorded has happened, and a replay reads and writes the recorded memory."""

    def __init__(self):
        super().__init__()
        self.generators, self.work, self.made, self.before, self.replays = [], [], {}, {}, 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __enter__(self):
        self.states = [g.get_state() for g in self.generators]
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = {impl(g) for g in tree_leaves((args, kwargs)) if isinstance(g, torch.Generator)}
        assert drawn <= set(map(impl, self.generators)), f"{func} draws from a generator that the graph does not know"
        for slot, given in zip(func._schema.arguments, args, strict=False):
            for t in tensors_in(given) if slot.alias_info and slot.alias_info.is_write else ():
                if memory(t) not in self.made and memory(t) not in self.before:
                    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
                    self.before[memory(t)] = (whole, whole.clone())
        out = func(*args, **kwargs)
        theirs = {memory(t) for t in tensors_in((args, kwargs))}
        self.made |= {memory(t): t for t in tensors_in(out) if memory(t) not in theirs}
        self.work.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for t, was in self.before.values():
                t.copy_(was)
            for t in self.made.values():
                if t.is_floating_point():
                    t.fill_(torch.nan)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.work:
            again = func(*args, **kwargs)
            for kept, new in zip(tensors_in(out), tensors_in(again), strict=True):
                if memory(kept) != memory(new):
                    kept.copy_(new)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


def stand_ins(watch: Any = nullcontext) -> dict[str, Any]:
    """What to put into `torch.cuda` for a while; what is recorded runs in a context of `watch`."""

    modes: list[Any] = ["default"]

    @contextmanager
    def graph(recorded: CUDAGraph, stream: Stream, capture_error_mode: str):
        with recorded, watch():
            yield

    def set_sync_debug_mode(mode: str) -> None:
        if mode == "error":
            modes.append(watch())
            modes[-1].__enter__()
        else:
            modes.pop().__exit__(None, None, None)

    nothing = lambda *_: nullcontext()
    return {
        "get_sync_debug_mode": lambda: "default",
        "set_sync_debug_mode": set_sync_debug_mode,
        "set_stream": nothing,
        "CUDAGraph": CUDAGraph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nothing,
        "device": nothing,
        "graph": graph,
    }
