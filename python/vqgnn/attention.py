"""Attention over edges: convs whose messages a softmax weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.typing import OptPairTensor, OptTensor, PairTensor

from vqgnn_kernels import CSR, Rows, attention_aggregate, pull_rows, row_scores

from .dropout import draw_seed, dropped
from .graph import BatchGraph, Convolution
from .store import Neighbours, full_precision
from .store_conv import StoreConv, require

_BLOCK = 2**24  # numbers: of the halo's features so many are projected at once


def entries(csr: CSR, rows: Rows) -> Tensor:
    """[h] rows of the table, one a halo entry."""
    return torch.arange(len(rows.data), device=rows.data.device) if csr.halo is None else csr.halo


def require_attention(conv: Attention) -> None:
    require(conv, conv.flow == "source_to_target", "flow", conv.flow, "flow='source_to_target'")
    require(conv, conv.aggr in ("sum", "add"), "aggr", conv.aggr, "aggr='sum'")
    require(
        conv, isinstance(conv.in_channels, int), "in_channels", conv.in_channels, "one number for source and target"
    )


class Attention(StoreConv):
    """Mix-in: a softmax over edges weighs the messages. Has `heads` and `dropout`.

    A store of inputs keeps x: the halo's rows are decoded and projected with the present weights, and every message to
    the batch has a gradient for them; what the rows themselves are given is left for their nodes (`Exchange`). A store
    of projections keeps what neighbours are told, which the kernel reads as it lies; gradients then reach the weights
    through the batch's own rows, from messages to the batch alone or, with a gradient store (`grad=True`), to
    out-of-batch nodes too. The classes below speak of that one.
    """

    fixed = False
    input_slices = ("exact_neighbours", "halo_transpose")

    def slices(self) -> tuple[str, ...]:
        return ("halo_transpose",) if self.store_use.inputs else super().slices()

    @property
    def softmax_heads(self) -> int:
        return self.heads

    def edge_convolution(self) -> Convolution:
        """The adjacency with what this conv takes of edges and, where it adds them, of self loops."""
        require_attention(self)
        fill = self.fill_value if self.add_self_loops and self.edge_dim is not None else None
        if isinstance(fill, Tensor):  # a key is compared by value
            fill = tuple(fill.flatten().tolist())
        return Convolution("attention", add_self_loops=self.add_self_loops, edge_dim=self.edge_dim, fill=fill)

    def edge_weight(self) -> Tensor:
        """[heads, out_channels, edge_dim]: W_e by head."""
        return self.lin_edge.weight.view(self.heads, self.out_channels, self.edge_dim)

    def state(self, x: Tensor) -> Tensor:
        return x if self.store_use.inputs else self.message_input(x)

    def state_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.store_use.inputs:
            return self.batch_messages(source, neighbours, query)
        csr, rows, csr_t, dropout = *neighbours[:3], neighbours.dropout
        if rows is None:
            halo = self.message_input(source[:0])
        else:
            halo = self._project(rows, entries(csr, rows), source, dropout, neighbours.exchange)
        return self._projected_messages(source, halo, csr, csr_t, query)

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        convolution = self.store_use.convolution
        csr, rows, *_ = graph.exact_neighbours(convolution)
        dropout = dropped(x)[1] if self.training else 0.0
        blocks = entries(csr, rows).split(max(1, _BLOCK // x.size(1)))
        if len(blocks) == 1:
            halo = [self._project(rows, blocks[0], x, dropout)]
        else:  # not kept for backward but read again: features do not change, and may be wide
            halo = [checkpoint(self._project, rows, block, x, dropout, use_reentrant=False) for block in blocks]
        csr_t = graph.halo_transpose(convolution)
        return self._projected_messages(x, torch.cat(halo), csr, csr_t, self.message_query(x))[0]

    def _project(
        self, rows: Rows, halo: Tensor, like: Tensor, dropout: float, exchange: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """[h, f]: what rows of a table of inputs, [N, channels of `like`], tell with the present weights."""
        x = pull_rows(rows, halo, like.size(1))
        x = x if exchange is None else exchange(x)
        return self.message_input(F.dropout(x, dropout).to(like.dtype))

    def _projected_messages(
        self, x: Tensor, halo: Tensor, csr: CSR, csr_t: CSR | None, query: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`batch_messages` of inputs x [b, channels] and of what the halo tells [h, f]."""
        # apart: in one product with x, the halo's rows would be given gradients, too
        source = torch.cat([self.message_input(x), halo])
        return self.batch_messages(source, Neighbours(csr._replace(halo=None), None, csr_t), query)

    def attend(self, source: Tensor, neighbours: Neighbours, query: Tensor, **options) -> tuple[Tensor, Tensor]:
        """Messages [r, heads * width] and their log-sum-exp [r, heads]; the options are attention_aggregate's."""
        csr, rows, csr_t, grad_rows, _, softmax, *_ = neighbours
        if rows is not None and rows.codebook is not None:
            # learns between forward and backward, which must read the same rows
            rows = rows._replace(codebook=rows.codebook.clone())
        dropout = self.dropout if self.training else 0.0
        seed = draw_seed(dropout, source.device)
        out, lse = attention_aggregate(
            source, csr, query, heads=self.heads, rows=rows, csr_t=csr_t, grad_rows=grad_rows, halo_stats=softmax,
            dropout=dropout, seed=seed, **options,
        )  # fmt: skip
        return out.flatten(1), lse

    def join_heads(self, messages: Tensor) -> Tensor:
        """[b, heads * out_channels], or with concat=False their mean over the heads."""
        return messages if self.concat else messages.view(-1, self.heads, self.out_channels).mean(1)

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        out = self.join_heads(messages)
        if self.res is not None:
            out = out + self.res(x)
        return out if self.bias is None else out + self.bias


class GATConv(Attention, pyg.GATConv):
    """PyG's GATConv (Velickovic et al.): M_i = sum_j softmax_j(leaky_relu(a_src z_j + a_dst z_i)) z_j with z = W x.

    With edge_dim, a_edge W_e e_ij joins the score. The store keeps z.
    """

    propagate_type: ClassVar = {"x": OptPairTensor, "alpha": Tensor}
    edge_updater_type: ClassVar = {"alpha": OptPairTensor, "edge_attr": OptTensor}

    def convolution(self) -> Convolution:
        return self.edge_convolution()

    def message_input(self, x: Tensor) -> Tensor:
        return self.lin(x)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        neighbours = self._with_edge_scores(neighbours)
        csr, rows, csr_t, grad_rows, rows_t, *_ = neighbours
        by_source, by_target = self._by_head(self.att_src), self._by_head(self.att_dst)
        with full_precision(source.device.type):  # else bf16 beside `row_scores` of the halo's, which are fp32
            key = source.float() @ by_source
            query = source[: csr.rowptr.numel() - 1].float() @ by_target
        if rows is not None:
            key = torch.cat([key, row_scores(rows, entries(csr, rows), by_source)])
        if grad_rows is not None:
            query = torch.cat([query, row_scores(rows_t, entries(csr_t, rows_t), by_target)])
        return self.attend(source, neighbours, query, key=key, mode="additive", negative_slope=self.negative_slope)

    def _with_edge_scores(self, neighbours: Neighbours) -> Neighbours:
        """Edges' features [e, edge_dim] made [e, heads], their shares of the scores."""
        csr, csr_t = neighbours.csr, neighbours.csr_t
        if csr.weight is None:
            return neighbours
        by_head = (self.edge_weight() * self.att_edge[0, :, :, None]).sum(1)
        if csr_t is not None:
            csr_t = csr_t._replace(weight=F.linear(csr_t.weight, by_head.detach()))
        return neighbours._replace(csr=csr._replace(weight=F.linear(csr.weight, by_head)), csr_t=csr_t)

    def _by_head(self, attention: Tensor) -> Tensor:
        """[heads * out_channels, heads] fp32: z @ it is z's score by head."""
        eye = torch.eye(self.heads, dtype=torch.float32, device=attention.device)
        return (attention[0, :, :, None].float() * eye[:, None, :]).flatten(0, 1)


class GATv2Conv(Attention, pyg.GATv2Conv):
    """PyG's GATv2Conv (Brody et al.): M_i = sum_j softmax_j(a . leaky_relu(W_l x_j + W_r x_i)) W_l x_j.

    With edge_dim, W_e e_ij joins the sum inside; the kernel computes it edge by edge. The store keeps W_l x; with
    gradients and without share_weights a second one keeps W_r x.
    """

    propagate_type: ClassVar = {"x": PairTensor, "alpha": Tensor}
    edge_updater_type: ClassVar = {"x": PairTensor, "edge_attr": OptTensor}

    @property
    def query_channels(self) -> int:
        return 0 if self.share_weights else self.heads * self.out_channels

    def convolution(self) -> Convolution:
        return self.edge_convolution()

    def message_input(self, x: Tensor) -> Tensor:
        return self.lin_l(x)

    def message_query(self, x: Tensor) -> Tensor | None:
        return None if self.share_weights else self.lin_r(x)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if query is None:  # what neighbours are told is what they are asked by
            query = source[: neighbours.csr.rowptr.numel() - 1]
            if neighbours.grad_rows is not None:
                rows = neighbours.rows_t
                query = torch.cat([query, pull_rows(rows, entries(neighbours.csr_t, rows), source.size(1))])
        query = query.view(-1, self.heads, self.out_channels)
        options = {"attention": self.att[0], "negative_slope": self.negative_slope}
        if neighbours.csr.weight is not None:
            options["edge_matrix"] = self.edge_weight().permute(2, 0, 1)
        return self.attend(source, neighbours, query, mode="gatv2", **options)


class TransformerConv(Attention, pyg.TransformerConv):
    """PyG's TransformerConv (Shi et al.): M_i = sum_j softmax_j(<W_q x_i, W_k x_j> / sqrt(F)) W_v x_j, by head.

    The store keeps W_k x and W_v x, head by head side by side: to the kernel that is one row of 2 F channels, of which
    the query, padded with zeros, sees the first half. With gradients a second store keeps W_q x.
    """

    propagate_type: ClassVar = {"query": Tensor, "key": Tensor, "value": Tensor, "edge_attr": OptTensor}

    @property
    def query_channels(self) -> int:
        return self.heads * self.out_channels

    def convolution(self) -> Convolution:
        require_attention(self)
        require(self, self.edge_dim is None, "edge_dim", self.edge_dim, "edge_dim=None")  # edges bring values here, too
        return Convolution("attention", add_self_loops=False)

    def message_input(self, x: Tensor) -> Tensor:
        parts = (lin(x).view(-1, self.heads, self.out_channels) for lin in (self.lin_key, self.lin_value))
        return torch.cat([*parts], 2).flatten(1)

    def message_query(self, x: Tensor) -> Tensor:
        return self.lin_query(x)

    def batch_messages(
        self, source: Tensor, neighbours: Neighbours, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        query = F.pad(query.view(-1, self.heads, self.out_channels), (0, self.out_channels))
        return self.attend(source, neighbours, query, mode="dot", scale=self.out_channels**-0.5)

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        values = messages.view(-1, self.heads, 2 * self.out_channels)[:, :, self.out_channels :]
        out = self.join_heads(values.flatten(1))
        if not self.root_weight:
            return out
        own = self.lin_skip(x)
        if self.lin_beta is None:
            return out + own
        beta = self.lin_beta(torch.cat([out, own, out - own], 1)).sigmoid()
        return beta * own + (1 - beta) * out


@torch.no_grad()
def limit_attention(model: nn.Module, lipschitz: float) -> None:
    """Scale attention vectors, in place, to norm at most `lipschitz` by head; call it after every optimiser step.

    A score then moves by at most `lipschitz` times what a row z = W x does, and by that much a stale or quantised row
    can mislead it (VQ-GNN, theorem 2 and appendix E). Of GATConv and GATv2Conv, PyG's own included; the weights stay
    ordinary ones. The scores of other attention, as TransformerConv's inner products, have no such constant.

    Raises:
        ValueError: lipschitz <= 0, or a model without such convs.
    """
    vectors = []
    for conv in model.modules():
        if isinstance(conv, pyg.GATConv):
            vectors += [conv.att_src, conv.att_dst]
        elif isinstance(conv, pyg.GATv2Conv):
            vectors.append(conv.att)
    if not lipschitz > 0 or not vectors:
        raise ValueError(
            f"lipschitz={lipschitz!r} for a {type(model).__name__} of {len(vectors)} attention vectors: it must be "
            "above 0, and the model have GATConv or GATv2Conv"
        )
    for vector in vectors:
        vector.mul_((lipschitz / vector.norm(dim=-1, keepdim=True)).clamp(max=1))
