"""The kernels as Triton compiles them, run by ttsem on the CPU: out-of-bounds accesses, reads of memory that nobody wrote and
two programs at one address end the launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
import torch
from basinescape.kernels.dispatch import Launch
from basinescape.kernels.step import launch_step
from torch import Tensor
from ttsem import harness, sanitize
from ttsem.interp import Interp
from ttsem.memory import Memory

CAPABILITY = 90
APART = 1 << 44  # bytes between the tensors of a `Sparse` memory


@contextmanager
def compiled() -> Iterator[sanitize.Session]:
    """Run all launches so. Tensors say they are on a GPU; new memory holds NaN. Fails where nothing was launched."""
    with sanitize.session(CAPABILITY) as session, patch.object(torch.cuda, "device_of", lambda _: nullcontext()):
        yield session
    assert session.launches and not session.races_unchecked


def step(uncond: Tensor, cond: Tensor | None, table: Tensor, state, finds: bool = True, rule: str = "cfg") -> None:
    """In the place of `kernels.step`, which takes the eager way on a CPU."""
    launch_step(uncond, cond, table, finds, None, state, rule)


class Sparse(Memory):
    """Memory of any size, of which only the addresses are kept: whole numbers in it are 0, others 1."""

    def __init__(self) -> None:
        super().__init__()
        self.trace()

    def _read(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.full(addresses.size, dtype not in (np.int32, np.int64), dtype)

    def _write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        pass


def touched(launch: Launch, program: int) -> dict[str, tuple[int, int]]:
    """Run one program of a launch that was recorded on tensors without memory: the first and the last element that it touched
    of the memory that each tensor lies in."""
    harness._install_fake_driver(CAPABILITY)
    names = launch.kernel.arg_names
    bound = dict(zip(names, launch.arguments, strict=False)) | {n: v for n, v in launch.options.items() if n in names}
    tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    memories = list(dict.fromkeys(tensor.untyped_storage()._cdata for tensor in tensors.values()))
    bases = {name: (1 + memories.index(x.untyped_storage()._cdata)) * APART for name, x in tensors.items()}
    record = harness.LaunchRecord(
        launch_id=0,
        fn=launch.kernel,
        fn_name=launch.kernel.__name__,
        fn_file="",
        grid=(launch.programs,),
        args=launch.arguments,
        kwargs=launch.options,
        bound=bound,
        pre={},
        post={},
        ptrs={name: bases[name] + x.storage_offset() * x.element_size() for name, x in tensors.items()},
        bases=bases,
        elems={name: str(x.dtype) for name, x in tensors.items()},
    )
    module = harness.mlir.parse(harness.ir_for_launch(record, "ttir", harness.target_for("cpu", CAPABILITY)))
    block = module.funcs[record.fn_name].regions[0].blocks[0]
    values = harness._arg_values(record, harness._runtime_param_names(record), block, emulated=False)
    memory = Sparse()
    Interp(module, memory, (launch.programs, 1, 1)).run(record.fn_name, values, (program, 0, 0))
    found = {}
    for name, base in bases.items():
        inside = [x for _, _, _, x, _, _ in memory.access_log if abs(int(x.min()) - base) < APART // 2]
        edges = [edge for addresses in inside for edge in (int(addresses.min()), int(addresses.max()))]
        if edges:
            size = tensors[name].element_size()
            found[name] = (min(edges) - base) // size, (max(edges) - base) // size
    return found
