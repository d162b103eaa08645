"""CUDA-graph capture for a CPU: work is recorded without effect, and replayed on the very same memory.

As strict as the real thing. Numbers of the host are those of the recording for ever; memory from outside is found by its
address alone, so a replay that needs what was freed since raises; what the recording leaves in its own memory is NaN until the
first replay; whatever would have to wait for the device, or copy from the host, raises while recording.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what gives the host a tensor's values, by the names that Python and the dispatcher have for it
READS = ("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__")
# what the host has in Python, or in numpy, goes to the device by a copy
MAKES = ("tensor", "as_tensor", "asarray", "from_numpy", "new_tensor")
REFUSED = ("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2")
# these only take memory
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Tape:
    """Captures as `graphs.Capture` says; what one tape captured shares its counts.

    Attributes:
        captures, replays: how many there were.
        launches: operators that replays ran, views not counted.
        busy: whether it records or replays right now.
    """

    def __init__(self) -> None:
        self.captures = self.replays = self.launches = 0
        self.busy = False

    def __call__(self, work: Any) -> Any:
        self.captures += 1
        recording = Recording()
        self.busy = True
        try:
            with _NoHost(), recording:
                result = work()
        finally:
            recording.undo()
            self.busy = False

        def replay() -> None:
            self.replays += 1
            self.busy = True
            try:
                self.launches += recording.replay()
            finally:
                self.busy = False

        return replay, result


@dataclass(frozen=True, slots=True)
class Address:
    """A tensor from outside, which is not kept alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        if self.storage.expired():
            raise AssertionError(f"a replay needs memory that was freed: {self.dtype} {list(self.shape)}")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass(slots=True)
class Launch:
    """An operator with its arguments, of which tensors from outside are `Address`es.

    fresh: of its results, by place, those in memory of their own, which replays fill again; views are not held, as they would
    hold what they show. silent: it only makes a view, or takes memory.
    """

    op: Any
    args: Any
    kwargs: Any
    fresh: dict[int, Tensor] = field(default_factory=dict)
    silent: bool = False


class Recording(TorchDispatchMode):
    """What was dispatched inside the block. `undo` makes it as if it had not been done, `replay` does it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.own: dict[int, torch.UntypedStorage] = {}
        self.numbers: dict[int, torch.UntypedStorage] = {}
        self.addresses: dict[tuple[Any, ...], Address] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert name not in REFUSED and not tags & set(func.tags), f"recorded work reads a value back: {func}"
        leaves = tree_leaves((args, kwargs))
        assert not any(isinstance(leaf, torch.Generator) for leaf in leaves), f"recorded work draws numbers: {func}"
        given = {_key(leaf): leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)}
        if name == "lift_fresh":
            # of an assignment, and an argument of its kernel; all else is of MAKES
            self.numbers.update(given)
            return func(*args, **kwargs)
        for written in _written(func, args, kwargs):
            self._save(written)
        recorded_args, recorded_kwargs = _mapped(self._recorded, (args, kwargs))
        result = func(*args, **kwargs)
        launch = Launch(func, recorded_args, recorded_kwargs)
        for i, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor) and _key(leaf) not in given:
                self.own[_key(leaf)] = leaf.untyped_storage()
                launch.fresh[i] = leaf
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        launch.silent = name in ALLOCATE or not (writes or launch.fresh)
        self.launches.append(launch)
        return result

    def _save(self, written: Tensor) -> None:
        key, storage = _key(written), written.untyped_storage()
        if key not in self.own and key not in self.numbers and key not in self.before:
            self.before[key] = storage, _bytes(storage).clone()

    def _recorded(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or _key(leaf) in self.own or _key(leaf) in self.numbers:
            return leaf
        offset, shape, stride = int(leaf.storage_offset()), tuple(leaf.shape), leaf.stride()
        key = (_key(leaf), leaf.dtype, offset, shape, stride)
        if key not in self.addresses:
            self.addresses[key] = Address(StorageWeakRef(leaf.untyped_storage()), leaf.dtype, offset, shape, stride)
        return self.addresses[key]

    @torch.inference_mode()
    def undo(self) -> None:
        for storage, before in self.before.values():
            _bytes(storage).copy_(before)
        self.before.clear()
        for storage in self.own.values():
            _bytes(storage).fill_(255)

    @torch.inference_mode()
    def replay(self) -> int:
        """Returns: how many operators ran."""
        outside = {id(address): address.tensor() for address in self.addresses.values()}

        def found(leaf: Any) -> Any:
            return outside[id(leaf)] if isinstance(leaf, Address) else leaf

        count = 0
        for launch in self.launches:
            if launch.silent:
                continue
            args, kwargs = _mapped(found, (launch.args, launch.kwargs))
            results = tree_leaves(launch.op(*args, **kwargs))
            for i, place in launch.fresh.items():
                place.copy_(results[i])
            count += 1
        return count


class _NoHost(TorchFunctionMode):
    """On a CPU some ways to a tensor's values, and from the host's, pass the dispatcher by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in READS, f"recorded work reads a value back: Tensor.{name}"
        assert name not in MAKES, f"recorded work makes a tensor of the host's numbers: {name}"
        return func(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    """`count`: what was dispatched outside captures and replays, by operator, since it was last taken.

    Args:
        tapes: those that may be busy; more may join.
    """

    def __init__(self, tapes: list[Tape]) -> None:
        super().__init__()
        self.tapes, self.count = tapes, Counter[str]()

    def take(self) -> Counter[str]:
        taken, self.count = self.count, Counter()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(tape.busy for tape in self.tapes):
            self.count[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def _mapped(function: Any, value: Any) -> Any:
    """What the leaves of lists, tuples and dicts become; `tree_map` takes longer than the operators."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(function, each) for each in value])
    if isinstance(value, dict):
        return {key: _mapped(function, each) for key, each in value.items()}
    return function(value)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Of the arguments those that the schema says are written to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found
