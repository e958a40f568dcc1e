"""Generated graphs for the benchmarks."""

import torch


def power_law_csr(num_nodes, num_edges, seed=0):
    """rowptr int64, col int32, weight fp32; the degrees of both directions follow a power law, rank^-1/2."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def ends():
        rank = (torch.rand(num_edges, generator=generator).square_() * num_nodes).long().clamp_(max=num_nodes - 1)
        return torch.randperm(num_nodes, generator=generator)[rank]

    rowptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(ends(), minlength=num_nodes).cumsum(0)
    return rowptr, ends().int(), torch.rand(num_edges, generator=generator)
