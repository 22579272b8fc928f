"""A stand-in for Gluon and for one SM of a Hopper GPU: it runs the Hopper kernels' own code on the CPU, a CTA at a time.

The partitions of a CTA's warps are threads of which one runs at a time.  Which one goes on, and when a bulk copy arrives,
is drawn anew with each seed, so that what the rings do not forbid happens sooner or later.  It fails where the GPU would
hang (everybody waits), count too many arrivals, overwrite an operand before the product that reads it is waited for,
multiply what is no TF32 value, access memory out of bounds, read what an earlier launch writes without waiting for it,
store an element twice, or end before what bulk stores read has been read.  Shared memory begins as NaN, and so does what a bulk
copy has begun to overwrite; a bulk store reads it at any time until it is waited for.

It knows nothing of layouts, registers and proxies: where swizzled pixels lie (`ring_rows` and `ring_view`, which it replaces) and
what a fence is for, only a GPU can tell.  Of the block kernel's shared memory it knows in which order lines lie.
"""

import builtins
import random
import threading
from functools import cache, partial
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from oracle import round_tf32

from tconv.kernels import blocks, hopper, shift
from tconv.record import Described, Record

LAYOUTS = (
    *("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout"),
    *("SharedLinearLayout", "SliceLayout", "SwizzledSharedLayout"),
)
ROUND = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def raw(value):
    return value.a if isinstance(value, Value) else value


def quotient(a, b):
    """As the GPU divides integers: rounded towards zero."""
    q = np.abs(a) // np.abs(b)
    return np.where((a < 0) == (b < 0), q, -q)


class Value:
    """What is known at run time alone: a scalar or a tensor in registers; integers, booleans or (as doubles) reals."""

    def __init__(self, a):
        self.a = np.asarray(a)

    @property
    def type(self):
        return SimpleNamespace(shape=list(self.a.shape))

    def __index__(self):
        return int(self.a)

    def __int__(self):
        return int(self.a)

    def __bool__(self):
        return bool(self.a)

    def __getitem__(self, at):
        return Value(self.a[at])

    def reshape(self, shape):
        return Value(self.a.reshape([int(n) for n in shape]))

    def permute(self, order):
        return Value(self.a.transpose(order))

    def to(self, dtype):
        if dtype not in ROUND or self.a.dtype.kind != "f":
            return self
        return Value(torch.from_numpy(self.a.copy()).to(ROUND[dtype]).double().numpy())


def _operator(name, function):
    setattr(Value, f"__{name}__", lambda self, other: Value(function(self.a, raw(other))))
    setattr(Value, f"__r{name}__", lambda self, other: Value(function(raw(other), self.a)))


for _name, _function in {
    **dict(add=np.add, sub=np.subtract, mul=np.multiply, floordiv=quotient, mod=lambda a, b: a - quotient(a, b) * b),
    **dict(rshift=np.right_shift, lshift=np.left_shift, xor=np.bitwise_xor),
    **{"and": np.bitwise_and, "or": np.bitwise_or},
    **dict(lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal, eq=np.equal, ne=np.not_equal),
}.items():
    _operator(_name, _function)


class Memory:
    """Global memory behind a tensor's address: read as doubles; `written` counts the stores to each element.  earlier: whether
    a launch ahead of this one writes it."""

    def __init__(self, t, earlier=False):
        self.t, self.earlier = t, earlier
        self.size = t.element_size()
        length = t.untyped_storage().nbytes() // self.size - t.storage_offset()
        self.flat = torch.as_strided(t, (length,), (1,), t.storage_offset())
        self.data = self.flat.double().numpy().copy()
        self.written = np.zeros(length, int)

    def __add__(self, offsets):
        return Pointers(self, raw(offsets))

    def finish(self):
        assert self.written.max(initial=0) <= 1, "an element was stored twice"
        self.flat[torch.from_numpy(self.written > 0)] = torch.from_numpy(self.data[self.written > 0]).to(self.t.dtype)


class Pointers:
    def __init__(self, memory, offsets):
        self.memory, self.offsets = memory, offsets

    def __add__(self, offsets):
        return Pointers(self.memory, self.offsets + raw(offsets))


class Descriptor:
    """A tensor as bulk copies take it; strict: only of whole 16 bytes, as a GPU does (tests of the shift kernel's forms also give it
    what its plan would not)."""

    def __init__(self, memory, facts, strict):
        self.strict = strict
        self.memory, (self.shape, self.strides, self.box, _, *more) = memory, facts
        inner = self.box[-1] * memory.size
        assert not strict or (inner % 16 == 0 and inner <= 128), "swizzled rows have 16 to 128 bytes"
        assert max(self.shape) < 2**31 and max(self.strides) * memory.size < 2**40, "beyond what a descriptor holds"
        at = memory.t.data_ptr(), *(n * memory.size for n in self.strides[:-1])
        assert not strict or not any(n % 16 for n in at), "bulk copies take addresses and strides of whole 16 bytes"
        assert self.strides[-1] == 1 and max(self.box) <= 256 and len(self.box) <= 5
        self.rounds = more == ["zero", True]  # to TF32

    def _places(self, corner):
        assert not self.strict or int(corner[-1]) * self.memory.size % 16 == 0, (
            "a bulk copy begins between two multiples of 16 bytes"
        )
        assert all(abs(int(n)) < 2**31 for n in corner), "coordinates have 32 bits"
        at, inside = 0, True
        for axis, (begin, n) in enumerate(zip(corner, self.box, strict=True)):
            shape = [-1 if i == axis else 1 for i in range(len(self.box))]
            i = (int(begin) + np.arange(n)).reshape(shape)
            inside = inside & (i >= 0) & (i < self.shape[axis])
            at = at + i * self.strides[axis]
        return at, inside

    def read(self, corner):
        """The box at `corner`, zero where it leaves the tensor."""
        at, inside = self._places(corner)
        found = np.where(inside, self.memory.data[np.where(inside, at, 0)], 0.0)
        return round_tf32(torch.from_numpy(found).float()).double().numpy() if self.rounds else found

    def write(self, corner, values):
        """The box at `corner`, but for what leaves the tensor."""
        at, inside = self._places(corner)
        np.add.at(self.memory.written, at[inside], 1)
        self.memory.data[at[inside]] = values.reshape(inside.shape)[inside]


class Shared:
    """A view of shared memory, of which the first `own` columns must not change while a product reads it."""

    def __init__(self, array, own=None):
        self.array, self.own = array, own

    def index(self, i):
        return Shared(self.array[int(i)])

    def permute(self, order):
        return Shared(self.array.transpose(order))

    def slice(self, start, length, dim):
        return Shared(self.array.swapaxes(0, dim)[start : start + length].swapaxes(0, dim))

    def store(self, value):
        assert self.array.shape == value.a.shape
        self.array[...] = value.a

    def load(self, layout):
        return Value(self.array.copy())

    @property
    def memory(self):
        """In the order of its addresses."""
        return self.array


class Lines(Shared):
    """A view [rows, columns] of memory that has a line of columns of all rows, then the next one; or of several such."""

    def __init__(self, memory, order=(0, 1)):
        self.lines, self.order, self.own = memory, order, None

    @property
    def array(self):
        _, rows, _ = self.lines.shape
        return self.lines.transpose(1, 0, 2).reshape(rows, -1).transpose(self.order)

    memory = property(lambda self: self.lines)

    def index(self, i):
        return Lines(self.lines[int(i)])

    def permute(self, order):
        return Lines(self.lines, order)


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all announced bytes have."""

    def init(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, count=0, expect=0, arrived=0):
        self.pending -= count
        self.bytes += expect - arrived
        assert self.pending >= 0, "too many arrivals"
        if not self.pending and not self.bytes:
            self.pending, self.phase = self.count, self.phase ^ 1


class Stopped(Exception):
    """Another partition failed."""


class Machine:
    """One CTA."""

    def __init__(self, program, grid, size, seed, in_lines=False):
        self.program, self.grid, self.size = program, grid, size  # size: bytes of an element
        self.in_lines = in_lines  # whether the kernel sees shared memory in its order of lines
        self.draw = random.Random(seed)
        self.copies, self.stores = [], []  # under way; of a store also whose it is
        # Of this thread's partition: .name, .products that it has not waited for, whether it .awaited earlier launches.
        self.own = threading.local()
        self.waiting: dict = {}  # by partition: what it waits for, or None
        self.turn, self.alive, self.error = None, 0, None
        self.changed = threading.Condition()

    # Who runs

    def partitions(self, calls, *_):
        """gl.warp_specialize."""
        self.alive = len(calls)
        self.waiting = dict.fromkeys(range(len(calls)))
        threads = [threading.Thread(target=self._partition, args=(i, *call)) for i, call in enumerate(calls)]
        for thread in threads:
            thread.start()
        with self.changed:
            self._next()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        assert not self.copies, "a bulk copy was waited for by nobody"

    def _partition(self, name, function, args):
        self.own.name, self.own.products, self.own.awaited = name, [], False
        try:
            self._sleep()
            function(*args)
            assert not self.own.products, "a product was not waited for"
            assert all(name != owner for owner, *_ in self.stores), "a bulk store was not waited for"
        except Stopped:
            return
        except BaseException as error:
            self.error = self.error or error
        with self.changed:
            self.alive -= 1
            self._next()

    def _next(self):
        """Give the turn to somebody who can go on."""
        while self.alive and not self.error:
            if self.copies and self.draw.random() < 0.3:
                self._arrive()
            if self.stores and self.draw.random() < 0.3:
                self._write(self.draw.choice(self.stores))
            able = [name for name, ready in self.waiting.items() if ready is None or ready()]
            if able:
                self.turn = self.draw.choice(able)
                del self.waiting[self.turn]
                break
            if self.copies:
                self._arrive()
            else:
                self.error = AssertionError("everybody waits")
        self.changed.notify_all()

    def _sleep(self):
        with self.changed:
            self.changed.wait_for(lambda: self.turn == self.own.name or self.error)
        if self.error:
            raise Stopped

    def step(self, ready=None):
        """Let others go on; return when `ready`."""
        if not hasattr(self.own, "name"):  # before the partitions begin
            return
        with self.changed:
            self.waiting[self.own.name] = ready
            self.turn = None
            self._next()
        self._sleep()

    def _arrive(self):
        source, corner, barrier, to, nbytes = self.copies.pop(self.draw.randrange(len(self.copies)))
        to.array[...] = source.read(corner).reshape(to.array.shape)
        barrier.arrive(arrived=nbytes)

    def _write(self, store):
        self.stores.remove(store)
        _, to, corner, source = store
        to.write(corner, source.array.copy())

    # What the kernel calls

    def allocate(self, dtype, shape, layout):
        if dtype == "int64":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        if self.in_lines and layout.line < shape[-1]:
            *buffers, rows, columns = shape
            return Lines(np.full([*buffers, columns // layout.line, rows, layout.line], np.nan))
        return Shared(np.full(shape, np.nan))

    def wait(self, barrier, parity):
        self.step(lambda: barrier.phase != int(parity))

    def arrive(self, barrier, count=1, pred=True):
        self.step()
        if pred:
            barrier.arrive(count)

    def expect(self, barrier, nbytes, pred=True):
        if pred:
            barrier.arrive(1, expect=int(nbytes))

    def async_load(self, source, corner, barrier, to, pred=True):
        if pred:
            assert not source.memory.earlier or self.own.awaited, "an earlier launch is not waited for"
            to.array[...] = np.nan
            self.copies.append((source, [int(i) for i in corner], barrier, to, prod(source.box) * self.size))
        self.step()

    def async_store(self, to, corner, source):
        self.stores.append((self.own.name, to, [int(i) for i in corner], source))
        self.step()

    def store_wait(self, pending):
        assert pending == 0
        for store in [each for each in self.stores if each[0] == self.own.name]:
            self._write(store)

    def multiply(self, a, b, acc, use_acc=True, is_async=True):
        if isinstance(a, Value):  # in registers, which nothing else changes
            a = Shared(a.a)
        if self.size == 4:
            for each in (a.array, b.array):
                single = torch.from_numpy(np.nan_to_num(each, posinf=0, neginf=0)).float()
                assert torch.equal(round_tf32(single), single), "what is no TF32 value is multiplied"
        self.own.products.append((a, b, a.array.copy(), b.array.copy()))
        with np.errstate(invalid="ignore"):
            product = a.array @ b.array
        return Value(product + acc.a if use_acc else product)

    def multiply_wait(self, outstanding, deps):
        self.step()
        done = len(self.own.products) - outstanding
        for a, b, a_was, b_was in self.own.products[: max(0, done)]:
            for each, was in ((a, a_was), (b, b_was)):
                same = np.array_equal(each.array[:, : each.own], was[:, : each.own], equal_nan=True)
                assert same, "an operand was overwritten before its product was done"
        del self.own.products[: max(0, done)]
        return deps if len(deps) > 1 else deps[0]


def load(pointer, mask=True, other=0.0):
    offsets, mask = np.broadcast_arrays(pointer.offsets, raw(mask))
    memory = pointer.memory
    assert not (mask & ((offsets < 0) | (offsets >= memory.data.size))).any(), "a load out of bounds"
    return Value(np.where(mask, memory.data[np.where(mask, offsets, 0)], other))


def store(pointer, value, mask=True):
    offsets, mask, values = np.broadcast_arrays(pointer.offsets, raw(mask), value.a)
    memory = pointer.memory
    assert not (mask & ((offsets < 0) | (offsets >= memory.data.size))).any(), "a store out of bounds"
    np.add.at(memory.written, offsets[mask], 1)
    memory.data[offsets[mask]] = values[mask]


def inline_assembly(machine, text, constraints, args, dtype, is_pure, pack):
    (v,) = args
    if text.startswith("griddepcontrol.wait; "):
        machine.own.awaited = True
        text = text.removeprefix("griddepcontrol.wait; ")
    if text.startswith("mov.b32 $0, 0"):
        return Value(np.zeros_like(raw(v)))
    assert text.startswith("cvt.rn.tf32.f32")
    return Value(round_tf32(torch.from_numpy(v.a.copy()).float()).double().numpy())


@cache
def code(module, change):
    """A kernel's module, with one text in the place of another."""
    text = Path(module.__file__).read_text()
    if change:
        assert change[0] in text
        text = text.replace(*change)
    return compile(text, module.__file__, "exec")


def namespace(machine, module, change):
    """That module with this machine in Gluon's place."""
    beside = namespace(machine, hopper, None) if module is not hopper else {}

    def decorator(*functions, **_):
        return functions[0] if functions else lambda function: function

    def anything(*_, **__):
        return None

    def where(condition, a, b):
        return Value(np.where(raw(condition), raw(a), raw(b)))

    reinterpret = staticmethod(lambda mem, dtype, shape, layout: Shared(mem.memory.reshape(shape)))
    gl = SimpleNamespace(
        constexpr=lambda value: value,
        static_range=lambda *bounds: builtins.range(*map(int, bounds)),
        arange=lambda a, b, layout: Value(np.arange(int(a), int(b))),
        zeros=lambda shape, dtype, layout: Value(np.zeros([int(n) for n in shape])),
        where=where,
        abs=lambda v: Value(np.abs(v.a)),
        join=lambda a, b: Value(np.stack((a.a, b.a), -1)),
        split=lambda v: (Value(v.a[..., 0]), Value(v.a[..., 1])),
        load=load,
        store=store,
        inline_asm_elementwise=partial(inline_assembly, machine),
        program_id=lambda axis: Value(machine.program[axis]),
        num_programs=lambda axis: Value(machine.grid[axis]),
        allocate_shared_memory=machine.allocate,
        warp_specialize=machine.partitions,
        shared_memory_descriptor=type("descriptor", (), {"reinterpret": reinterpret}),
        barrier=anything,
        NVMMASharedLayout=lambda nbytes, bits, *_: SimpleNamespace(line=8 * nbytes // bits),
        **{n: n for n in ("int32", "int64")},
        **{"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"},
        **dict.fromkeys(LAYOUTS, anything),
    )
    of_hopper = SimpleNamespace(
        fence_async_shared=anything,
        mbarrier=SimpleNamespace(
            MBarrierLayout=anything,
            init=lambda barrier, count: barrier.init(count),
            wait=machine.wait,
            arrive=machine.arrive,
            expect=machine.expect,
        ),
        tma=SimpleNamespace(
            async_load=machine.async_load, async_store=machine.async_store, store_wait=machine.store_wait
        ),
        warpgroup_mma=machine.multiply,
        warpgroup_mma_wait=machine.multiply_wait,
    )
    language = SimpleNamespace(nvidia=SimpleNamespace(hopper=of_hopper), **vars(gl))
    gluon = SimpleNamespace(jit=decorator, language=language)
    triton = SimpleNamespace(
        __version__="3.9.0",
        jit=decorator,
        constexpr_function=decorator,
        language=SimpleNamespace(constexpr=None),
        experimental=SimpleNamespace(gluon=gluon),
    )

    def imported(name, scope=None, local=None, wanted=(), level=0):
        if level and name == "hopper":
            return SimpleNamespace(**beside)
        if level or name.split(".")[0] != "triton":
            return builtins.__import__(name, scope, local, wanted, level)
        found = triton
        for part in name.split(".")[1:] if wanted else ():
            found = getattr(found, part)
        return found

    def counted(*bounds):
        return (Value(i) for i in builtins.range(*map(int, bounds)))

    scope = {
        "__name__": module.__name__,
        "__package__": module.__package__,
        "__builtins__": {**vars(builtins), "__import__": imported, "range": counted},
    }
    exec(code(module, change), scope)

    def rows(ring, row, count, p):
        row, flat = int(row), ring.array.reshape(-1, p.kb)
        assert row % count == 0 and row + count <= len(flat)
        return Shared(flat[row : row + count])

    def view(ring, stage, shift, p):
        begin, flat = int(stage) * p.pitch + shift, ring.array.reshape(-1, p.kb)
        assert begin >= 0 and begin + p.pixels <= len(flat)
        # The last pixels may be the next stage's, of which nothing is stored.
        return Shared(flat[begin : begin + p.pixels].T, own=(int(stage) + 1) * p.pitch - begin)

    if module is hopper:
        scope |= {"ring_rows": rows, "ring_view": view}
    return scope


class Emulated(Record):
    """A Record of which the Hopper kernels run here; the others run in Triton's interpreter."""

    def __init__(self, *tensors, seed=0, change=None):
        super().__init__(*tensors)
        self.seed, self.change = seed, change

    def workspace(self, *args, **options):
        """NaN, which must reach no output: also what stands in rows that a packed weight leaves open."""
        return super().workspace(*args, **options).fill_(torch.nan)

    def launch(self, kernel, grid, *args, **constants):
        modules = {shift.shift: shift, blocks.blocks_forward: blocks}
        if kernel not in modules:
            return super().launch(kernel, grid, *args, **constants)
        memories: dict = {}
        made = [id(t) for t in self._known[len(self._known) - len(self._allocations) :]]

        def ready(value):
            if isinstance(value, Described):
                return Descriptor(ready(value.base), value.facts, kernel is blocks.blocks_forward)
            if isinstance(value, torch.Tensor):
                return memories.setdefault(id(value), Memory(value, id(value) in made))
            return Value(int(value))

        *values, tile = args
        values = [ready(value) for value in values]
        module, grid = modules[kernel], (grid, 1) if isinstance(grid, int) else grid
        for program in product(*map(range, grid)):
            machine = Machine(program, grid, tile.size, f"{self.seed} {program}", module is blocks)
            namespace(machine, module, self.change)[kernel.fn.__name__](*values, tile)
        memories[id(getattr(args[3], "base", args[3]))].finish()
