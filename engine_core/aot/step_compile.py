"""Compiling a model's real steps for a slice, from shapes alone."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from engine_core.aot.abstract_step import (
    abstract_cache,
    abstract_params,
    abstract_slots,
    decode_inputs,
    prefill_inputs,
)
from engine_core.aot.hlo import Collective, count_collectives
from engine_core.kv_cache import CacheLayout
from engine_core.models.decoder import Decoder
from engine_core.slot_table import SlotTable
from engine_core.step import build_step

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory")


class OutOfMemory(Exception):
    """The compiler found that a step does not fit in HBM; its words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """Static sizes of the steps of one replica.

    Attributes:
        num_slots: S, and B of the largest decode step, of all row shards together: a multiple of their number.
        pages_per_seq: P.
        prefill_tokens: T of the largest prefill step of one row shard.
        prefill_rows: B of a prefill step of one row shard.
    """

    num_slots: int
    pages_per_seq: int
    prefill_tokens: int
    prefill_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledStep:
    """What the compiler says about one step, per device.

    Attributes:
        compile_s: seconds that it took, tracing included.
        argument_bytes: weights, cache, slots and inputs.
        temp_bytes: what the step needs besides, at its peak.
        code_bytes: of the program.
        collectives: by kind, one step's.
    """

    compile_s: float
    argument_bytes: int
    temp_bytes: int
    code_bytes: int
    collectives: dict[str, Collective]

    @property
    def workspace_bytes(self) -> int:
        """HBM beyond weights, cache and slots."""
        return self.temp_bytes + self.code_bytes


class StepCompiler:
    """Compiles the steps of one model on one slice.

    Args:
        model: scanned.
        mesh: of the slice's devices.
        layout: of the cache; `num_pages` is what the compiled steps have, all row shards together.
        sizes: static sizes.
    """

    def __init__(self, model: Decoder, mesh: Mesh, layout: CacheLayout, sizes: StepSizes) -> None:
        self._model = model
        self._mesh = mesh
        self._layout = layout
        self._sizes = sizes
        shards = model.degrees.row_shards
        self._slots = sizes.num_slots // shards  # of a row shard
        self._table = SlotTable(self._slots, sizes.pages_per_seq, layout.num_pages // shards, model.spec.vocab_size)

    def decode(self) -> CompiledStep:
        """The decode step of all slots.

        Raises:
            OutOfMemory: it does not fit.
        """
        return self._compile(decode_inputs(self._slots, self._table, self._mesh))

    def prefill(self) -> CompiledStep:
        """The largest prefill step.

        Raises:
            OutOfMemory: it does not fit.
        """
        sizes = self._sizes
        return self._compile(prefill_inputs(sizes.prefill_tokens, sizes.prefill_rows, self._table, self._mesh))

    def _compile(self, inputs: Any) -> CompiledStep:
        start = time.monotonic()
        model, mesh = self._model, self._mesh
        slots = abstract_slots(self._sizes.num_slots, model.spec.vocab_size, mesh)
        cache = abstract_cache(self._layout, mesh, model.scan)
        step: Any = build_step(model, mesh)  # jitted, which its type does not say
        lowered = step.lower(abstract_params(model, mesh), cache, slots, inputs)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise OutOfMemory(str(error).splitlines()[0]) from None
            raise
        memory = compiled.memory_analysis()
        assert memory is not None
        return CompiledStep(
            compile_s=time.monotonic() - start,
            argument_bytes=memory.argument_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            collectives=count_collectives(compiled.as_text()),
        )
