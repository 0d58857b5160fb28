"""The decoder-only transformer: Qwen2.5, Qwen3, Llama 3, Mistral, Qwen3-MoE and Mixtral differ only in `ModelSpec`.

A model is a list of segments, runs of layers of one shape: a layer has a dense MLP or experts. The layers of a segment
share one `Template`; what differs between them (the sliding window) is data. A segment runs *scanned*, its weights
stacked along a leading layer dimension and the cache over all layers, or *unrolled* over per-layer arrays.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from engine_core.config import Degrees
from engine_core.kv_cache import KVCache
from engine_core.layers.attention import Attention, AttentionInputs, LayerInputs, attention_inputs, local_units
from engine_core.layers.embedding import VocabTable
from engine_core.layers.linear import Numbers
from engine_core.layers.mlp import SwigluMlp
from engine_core.layers.moe import ExpertChoice, MoeMlp
from engine_core.layers.norm import RMSNorm
from engine_core.layers.params import Leaves, Template, WeightPlan, plan_weight
from engine_core.layers.rotary import inverse_frequencies
from engine_core.mesh import check_divisible
from engine_core.models.spec import ModelSpec
from engine_core.step_io import StepInputs

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params(Generic[T]):
    """All weights as plain leaves (or, with another T, something about each); `Decoder.plan` says what each one is."""

    shell: tuple[T, ...]
    segments: tuple[tuple[tuple[T, ...], ...], ...]  # per segment: one tuple per layer, or one of `[L_seg, ...]` stacks


@dataclass(frozen=True)
class Segment:
    """A run of layers of one shape."""

    start: int  # index of its first layer
    moe: bool  # its layers have experts
    windows: tuple[int, ...]  # sliding window per layer, 0 is none

    @property
    def num_layers(self) -> int:
        """Layers in the run."""
        return len(self.windows)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, spec: ModelSpec, numbers: Numbers, degrees: Degrees, experts: ExpertChoice, *, moe: bool
    ) -> None:
        self.input_norm = RMSNorm("input_layernorm.weight", spec.hidden_size, spec.rms_norm_eps)
        self.attention = Attention(spec, numbers, degrees.tp)
        self.post_norm = RMSNorm("post_attention_layernorm.weight", spec.hidden_size, spec.rms_norm_eps)
        self.mlp: SwigluMlp | MoeMlp
        if moe:
            assert spec.moe is not None
            self.mlp = MoeMlp(spec.moe, spec.hidden_size, numbers, degrees, experts)
        else:
            self.mlp = SwigluMlp(spec.hidden_size, spec.intermediate_size, numbers, degrees.tp)

    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array,
        layer: int | jax.Array,
        inputs: LayerInputs,
        window: int | jax.Array,
        valid: jax.Array,
        place: int | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """x: [T, D], cache: [L, num_pages, *page_shape] -> the same, updated.

        Args:
            layer: place in the cache.
            valid: [T] bool, false in padding.
            place: of the layer among those whose experts its weights hold; see `MoeMlp`.
        """
        attended, cache = self.attention(self.input_norm(x), cache, layer, inputs, window)
        x = x + attended
        normed = self.post_norm(x)
        mixed = self.mlp(normed, valid, place) if isinstance(self.mlp, MoeMlp) else self.mlp(normed)
        return x + mixed, cache


class Shell(nnx.Module):
    """What surrounds the layers: embedding, final norm, logits head (None where it is the embedding)."""

    def __init__(self, spec: ModelSpec, numbers: Numbers, tp: int) -> None:
        size = (spec.vocab_size, spec.hidden_size)
        self.embedding = VocabTable("model.embed_tokens.weight", *size, numbers, tp)
        self.final_norm = RMSNorm("model.norm.weight", spec.hidden_size, spec.rms_norm_eps)
        self.head = None if spec.tie_embeddings else VocabTable("lm_head.weight", *size, numbers, tp)

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, D] -> [B, V] f32."""
        return (self.head or self.embedding).logits(self.final_norm(x))


class Decoder:
    """A model's structure, without its weights: what `load_params` fills and `build_step` runs.

    Attributes:
        shell: template of `Shell`; checkpoint names are absolute.
        layers: template of `DecoderLayer` for each segment; checkpoint names are relative to `model.layers.<index>.`.
        segments: see `Segment`.
        scan: whether segments are scanned (params stacked per segment, the cache over all layers) or unrolled.

    Raises:
        ConfigError: a degree does not divide the model.
    """

    def __init__(
        self, spec: ModelSpec, numbers: Numbers, *, degrees: Degrees, experts: ExpertChoice, scan: bool
    ) -> None:
        check_divisible(spec, degrees)
        self.spec = spec
        self.numbers = numbers
        self.degrees = degrees
        self.experts = experts
        self.scan = scan
        self.shell = Template(Shell(spec, numbers, degrees.tp))
        self.segments = _segments(spec)
        kinds = {
            moe: Template(DecoderLayer(spec, numbers, degrees, experts, moe=moe))
            for moe in {segment.moe for segment in self.segments}
        }
        self.layers = tuple(kinds[segment.moe] for segment in self.segments)
        self._frequencies = inverse_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)

    def plan(self) -> Params[WeightPlan]:
        """What each leaf of the params holds."""
        segments = []
        for segment, layer in zip(self.segments, self.layers, strict=True):
            prefixes = [f"model.layers.{segment.start + i}." for i in range(segment.num_layers)]
            groups = [prefixes] if self.scan else [[prefix] for prefix in prefixes]
            segments.append(
                tuple(tuple(plan_weight(spec, group, self.scan) for spec in layer.params) for group in groups)
            )
        shell = tuple(plan_weight(spec, [""], False) for spec in self.shell.params)
        return Params(shell=shell, segments=tuple(segments))

    def forward(
        self, params: Params[jax.Array], cache: KVCache, tokens: jax.Array, inputs: StepInputs
    ) -> tuple[jax.Array, KVCache]:
        """One pass over a step's tokens.

        Args:
            params: this device's shards.
            cache: this device's KV heads; updated in place where the caller donates it.
            tokens: [T] i32.
            inputs: the step's, of which `tokens` and `token_slots` are not used.

        Returns:
            ([B, V] f32 logits of `inputs.logits_rows`, cache).
        """
        num_pages, page_size = cache.layers[0].shape[1:3] if self.scan else cache.layers[0].shape[:2]
        units = None
        if self.spec.kv_scales is not None and cache.layers[0].dtype.itemsize == 1:
            units = local_units(self.spec.kv_scales, self.degrees.tp)
        shared = attention_inputs(inputs, self._frequencies, page_size, num_pages, units)
        valid = inputs.rows < inputs.kv_lens.shape[0]
        shell = self.shell.bind(params.shell)
        x = shell.embedding.embed(tokens)
        if self.scan:
            x, layers = self._scan(params, x, cache.layers[0], shared, valid)
        else:
            x, layers = self._unroll(params, x, cache.layers, shared, valid)
        return shell.logits(x[inputs.logits_rows]), replace(cache, layers=layers)

    def _unroll(
        self,
        params: Params[jax.Array],
        x: jax.Array,
        caches: tuple[jax.Array, ...],
        inputs: AttentionInputs,
        valid: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        updated = []
        for segment, layer, leaves in zip(self.segments, self.layers, params.segments, strict=True):
            numbers = range(segment.start, segment.start + segment.num_layers)
            for weights, number, window in zip(leaves, numbers, segment.windows, strict=True):
                own = inputs.of_layer(number)
                x, written = layer.bind(weights)(x, caches[number][None], 0, own, window, valid, 0)
                updated.append(written[0])
        return x, tuple(updated)

    def _scan(
        self, params: Params[jax.Array], x: jax.Array, cache: jax.Array, inputs: AttentionInputs, valid: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        carry = (x, cache)
        for segment, layer, leaves in zip(self.segments, self.layers, params.segments, strict=True):
            carry = _scan_segment(segment, layer, leaves[0], carry, inputs, valid)
        x, cache = carry
        return x, (cache,)


def _scan_segment(
    segment: Segment,
    layer: Template[DecoderLayer],
    leaves: Leaves,
    carry: tuple[jax.Array, jax.Array],
    inputs: AttentionInputs,
    valid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run a segment's layers over (x, cache of all layers `[L, num_pages, *page_shape]`).

    Experts are not scanned but taken from the stack of all layers' by the kernels: a kernel's operand that is a slice
    is copied first, so that the bytes of all experts would move three times instead of those chosen once.
    """
    same = len(set(segment.windows)) == 1
    whole = {i: leaf.reshape(-1, *leaf.shape[2:]) for i, leaf in enumerate(leaves) if layer.params[i].stack}

    def body(
        carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, jax.Array, dict[int, jax.Array]]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        place, window, own = scanned
        by_number = own | whole
        weights = [by_number[i] for i in range(len(leaves))]
        index = segment.start + place
        width = segment.windows[0] if same else window
        return layer.bind(weights)(*carry, index, inputs.of_layer(index), width, valid, place), None

    places = jnp.arange(segment.num_layers, dtype=jnp.int32)
    windows = jnp.array(segment.windows, dtype=jnp.int32)
    sliced = {i: leaf for i, leaf in enumerate(leaves) if i not in whole}
    result, _ = jax.lax.scan(body, carry, (places, windows, sliced))
    return result


def _segments(spec: ModelSpec) -> tuple[Segment, ...]:
    """Runs of layers that are all dense or all have experts."""
    kinds = (False,) * spec.num_layers if spec.moe is None else spec.moe.layers
    segments = []
    start = 0
    for moe, run in itertools.groupby(kinds):
        end = start + len(list(run))
        segments.append(Segment(start, moe, spec.sliding_window[start:end]))
        start = end
    return tuple(segments)
