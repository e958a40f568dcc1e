"""ChebConv: several products with one matrix, each with a store."""

from __future__ import annotations

from typing import ClassVar

import torch_geometric.nn as pyg
from torch import Tensor, nn

from vqgnn_kernels import Rows

from .graph import BatchGraph, Convolution
from .store_conv import StoreConv, not_converted, require, require_no_more, start_reading


class ChebHop(StoreConv, nn.Module):
    """One product with the matrix of a ChebConv, of what the hop before gave (`follows_hop`) or of the conv's x."""

    input_product = "input_terms"
    serves_new_nodes = False  # lambda_max and the degrees that normalise are the whole graph's

    def __init__(self, convolution: Convolution, index: int, follows: ChebHop | None):
        super().__init__()
        self._convolution, self.index = convolution, index
        self.__dict__["follows_hop"] = follows  # no child module

    def convolution(self) -> Convolution:
        return self._convolution

    @property
    def input_slices(self) -> tuple[str, ...]:
        return ("exact_neighbours" if self.index == 0 else "csr",)

    def input_messages(self, x: Tensor, graph: BatchGraph) -> Tensor:
        if self.index == 0:
            return super().input_messages(x, graph)
        convolution = self.store_use.convolution
        table = Rows("fp32", graph.graph.terms(convolution)[self.index - 1], None, None)
        neighbours = graph.read(table, convolution)._replace(csr_t=graph.csr(convolution)[1])
        return self.batch_messages(x, neighbours)[0]

    def combine(self, x: Tensor, messages: Tensor) -> Tensor:
        return messages


class ChebConv(pyg.ChebConv):
    """PyG's ChebConv (Defferrard et al.): sum_k T_k W_k, T_0 = X, T_1 = C X, T_k = 2 C T_k-1 - T_k-2.

    C is the scaled Laplacian of the whole graph. Each of the K - 1 products has a store: of X, T_1, ...; of the given
    features all T_k are computed once.
    """

    propagate_type: ClassVar = {"x": Tensor, "norm": Tensor}

    def convolution(self) -> Convolution:
        require(self, self.flow == "source_to_target", "flow", self.flow, "flow='source_to_target'")
        require(self, self.aggr in ("sum", "add"), "aggr", self.aggr, "aggr='sum'")
        require(self, len(self.lins) > 1, "K", len(self.lins), "K >= 2")
        return Convolution("cheb", normalization=self.normalization, order=len(self.lins))

    def store_parts(self) -> dict[str, StoreConv]:
        if "hops" not in self._modules:
            hops = []
            for index in range(len(self.lins) - 1):
                hops.append(ChebHop(self.convolution(), index, hops[-1] if hops else None))
            self.hops = nn.ModuleList(hops)
        return {f".hops.{hop.index}": hop for hop in self.hops}

    def forward(self, x, edge_index, *args, **kwargs):
        if not isinstance(edge_index, BatchGraph):
            return super().forward(x, edge_index, *args, **kwargs)
        require_no_more(self, args, kwargs)
        if "hops" not in self._modules:
            raise not_converted(self)
        out = sum(lin(term) for lin, term in zip(self.lins, self._terms(x, edge_index), strict=True))
        return out if self.bias is None else out + self.bias

    def _terms(self, x: Tensor, graph: BatchGraph) -> list[Tensor]:
        """T_0, T_1, ... [b, in_channels] of the batch."""
        use = self.hops[0].store_use
        if graph.run is None and use is not None and use.input == "precompute" and x is graph.x:
            if use.reads and not graph.started:
                start_reading(graph, use)
            return [x, *graph.input_terms(use.convolution)]
        terms = [x, self.hops[0](x, graph)]
        for hop in self.hops[1:]:
            terms.append(2 * hop(terms[-1], graph) - terms[-2])
        return terms
