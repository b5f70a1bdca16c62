"""Gluon kernels in Triton's interpreter, which knows none: with a GPU's shared memory and asynchronous copies.

A program runs as one thread: layouts of registers mean nothing here, those of shared memory everything. What is copied
asynchronously arrives when its group is waited for; from when it is begun until then its place is unset, bytes of ones,
as is all memory at first. So a tile read too early, or overwritten too early, is seen in the result.
"""

import math
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as real
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, _get_np_dtype

UNSET = 0xFF


def _tensor(data, dtype):
    kind = tl.block_type(dtype, list(data.shape)) if data.shape else dtype
    return tl.core.tensor(TensorHandle(np.ascontiguousarray(data), dtype), kind)


def places(shape, layout):
    """Where each element of `shape` lies, in elements."""
    bases = getattr(layout, "offset_bases", None)
    if bases is None:
        return np.arange(math.prod(shape)).reshape(shape)  # a plain vector
    at = np.arange(math.prod(shape))
    coordinates = [np.zeros_like(at) for _ in shape]
    for bit, basis in enumerate(bases):
        for coordinate, step in zip(coordinates, basis, strict=True):
            coordinate ^= (at >> bit & 1) * step
    found = np.full(shape, -1)
    found[tuple(coordinates)] = at + sum(
        at // interval * padding for interval, padding in getattr(layout, "interval_padding_pairs", ())
    )
    assert (found >= 0).all(), "a layout that leaves elements without a place"
    return found


class Memory:
    """A descriptor of shared memory."""

    def __init__(self, data, first_byte, dtype, shape, layout, order=None):
        self.data, self.first_byte, self.dtype = data, first_byte, dtype
        self.shape, self.layout, self.order = [int(s) for s in shape], layout, order

    @property
    def element_bytes(self):
        return self.dtype.primitive_bitwidth // 8

    def index(self, i):
        i = int(i.handle.data.item()) if hasattr(i, "handle") else int(i)
        step = math.prod(self.shape[1:]) * self.element_bytes
        return Memory(self.data, self.first_byte + i * step, self.dtype, self.shape[1:], self.layout)

    def _reinterpret(self, dtype, shape, layout):
        return Memory(self.data, self.first_byte, dtype, shape, layout)

    def permute(self, order):
        return Memory(self.data, self.first_byte, self.dtype, self.shape, self.layout, order)

    def bytes(self):
        """Places of all bytes, the last axis those of an element."""
        first = self.first_byte + places(self.shape, self.layout) * self.element_bytes
        found = first[..., None] + np.arange(self.element_bytes)
        assert found.max() < len(self.data), "beyond the end of shared memory"
        return found

    def load(self, layout):
        elements = self.data[self.bytes()].view(_get_np_dtype(self.dtype))[..., 0]
        return _tensor(elements.transpose(self.order) if self.order else elements, self.dtype)


class AsyncCopy:
    """`ampere.async_copy`."""

    def __init__(self):
        self.begun, self.groups = [], []

    def async_copy_global_to_shared(self, memory, pointer, mask=None):
        assert list(pointer.shape) == memory.shape
        copied = np.ascontiguousarray(tl.load(pointer, mask=mask, other=0).handle.data)
        at = memory.bytes()
        memory.data[at] = UNSET
        self.begun.append((memory.data, at, copied[..., None].view(np.uint8)))

    def commit_group(self):
        self.groups.append(self.begun)
        self.begun = []

    def wait_group(self, left):
        while len(self.groups) > left:
            for data, at, copied in self.groups.pop(0):
                data[at] = copied


class Language:
    """`gluon.language`, of which Triton's language has all but layouts and memory."""

    constexpr = tl.constexpr
    static_range = staticmethod(range)

    def __getattr__(self, name):
        return getattr(real if name.endswith("Layout") else tl, name)

    def arange(self, start, end, layout=None):
        return tl.arange(start, end)

    def full(self, shape, value, dtype, layout=None):
        return tl.full(shape, value, dtype)

    def zeros(self, shape, dtype, layout=None):
        return tl.zeros(shape, dtype)

    def convert_layout(self, x, layout, assert_trivial=False):
        return x

    def allocate_shared_memory(self, dtype, shape, layout):
        size = math.prod(int(s) for s in shape) * dtype.primitive_bitwidth // 8
        return Memory(np.full(size, UNSET, np.uint8), 0, dtype, shape, layout)


def mma_v2(a, b, c):
    """A B + C, products of float16 summed in FP32."""
    product = np.matmul(a.handle.data.astype(np.float32), b.handle.data.astype(np.float32))
    return _tensor(product + c.handle.data, tl.float32)


@contextmanager
def interpreted(*modules):
    """The Gluon functions of `modules` as functions of the interpreter."""
    saved = [dict(vars(module)) for module in modules]
    standing_in = {"gl": Language(), "async_copy": AsyncCopy(), "mma_v2": mma_v2}
    wrapped = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, GluonJITFunction):
                setattr(module, name, wrapped.setdefault(value.fn, InterpretedFunction(value.fn)))
            elif name in standing_in:
                setattr(module, name, standing_in[name])
    try:
        yield
    finally:
        for module, before in zip(modules, saved, strict=True):
            vars(module).update(before)
