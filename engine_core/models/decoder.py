"""The dense decoder-only transformer: Qwen2.5, Qwen3, Llama 3 and Mistral differ only in their `ModelSpec`.

A model is a list of segments, runs of layers of one shape. The layers of a segment share one `Template`; what differs
between them (the sliding window) is data. A segment runs *scanned*, its weights and cache stacked along a leading layer
dimension, or *unrolled* over per-layer arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from engine_core.kv_cache import KVCache
from engine_core.layers.attention import Attention, AttentionInputs, attention_inputs
from engine_core.layers.embedding import VocabTable
from engine_core.layers.linear import Numbers
from engine_core.layers.mlp import SwigluMlp
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
    windows: tuple[int, ...]  # sliding window per layer, 0 is none

    @property
    def num_layers(self) -> int:
        """Layers in the run."""
        return len(self.windows)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, spec: ModelSpec, numbers: Numbers, tp: int) -> None:
        self.input_norm = RMSNorm("input_layernorm.weight", spec.hidden_size, spec.rms_norm_eps)
        self.attention = Attention(spec, numbers, tp)
        self.post_norm = RMSNorm("post_attention_layernorm.weight", spec.hidden_size, spec.rms_norm_eps)
        self.mlp = SwigluMlp(spec.hidden_size, spec.intermediate_size, numbers, tp)

    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array,
        layer: int | jax.Array,
        inputs: AttentionInputs,
        window: int | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """x: [T, D], cache: [L, num_pages, *page_shape] -> the same, updated."""
        attended, cache = self.attention(self.input_norm(x), cache, layer, inputs, window)
        x = x + attended
        return x + self.mlp(self.post_norm(x)), cache


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
        layer: template of `DecoderLayer`; checkpoint names are relative to `model.layers.<index>.`.
        segments: see `Segment`; dense models have one.
        scan: whether segments are scanned (stacked params and cache) or unrolled.

    Raises:
        ConfigError: `tp` does not divide the model.
    """

    def __init__(self, spec: ModelSpec, numbers: Numbers, *, tp: int, scan: bool) -> None:
        check_divisible(spec, tp)
        self.spec = spec
        self.numbers = numbers
        self.tp = tp
        self.scan = scan
        self.shell = Template(Shell(spec, numbers, tp))
        self.layer = Template(DecoderLayer(spec, numbers, tp))
        self.segments = (Segment(0, spec.sliding_window),)
        self._frequencies = inverse_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)

    def plan(self) -> Params[WeightPlan]:
        """What each leaf of the params holds."""
        segments = []
        for segment in self.segments:
            prefixes = [f"model.layers.{segment.start + layer}." for layer in range(segment.num_layers)]
            groups = [prefixes] if self.scan else [[prefix] for prefix in prefixes]
            segments.append(
                tuple(tuple(plan_weight(spec, group, self.scan) for spec in self.layer.params) for group in groups)
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
        shared = attention_inputs(inputs, self._frequencies, page_size, num_pages)
        shell = self.shell.bind(params.shell)
        x = shell.embedding.embed(tokens)
        layers: list[jax.Array] = []
        for index, (segment, leaves) in enumerate(zip(self.segments, params.segments, strict=True)):
            if self.scan:
                x, stacked = self._scan(segment, leaves[0], x, cache.layers[index], shared)
                layers.append(stacked)
            else:
                arrays = cache.layers[segment.start : segment.start + segment.num_layers]
                x, updated = self._unroll(segment, leaves, x, arrays, shared)
                layers.extend(updated)
        return shell.logits(x[inputs.logits_rows]), replace(cache, layers=tuple(layers))

    def _unroll(
        self,
        segment: Segment,
        leaves: tuple[Leaves, ...],
        x: jax.Array,
        caches: tuple[jax.Array, ...],
        inputs: AttentionInputs,
    ) -> tuple[jax.Array, list[jax.Array]]:
        updated = []
        for weights, cache, window in zip(leaves, caches, segment.windows, strict=True):
            x, written = self.layer.bind(weights)(x, cache[None], 0, inputs, window)
            updated.append(written[0])
        return x, updated

    def _scan(
        self, segment: Segment, leaves: Leaves, x: jax.Array, cache: jax.Array, inputs: AttentionInputs
    ) -> tuple[jax.Array, jax.Array]:
        same = len(set(segment.windows)) == 1

        def body(
            carry: tuple[jax.Array, jax.Array], layer: tuple[jax.Array, jax.Array, Leaves]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            index, window, weights = layer
            return self.layer.bind(weights)(*carry, index, inputs, segment.windows[0] if same else window), None

        indices = jnp.arange(segment.num_layers, dtype=jnp.int32)
        windows = jnp.array(segment.windows, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (indices, windows, leaves))
        return x, cache
