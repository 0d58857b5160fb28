"""One model replica on its devices: parameters, cache, slots, and the compiled steps over them.

Everything here is called from one thread, the engine thread of a worker. `dispatch` returns at once; reading a
`PendingStep` waits. Device order is dispatch order, so a page gathered behind a step holds what that step wrote, and a
page given to a new owner is written only by steps dispatched after that.

Where the replica spans several hosts, the engine of the first tells those of the others every device call before it
makes it; arrays given to a call are the same on all hosts, those that come back are whole on each, but for KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from engine_core.compile_counter import CompileCounter
from engine_core.config import EngineConfig
from engine_core.host_commands import PIECE_BYTES, Export, Followers, Gather, InitSlot, KvPiece, RunStep, Scatter
from engine_core.kv_cache import create_cache, gather_pages, scatter_pages
from engine_core.kv_shards import KvShards, local_parts
from engine_core.layers.linear import Numbers
from engine_core.layers.moe import choose_experts
from engine_core.mesh import by_rows, make_mesh, replica_devices
from engine_core.models.decoder import Decoder
from engine_core.resolve import ResolvedEngine
from engine_core.sampling import init_slot
from engine_core.step import build_step
from engine_core.step_io import SlotState, StepInputs, StepOutput
from engine_core.types import TokenLogprobs
from engine_core.weights import load_params

TRANSFER_LADDER = (64, 16, 4, 1)  # pages per gather or scatter call; any count is a sum of these


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A dispatched step whose results are still on the device."""

    output: StepOutput

    def start_copy(self) -> None:
        """Begin the device-to-host copy of the sampled tokens."""
        self.output.tokens.copy_to_host_async()

    def is_ready(self) -> bool:
        """Whether the device has finished the step."""
        return _is_ready(self.output.tokens)

    def tokens(self) -> list[int]:
        """Sampled token of each sequence row, -1 where its logits are not finite; waits for the device."""
        result: list[int] = np.asarray(self.output.tokens).tolist()
        return result

    def logprobs(self, row: int, num_top: int) -> TokenLogprobs:
        """Log probabilities of one row, `num_top` alternatives."""
        ids = np.asarray(self.output.top_ids)[row, :num_top].tolist()
        values = np.asarray(self.output.top_logprobs)[row, :num_top].tolist()
        return TokenLogprobs(float(np.asarray(self.output.logprobs)[row]), tuple(ids), tuple(values))


class Engine:
    """Weights, cache and compiled functions of one replica.

    Args:
        config: what the user asked for.
        resolved: what that means for this checkpoint and these devices.
        numbers: how to compute.
        model_dir: the checkpoint.
        progress: told a short sentence while weights load and buckets compile.
        followers: the other hosts, where this is the first of several; begun, not yet waited for.

    Attributes:
        shards: KV heads by host; None where there is one host.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedEngine,
        numbers: Numbers,
        model_dir: Path,
        progress: Callable[[str], None],
        followers: Followers | None,
    ) -> None:
        self.resolved = resolved
        self._followers = followers
        self._compiles = CompileCounter()
        devices = replica_devices(config.degrees)
        mesh = make_mesh(config.degrees, devices)
        experts = choose_experts(config.model.experts, numbers.compute, devices[0].platform)
        model = Decoder(resolved.spec, numbers, degrees=config.degrees, experts=experts, scan=resolved.stacked)
        self._params = load_params(model_dir, model, mesh, _share_reporter(progress))
        self._step = build_step(model, mesh)
        self._cache = create_cache(resolved.layout, mesh, stacked=resolved.stacked)
        self._slots = create_slots(resolved.num_slots, resolved.spec.vocab_size, mesh)
        spans = jax.process_count() > 1
        self.shards = KvShards.of(mesh, resolved.layout.num_kv_heads) if spans else None
        self._gather = jax.jit(gather_pages, out_shardings=self.shards.sharding if self.shards else None)
        self._scatter = jax.jit(scatter_pages, donate_argnums=0)
        self._init_slot = jax.jit(init_slot, donate_argnums=0)

    def dispatch(self, inputs: StepInputs) -> PendingStep:
        """Queue one step on the device."""
        if self._followers is not None:
            leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(inputs))
            self._followers.send(RunStep(len(inputs.tokens), len(inputs.kv_lens), leaves))
        self._cache, self._slots, output = self._step(self._params, self._cache, self._slots, inputs)
        return PendingStep(output)

    def init_slot(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the token counts of a slot whose request uses penalties."""
        if self._followers is not None:
            self._followers.send(InitSlot(slot, tuple(prompt_ids), tuple(output_ids)))
        size, vocab = self.resolved.max_model_len, self.resolved.spec.vocab_size
        prompt = np.full(size, vocab, np.int32)
        prompt[: len(prompt_ids)] = prompt_ids
        output = np.full(size, vocab, np.int32)
        output[: len(output_ids)] = output_ids
        self._slots = self._init_slot(self._slots, np.int32(slot), prompt, output)

    def gather(self, pages: Sequence[int], export: Export | None = None) -> PendingPages:
        """Queue the copy of pages off the device, as they are after all steps dispatched so far.

        Args:
            pages: their ids.
            export: names the copy to the other hosts, each of which hands its own part over.
        """
        if self._followers is not None:
            self._followers.send(Gather(tuple(pages), export))
        pieces = []
        at = 0
        for size in _ladder(len(pages)):
            layers = self._gather(self._cache, np.asarray(pages[at : at + size], np.int32))
            parts = tuple(local_parts(layer) if self.shards else (layer,) for layer in layers)
            for part in (part for layer in parts for part in layer):
                part.copy_to_host_async()
            pieces.append(parts)
            at += size
        return PendingPages(pieces)

    def scatter(self, pages: Sequence[int], layers: Sequence[np.ndarray]) -> None:
        """Queue the write of landed pages.

        Args:
            pages: n page ids.
            layers: per layer `[n, page_size, 2K, H]`; they must not be changed afterwards, the device may alias them.
        """
        at = 0
        for size in _ladder(len(pages)):
            ids = list(pages[at : at + size])
            part = tuple(layer[at : at + size] for layer in layers)
            if self._followers is not None:
                self._send_pages(ids, part)
            self._write(ids, part, 0)
            at += size

    def scatter_own(self, pages: Sequence[int], layers: Sequence[np.ndarray]) -> None:
        """One of the leader's calls of `scatter`: as many pages as one call takes, and only the heads held here."""
        assert self.shards is not None
        self._write(pages, layers, self.shards.own.first)

    def scatter_nothing(self, pages: Sequence[int]) -> None:
        """`scatter_own` of zeros, on all hosts: compiles it."""
        if self._followers is not None:
            self._followers.send(Scatter(tuple(pages)))
        self._write(pages, self.resolved.layout.empty_pages(len(pages)), 0)

    def _write(self, pages: Sequence[int], layers: Sequence[np.ndarray], first_head: int) -> None:
        part: tuple[Any, ...] = tuple(layers)
        if self.shards is not None:
            part = self.shards.assemble(part, first_head, self.resolved.layout.num_kv_heads)
        self._cache = self._scatter(self._cache, np.asarray(pages, np.int32), part)

    def _send_pages(self, ids: list[int], layers: tuple[np.ndarray, ...]) -> None:
        """Give each of the other hosts the KV heads that it holds."""
        assert self._followers is not None and self.shards is not None
        for layer in layers:
            heads = [layer[:, :, 2 * own.first : 2 * (own.first + own.count)] for own in self.shards.held[1:]]
            contents = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in heads]
            for start in range(0, max(map(len, contents)), PIECE_BYTES):
                pieces = [KvPiece(content[start : start + PIECE_BYTES].tobytes()) for content in contents]
                self._followers.send_each(pieces)
        self._followers.send(Scatter(tuple(ids)))

    def warm_up(self, inputs: Sequence[tuple[str, StepInputs]], progress: Callable[[str], None]) -> None:
        """Compile and run every bucket once, so that nothing compiles later.

        Args:
            inputs: a name and neutral inputs (padding only) for each bucket.
            progress: told which one is compiling.
        """
        total = len(inputs)
        for i, (name, bucket) in enumerate(inputs):
            progress(f"compiling {i + 1}/{total}: {name}")
            self.dispatch(bucket).tokens()
        nowhere = self.resolved.layout.num_pages
        for size in TRANSFER_LADDER:
            self.gather([nowhere] * size).wait()
            self.scatter_nothing([nowhere] * size)
        self.init_slot(0, (), ())
        jax.block_until_ready(self._cache)
        self._compiles.start()

    @property
    def compiles_after_warmup(self) -> int:
        """Must stay 0: anything else is a bucket that warm-up forgot."""
        return self._compiles.count


@dataclass(frozen=True, slots=True)
class PendingPages:
    """Pages on their way to the host: for each piece of them and each layer, its heads in one or several parts."""

    pieces: list[tuple[tuple[jax.Array, ...], ...]]

    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""
        return all(_is_ready(part) for layers in self.pieces for layer in layers for part in layer)

    def wait(self) -> list[np.ndarray]:
        """Per layer `[n, page_size, 2K, H]`, in the order of the page ids asked for; K: the KV heads held here."""
        pieces = [[_joined(layer, axis=2) for layer in layers] for layers in self.pieces]
        return [_joined(column, axis=0) for column in zip(*pieces, strict=True)]


def create_slots(num_slots: int, vocab_size: int, mesh: Mesh) -> SlotState:
    """Slots that hold nothing, placed as a step returns them: other placements would compile every bucket twice."""
    place = by_rows(mesh)
    return SlotState(
        last_tokens=jnp.zeros(num_slots, jnp.int32, device=place),
        output_counts=jnp.zeros((num_slots, vocab_size), jnp.int32, device=place),
        in_prompt=jnp.zeros((num_slots, vocab_size), jnp.bool_, device=place),
    )


def _joined(parts: Sequence[Any], axis: int) -> np.ndarray:
    return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate([np.asarray(part) for part in parts], axis)


def _is_ready(array: Any) -> bool:
    """`jax.Array.is_ready`, which the type stubs lack."""
    return bool(array.is_ready())


def _share_reporter(progress: Callable[[str], None]) -> Callable[[int, int], None]:
    """Turns (bytes done, bytes in all) into a sentence at every tenth."""
    last = -1

    def report(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // max(total, 1)
        if tenth != last:
            last = tenth
            progress(f"loading weights: {10 * tenth} %")

    return report


def _ladder(count: int) -> list[int]:
    """Sizes from `TRANSFER_LADDER`, largest first, that sum to `count`."""
    sizes = []
    for size in TRANSFER_LADDER:
        sizes += [size] * (count // size)
        count %= size
    return sizes
