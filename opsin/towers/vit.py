"""The one configurable vision transformer (arXiv:2010.11929 and its descendants)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Activation, Kernels
from opsin.kernels.memory import give_back_freed
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import NormKind, norm
from opsin.nn.rope import RopePairs


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """A vision transformer's shape.

    `patch_dim` is channels * (frames *) height * width of a patch, flattened in that order.
    `positions` is the number of rows of a learned position table, 0 for none. `layer_scale`
    multiplies what each block returns by a learned vector (arXiv:2103.17239); `qk_norm` normalises
    queries and keys over all heads together. Without `key_bias`, `qkv_bias` is for queries and
    values alone. `windowed` names the
    layers whose attention stays inside the layout's windows. `layers` counts the layers that run: a
    family whose features come from an earlier layer states fewer and ignores the rest.
    """

    patch_dim: int
    hidden: int
    layers: int
    heads: int
    mlp_hidden: int
    activation: Activation = "gelu"
    norm: NormKind = "layer"
    norm_eps: float = 1e-6
    gated_mlp: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    key_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    positions: int = 0
    class_token: bool = False
    class_token_last: bool = False
    rope_pairs: RopePairs = "half"
    pre_norm: bool = False
    post_norm: bool = False
    layer_scale: bool = False
    qk_norm: NormKind | None = None
    windowed: frozenset[int] = frozenset()


# Most patches that go through the layers together, one run at least: fewer take less memory. What
# is packed gains nothing from more; oneDNN lays other matrices out anew for each product, which
# with groups of 1024 took a third of a tower's time.
GROUP_PATCHES, PACKED_GROUP_PATCHES = 2048, 1024
LARGE_BYTES = 1 << 20  # of features, between which many times as much is needed


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """How the patches of one call lie together.

    `lengths` are the runs of patches that attend to each other (one a picture or frame), `windows`
    the shorter runs of windowed layers. `position_embeds` (patches, hidden) is added to the
    patches, `angles` are rope's cos and sin, each (patches, head_dim / 2). `bias`, for runs of one
    length, is added to the scores of every layer: (runs, 1, 1 or length, length).
    """

    lengths: list[int]
    windows: list[int] = field(default_factory=list)
    position_embeds: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


@dataclass(slots=True)
class _State:
    """A group of patches between two layers, what they need of its layout, and what was tapped."""

    x: Tensor
    lengths: list[int]
    windows: list[int]
    angles: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    tapped: dict[int, Tensor]


class VisionMLP(nn.Module):
    """Two layers with an activation between, or gated."""

    def __init__(self, kernels: Kernels, config: ViTConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden = config.mlp_hidden
        widths = (hidden, hidden) if config.gated_mlp else hidden
        self.up = Linear(kernels, config.hidden, widths, bias=config.mlp_bias)
        self.down = Linear(kernels, hidden, config.hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (patches, hidden) to the same shape."""
        if not self.config.gated_mlp:
            return self.down(self.up.activated(x, self.config.activation))
        return self.down(self.kernels.gated(self.up(x), self.config.activation))


class KeylessBias(Linear):
    """Queries, keys and values of which the keys have no bias.

    The stored bias is the queries' and the values'; `finish_loading` puts zeros between.
    """

    def __init__(
        self, kernels: Kernels, in_features: int, widths: tuple[int, ...], *, bias: bool
    ) -> None:
        super().__init__(kernels, in_features, widths, bias=bias)
        if bias:
            shape = (widths[0] + widths[2],)
            self.bias = nn.Parameter(torch.empty(shape), requires_grad=False)

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """As of any fused layer, but the bias has two parts, 0 and 2."""
        if name != "bias":
            return super().part(name, index)
        queries = self.splits[0]
        bias = self.get_parameter(name).data
        return bias[:queries] if index[0] == 0 else bias[queries:]

    def finish_loading(self) -> None:
        """Make the bias as long as the output."""
        if self.bias is not None:
            queries, keys, _ = self.splits
            stored = self.bias.data
            parts = (stored[:queries], stored.new_zeros(keys), stored[queries:])
            self.bias.data = torch.cat(parts)


class VisionAttention(nn.Module):
    """Bidirectional attention inside runs of patches."""

    def __init__(self, kernels: Kernels, config: ViTConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.heads = config.heads
        self.scale = (config.hidden // config.heads) ** -0.5
        self.pairs: RopePairs = config.rope_pairs
        widths = (config.hidden,) * 3
        kind = Linear if config.key_bias else KeylessBias
        self.qkv = kind(kernels, config.hidden, widths, bias=config.qkv_bias)
        self.out = Linear(kernels, config.hidden, config.hidden, bias=config.out_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm is not None:
            self.q_norm = norm(kernels, config.qk_norm, config.hidden, config.norm_eps)
            self.k_norm = norm(kernels, config.qk_norm, config.hidden, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        lengths: list[int],
        angles: tuple[Tensor, Tensor] | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (patches, hidden) to the same shape."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.q_norm(query), self.k_norm(key), value)
        )
        if angles is not None:
            query = self.kernels.rope(query, *angles, self.pairs)
            key = self.kernels.rope(key, *angles, self.pairs)
        attended = self.kernels.dense_attention(
            query, key, value, lengths, scale=self.scale, bias=bias
        )
        return self.out(attended.flatten(1))


class Scale(nn.Module):
    """A learned factor for each feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) to the same shape."""
        return x * self.weight


class VisionLayer(nn.Module):
    """Attention and MLP, each behind a norm and added."""

    def __init__(self, kernels: Kernels, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = norm(kernels, config.norm, config.hidden, config.norm_eps)
        self.attention = VisionAttention(kernels, config)
        self.mlp_norm = norm(kernels, config.norm, config.hidden, config.norm_eps)
        self.mlp = VisionMLP(kernels, config)
        self.attention_scale: nn.Module = nn.Identity()
        self.mlp_scale: nn.Module = nn.Identity()
        if config.layer_scale:
            self.attention_scale = Scale(config.hidden)
            self.mlp_scale = Scale(config.hidden)

    def forward(
        self,
        x: Tensor,
        lengths: list[int],
        angles: tuple[Tensor, Tensor] | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (patches, hidden) to the same shape."""
        attended = self.attention(self.attention_norm(x), lengths, angles, bias)
        x = x + self.attention_scale(attended)
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class VisionTransformer(nn.Module):
    """Patches to features, for any number of pictures at once."""

    def __init__(self, kernels: Kernels, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = Linear(kernels, config.patch_dim, config.hidden, bias=config.patch_bias)
        if config.positions:
            self.positions = Embedding(config.positions, config.hidden)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(config.hidden), requires_grad=False)
        hidden, eps = config.hidden, config.norm_eps
        self.pre_norm: nn.Module = nn.Identity()
        if config.pre_norm:
            self.pre_norm = norm(kernels, config.norm, hidden, eps)
        self.layers = nn.ModuleList(VisionLayer(kernels, config) for _ in range(config.layers))
        self.post_norm: nn.Module = nn.Identity()
        if config.post_norm:
            self.post_norm = norm(kernels, config.norm, hidden, eps)

    def forward(
        self, patches: Tensor, layout: VisionLayout, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """patches (patches, patch_dim) to features (patches, hidden), and those after layers
        `taps` (-1: before the first).

        With a class token, each run of the result starts (or ends) with it and is one longer than
        the layout's; position embeddings and angles count it. Runs that only see themselves go
        through a few at a time, which bounds the memory within the layers.
        """
        groups = self._groups(layout, len(patches))
        return self.in_groups(((patches[rows], part) for rows, part in groups), taps)

    def in_groups(
        self,
        groups: Iterable[tuple[Tensor, VisionLayout]],
        taps: tuple[int, ...] = (),
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, of patches and layouts of groups that come one after another.

        What `then` makes of a group's features, fewer as a rule, is what is kept of them. Where
        weights lie in a file, all groups go through a layer before the next one, so that each
        weight is in memory for its own layer only.
        """
        if any(m.mapped is not None for m in self.layers.modules() if isinstance(m, Linear)):
            features, tapped = self._through([self._enter(*group) for group in groups], taps)
            return features if then is None else then(features), tapped
        parts = []
        for group in groups:
            features, tapped = self._through([self._enter(*group)], taps)
            parts.append((features if then is None else then(features), tapped))
            _give_back(features)
        if len(parts) == 1:
            return parts[0]
        tapped = [torch.cat(same) for same in zip(*(taps for _, taps in parts), strict=True)]
        return torch.cat([features for features, _ in parts]), tapped

    def _through(self, states: list[_State], taps: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Groups through all layers, side by side."""
        for i, layer in enumerate(self.layers):
            for state in states:
                inside = state.windows if i in self.config.windowed else state.lengths
                state.x = layer(state.x, inside, state.angles, state.bias)
                if i in taps:
                    state.tapped[i] = state.x
            if len(states) > 1:
                _release(layer)
                _give_back(states[0].x)
        parts = [self.post_norm(state.x) for state in states]
        if len(states) == 1:
            return parts[0], [states[0].tapped[i] for i in taps]
        return torch.cat(parts), [torch.cat([state.tapped[i] for state in states]) for i in taps]

    @property
    def group_patches(self) -> int:
        """Most patches that go through the layers together, where runs are no longer."""
        matrices = [m for m in self.layers[:1].modules() if isinstance(m, Linear)]
        packed = all(matrix.packed is not None for matrix in matrices)
        return PACKED_GROUP_PATCHES if packed else GROUP_PATCHES

    def _groups(
        self, layout: VisionLayout, num_patches: int
    ) -> Iterator[tuple[slice, VisionLayout]]:
        """The patches and layout of each group of runs; all at once where runs depend."""
        if num_patches <= self.group_patches or self.config.windowed or layout.bias is not None:
            yield slice(None), layout
            return
        most = self.group_patches
        extra = int(self.config.class_token)
        first = start = 0  # the group's first run, and its first patch
        end = 0
        for i, length in enumerate(layout.lengths):
            end += length
            following = layout.lengths[i + 1 : i + 2]
            if following and end - start + following[0] <= most:
                continue
            rows = slice(start + first * extra, end + (i + 1) * extra)
            embeds, angles = layout.position_embeds, layout.angles
            yield (
                slice(start, end),
                VisionLayout(
                    layout.lengths[first : i + 1],
                    position_embeds=None if embeds is None else embeds[rows],
                    angles=None if angles is None else (angles[0][rows], angles[1][rows]),
                ),
            )
            first, start = i + 1, end

    def _enter(self, patches: Tensor, layout: VisionLayout) -> _State:
        """A group of patches as it enters the first layer."""
        x = self.patch(patches.to(self.patch.weight.dtype))
        lengths = layout.lengths
        if self.config.class_token:
            token, last = self.class_token[None], self.config.class_token_last
            runs = [(run, token) if last else (token, run) for run in x.split(lengths)]
            x = torch.cat([part for run in runs for part in run])
            lengths = [length + 1 for length in lengths]
        if layout.position_embeds is not None:
            x = x + layout.position_embeds.to(x.dtype)
        x = self.pre_norm(x)
        return _State(x, lengths, layout.windows, layout.angles, layout.bias, {-1: x})


def _release(layer: nn.Module) -> None:
    """Hold no memory for what lies in a file."""
    for module in layer.modules():
        if isinstance(module, Linear):
            module.release()


def _give_back(x: Tensor) -> None:
    """Hold no memory that was needed between features x and those before them.

    The C library rarely finds room for a large tensor where one of the same size was, and would
    hold several times what is in use.
    """
    if x.device.type == "cpu" and x.nbytes >= LARGE_BYTES:
        give_back_freed()


def vision_of(towers: nn.ModuleDict) -> VisionTransformer:
    """The tower that a family named "vision"."""
    tower = towers["vision"]
    assert isinstance(tower, VisionTransformer)
    return tower


def axial_angles(
    coordinates: Tensor, head_dim: int, theta: float, *, staggered: bool = False
) -> tuple[Tensor, Tensor]:
    """Two-dimensional rope: the first half of the frequencies turn by row, the rest by column.

    Both halves have the same frequencies, or, `staggered`, the columns' lie between the rows'.
    coordinates (patches, 2), row and column, to cos and sin, each (patches, head_dim / 2), float32.
    """
    dim = head_dim // 2
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=coordinates.device) / dim
    shift = torch.tensor([[0.0], [1.0 if staggered else 0.0]], device=coordinates.device)
    frequencies = 1.0 / theta ** (exponents + shift / dim)  # (2, dim / 2)
    angles = (coordinates[:, :, None].float() * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def grid_coordinates(height: int, width: int, merge: int = 1) -> Tensor:
    """Row and column of each patch of a grid, (height * width, 2), merge blocks kept together."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack((rows, columns), dim=-1)
    blocks = grid.unflatten(1, (width // merge, merge)).unflatten(0, (height // merge, merge))
    return blocks.transpose(1, 2).reshape(-1, 2)


def resampled_positions(table: Tensor, coordinates: Tensor, height: int, width: int) -> Tensor:
    """A square table of learned positions, resampled bilinearly with its corners kept in place.

    table (side * side, hidden); coordinates (patches, 2) in a grid of height x width. Returns
    (patches, hidden).
    """
    side = int(table.shape[0] ** 0.5)
    extent = torch.tensor([max(height - 1, 1), max(width - 1, 1)], device=table.device)
    source = coordinates.to(table.device).float() * (side - 1) / extent  # (patches, 2)
    low = source.floor().long()
    high = (low + 1).clamp(max=side - 1)
    row_part, column_part = (source - low).unbind(-1)
    corners = (
        (low[:, 0], low[:, 1], (1 - row_part) * (1 - column_part)),
        (low[:, 0], high[:, 1], (1 - row_part) * column_part),
        (high[:, 0], low[:, 1], row_part * (1 - column_part)),
        (high[:, 0], high[:, 1], row_part * column_part),
    )
    return sum(
        (table[row * side + column] * weight[:, None] for row, column, weight in corners),
        start=torch.zeros((), device=table.device),
    )


def smoothed_positions(table: Tensor, height: int, width: int) -> Tensor:
    """A square table of learned positions (side * side, hidden), resampled bilinearly.

    It is smoothed where it shrinks, and its cells, not their middles, keep the corners. Returns
    (height * width, hidden), row by row.
    """
    side = int(table.shape[0] ** 0.5)
    grid = table.float().T.unflatten(1, (side, side))[None]
    resized = F.interpolate(
        grid, (height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].flatten(1).T.to(table)


def bucketed_positions(height: int, width: int, side: int, stepped: bool = False) -> Tensor:
    """Rows of a table of side x side positions for a grid of any size (arXiv:2307.06304).

    Each patch takes the place that its fraction of the way down and across falls in; row by row,
    (height * width,). Where it falls between two, rounding decides: `stepped` fractions are those
    of `torch.arange`, as in the first models of the kind; others are multiples of one, rounded.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)

    def buckets(count: int) -> Tensor:
        if stepped:
            fractions = torch.arange(0, 1 - 1e-6, 1 / count)
        else:
            fractions = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
        return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)

    return (buckets(height)[:, None] * side + buckets(width)).flatten()
