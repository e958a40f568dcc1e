"""vq_assign against torch (addmm and argmin a branch, in blocks) and, on the CPU, faiss-cpu's product quantiser."""

import pytest
import torch
from conftest import on_gpu

from vqgnn_kernels import vq_assign

faiss = pytest.importorskip("faiss")

M, DV = 32, 8


def squared_error(v, codes, codebook):
    """[b, m] squared distance of every row to its codeword."""
    branch = torch.arange(codebook.shape[0])
    return (v.view(len(v), *codebook.shape[::2]) - codebook[branch, codes.long()]).square().sum(-1)


def torch_assign(v, codebook, block=4096):
    half_norm = codebook.square().sum(-1) / 2
    codes = torch.empty(len(v), len(codebook), dtype=torch.int64)
    for start in range(0, len(v), block):
        rows = v[start : start + block]
        for j, codewords in enumerate(codebook):
            score = torch.addmm(half_norm[j], rows[:, j * DV : (j + 1) * DV], codewords.T, alpha=-1)
            codes[start : start + block, j] = score.argmin(1)
    return codes


def faiss_quantiser(codebook, K):
    quantiser = faiss.ProductQuantizer(M * DV, M, K.bit_length() - 1)
    faiss.copy_array_to_vector(codebook.numpy().ravel(), quantiser.centroids)
    faiss.omp_set_num_threads(torch.get_num_threads())
    return quantiser


@pytest.mark.parametrize("K", [256, 1024])
def test_vq_assign(versus, K):
    torch.manual_seed(0)
    b = 85_000 if on_gpu() else 60_000
    v, codebook = torch.randn(b, M * DV), torch.randn(M, K, DV)
    peers = {"torch": lambda: torch_assign(v, codebook)}

    ours = squared_error(v, vq_assign(v, codebook), codebook)
    torch.testing.assert_close(ours, squared_error(v, torch_assign(v, codebook), codebook), rtol=1e-5, atol=1e-5)
    if not on_gpu():
        rows, quantiser = v.numpy(), faiss_quantiser(codebook, K)
        decoded = torch.from_numpy(quantiser.decode(quantiser.compute_codes(rows)))
        theirs = (v - decoded).square().view(b, M, DV).sum(-1)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        peers["faiss"] = lambda: quantiser.compute_codes(rows)

    versus(lambda: vq_assign(v, codebook), peers, size=f"b={b} m={M} K={K} dv={DV}", rounds=5, memory=True)
