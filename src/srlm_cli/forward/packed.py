"""Forward passes of a causal LM over many sequences without padding, if its layers allow it."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch

from srlm_cli import threads
from srlm_cli.forward import cpu
from srlm_cli.forward.attention import Pass, Prefill, Unsupported, attention_context
from srlm_cli.forward.kv_cache import PagedKVCache, Span
from srlm_cli.forward.paged_attention import Decode
from srlm_cli.forward.parallel_passes import THREADS, Progress, in_parallel
from srlm_cli.forward.prefix import CachedPrefix, passes

PLAIN_LAYERS = {"full_attention", "sliding_attention"}
# A pass with more tokens does not fit in the CPU cache; one with fewer reads all weights for less work.
TOKENS_A_PASS = {"cpu": 512}
ROUNDINGS = 8  # random changes, of which the largest effect is the limit
# Rotary embeddings that depend on the longest sequence of the batch: a sequence would depend on the others.
SHIFTING_ROPES = {"dynamic", "longrope"}


class PackedModel:
    """The forward passes of a model over packed tokens.

    `layers` has the shapes of a token's key and value per attention layer, and `stored` their dtype in the cache; both
    are known after `fits`.
    """

    def __init__(self, net, device: str) -> None:
        self.net, self.device = net, device
        self.configs = list(
            {id(part.config): part.config for part in net.modules() if hasattr(part, "config")}.values()
        )
        self.layers: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.stored = net.dtype

    def read(self, texts: list[CachedPrefix], cache: PagedKVCache | None = None) -> torch.Tensor:
        """Return the logits after each text, (texts, vocabulary), float32.

        The prefix of a text comes before it, or is kept from an earlier read. A text must be longer than its prefix.
        """
        split = list(passes(texts, TOKENS_A_PASS.get(self.device)))
        if cache is None and len(split) > 1 and torch.get_num_threads() >= THREADS and _type_of(self.net):
            logits = in_parallel(partial(self._read, cache=None), split)
        else:
            logits = [self._read(some, cache=cache) for some in split]
        for text in texts:
            if not text.kept:
                text.keys, text.values = {}, {}
        return torch.cat(logits)

    def _read(
        self, texts: list[CachedPrefix], progress: Progress | None = None, *, cache: PagedKVCache | None
    ) -> torch.Tensor:
        fresh = [text.fresh for text in texts]
        positions = [torch.arange(text.shared, len(text.tokens)) for text in texts]
        ends = torch.tensor([len(tokens) for tokens in fresh]).cumsum(0) - 1
        ids = torch.tensor([token for tokens in fresh for token in tokens])
        if cache and self.compiled:
            run = _compiled().CompiledPrefill(texts, cache)
        else:
            run = Prefill(texts, cache, progress)
        return self._forward(run, ids, torch.cat(positions), ends.to(self.device))

    def step(
        self,
        tokens: list[int],
        cache: PagedKVCache,
        own: list[Span],
        shared: list[Span],
        common: CachedPrefix | None,
        members: list[int],
    ) -> torch.Tensor:
        """Return the logits after one new token per sequence, (sequences, vocabulary), float32.

        A sequence sees the shared spans that have it in `rows`, and its own span, which includes the new token; `own`
        has one span per sequence, in order. `members` are the sequences that start with the common text.
        """
        seen = (cache, own, shared, common, members)
        step = _compiled().CompiledDecode(*seen) if self.compiled else Decode(*seen, self.device)
        return self._forward(step, torch.tensor(tokens), step.positions, 0)

    def _forward(self, run: Pass, ids: torch.Tensor, positions: torch.Tensor, keep) -> torch.Tensor:
        ids, positions = ids.to(self.device)[None], positions.to(self.device)[None]
        with attention_context(run, self.configs):
            output = self.net(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        return output.logits[0].float()

    @property
    def compiled(self) -> bool:
        """Whether compiled code reads the keys and values in blocks, also those of the common text."""
        return cpu.available() and _compiled().fits(self.layers, self.stored, self.device)

    def token_bytes(self) -> int:
        """Return the size of the keys and values of one token in bytes."""
        numbers = sum(key.numel() + value.numel() for key, value in self.layers.values())
        return numbers * self.stored.itemsize

    # --- does it fit? ------------------------------------------------------------------------

    def fits(self, *, paged: bool = True) -> bool:
        """Return whether packed passes give the same logits as the model, by a test on a few tokens.

        `paged` also tests keys and values in pages, as in decoding.
        """
        config = self.net.config.get_text_config()
        if not set(getattr(config, "layer_types", None) or ()) <= PLAIN_LAYERS or _ropes(config) & SHIFTING_ROPES:
            return False
        try:
            return self._tried(paged)
        except (Unsupported, TypeError, AttributeError, ValueError, KeyError, IndexError, RuntimeError):
            return False  # an unusual layer can raise any of these; `generate` works without packing

    def _tried(self, paged: bool) -> bool:
        config = self.net.config.get_text_config()
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (14,), generator=draw).tolist()
        first = CachedPrefix(ids[:9], kept=True)
        second = CachedPrefix([*ids[:5], *ids[9:13]], first, 5)
        rows = [first.tokens, second.tokens, [*ids[:8], *ids[13:]]][: 3 if paged else 2]
        wanted = self.net(input_ids=torch.tensor(rows, device=self.device), use_cache=False).logits[:, -1].float()
        packed = self.read([first, second])
        self.layers = {
            layer: tuple(
                torch.Size((part.shape[0], part.shape[2])) for part in (first.keys[layer], first.values[layer])
            )
            for layer in first.keys
        }
        if len(self.layers) != config.num_hidden_layers:
            return False
        if not paged:
            return self._alike(packed, wanted, rows[:2])
        half = _type_of(self.net)
        if half and _compiled().fits(self.layers, half, self.device):
            self.stored = half
        alike = self._alike(torch.cat([packed, self._in_blocks(ids)]), wanted, rows)
        if alike and half and self.compiled:
            from srlm_cli.forward.cpu import decoder_layer

            decoder_layer.use_in(self.net, lambda: self._in_blocks(ids))
        return alike

    def _alike(self, ours: torch.Tensor, theirs: torch.Tensor, rows: list[list[int]]) -> bool:
        """Return whether logits of the rows differ by rounding only."""
        away = float(_away(ours, theirs).max())
        if self.stored in (torch.float32, torch.float64):
            return away < 1e-3
        return away < 0.1 or away < self._rounding(theirs, rows)

    def _rounding(self, logits: torch.Tensor, rows: list[list[int]]) -> float:
        """Return how far the logits of the rows move when each embedding changes by one rounding of 16 bits.

        Some trained models move further than the limit that is right for most.
        """
        embedded = self.net.get_input_embeddings()(torch.tensor(rows, device=self.device))
        draw = torch.Generator().manual_seed(0)
        moved = []
        for _ in range(ROUNDINGS):
            factors = 1 + torch.finfo(self.stored).eps / 2 * torch.randn(embedded.shape, generator=draw)
            changed = (embedded.float() * factors.to(self.device)).to(embedded.dtype)
            found = self.net(inputs_embeds=changed, use_cache=False).logits[:, -1].float()
            moved.append(float(_away(found, logits).max()))
        return max(moved)

    def _in_blocks(self, ids: list[int]) -> torch.Tensor:
        """Return the logits after the last token, which sees the first eight in blocks."""
        cache = PagedKVCache(self.layers, 3, self.stored, self.device)
        block = cache.allocate(1, shared=True)
        self.read([CachedPrefix(ids[:8], blocks=block)], cache)
        own = Span(cache.allocate(1), 1, 8, [0])
        return self.step(ids[13:], cache, [own], [Span(block, 8, 0, [0])], None, [])


def _compiled() -> ModuleType:
    """Return the passes by compiled code; imported late, with numba, which a training does not need."""
    from srlm_cli.forward.cpu import paged_attention

    return paged_attention


def _type_of(net) -> torch.dtype | None:
    """Return the 16-bit type in which compiled code multiplies in a model, None if PyTorch multiplies."""
    if not cpu.available():
        return None
    from srlm_cli.forward.cpu import linear

    return linear.type_of(net)


def lay_by_input(net) -> None:
    """Store the weights of a model's linear layers by input instead of by output; shapes and results do not change.

    On a CPU this makes products with a few dozen rows faster.
    """
    head = net.get_output_embeddings()
    with threads.few(size(net)):
        for layer in net.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not head:
                layer.weight.data = layer.weight.data.t().contiguous().t()


def size(net) -> int:
    """Return the bytes of a model's weights."""
    return sum(weight.nbytes for weight in net.parameters())


def _ropes(config) -> set[str]:
    """Return the types of rotary embedding in a configuration, of the model or by type of layer."""
    named = getattr(config, "rope_parameters", None) or {}
    return {part["rope_type"] for part in (named, *named.values()) if isinstance(part, dict) and "rope_type" in part}


def _away(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the distances of logits, (rows, vocabulary), relative to their spread: (rows,)."""
    return (ours - theirs).norm(dim=-1) / (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)
