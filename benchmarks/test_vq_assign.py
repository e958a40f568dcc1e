"""vq_assign against torch (addmm and argmin a branch, in blocks) and libraries, where these are installed.

On the CPU: faiss-cpu's product quantiser. On a GPU: flash-kmeans' Triton kernel (`pip install flash-kmeans`), whose
default there is tf32, so that its codes are not always the nearest; and vector-quantize-pytorch.

pytest benchmarks/test_vq_assign.py [-k small] [--device cuda] --rows rows.csv
"""

import pytest
import torch
from conftest import on_gpu

from vqgnn_kernels import vq_assign

M, DV = 32, 8
SIZES = {"small": 2_000, "large": 60_000, "gpu": 85_000}  # rows


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
    faiss = pytest.importorskip("faiss", reason="the peer faiss-cpu is not installed")
    quantiser = faiss.ProductQuantizer(M * DV, M, K.bit_length() - 1)
    faiss.copy_array_to_vector(codebook.numpy().ravel(), quantiser.centroids)
    faiss.omp_set_num_threads(torch.get_num_threads())
    return quantiser


@pytest.fixture(params=SIZES)
def problem(request):
    """problem(K): rows v, a codebook, and the label of their sizes."""
    b = SIZES[request.param]
    if request.param != "small" and (request.param == "gpu") != on_gpu():
        pytest.skip(f"{b} rows are for --device {'cpu' if on_gpu() else 'cuda'}")
    torch.manual_seed(0)
    return lambda K: (torch.randn(b, M * DV), torch.randn(M, K, DV), f"b={b} m={M} K={K} dv={DV}")


@pytest.mark.parametrize("K", [256, 1024])
def test_vq_assign(versus, problem, K):
    v, codebook, label = problem(K)
    peers = {"torch": lambda: torch_assign(v, codebook)}
    ours = squared_error(v, vq_assign(v, codebook), codebook)
    torch.testing.assert_close(ours, squared_error(v, torch_assign(v, codebook), codebook), rtol=1e-5, atol=1e-5)
    if not on_gpu():
        rows, quantiser = v.numpy(), faiss_quantiser(codebook, K)
        decoded = torch.from_numpy(quantiser.decode(quantiser.compute_codes(rows)))
        theirs = (v - decoded).square().view(len(v), M, DV).sum(-1)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        peers["faiss"] = lambda: quantiser.compute_codes(rows)

    versus(lambda: vq_assign(v, codebook), peers, size=label, rounds=5, memory=True)


@pytest.mark.parametrize("K", [256, 1024])
def test_against_flash_kmeans(versus, problem, K):
    """The peer gets its own layout, branches first and dv padded to the 16 that tensor cores need, uncounted."""
    if not on_gpu():
        pytest.skip("flash-kmeans' kernel needs --device cuda")
    flash = pytest.importorskip("flash_kmeans.assign_euclid_triton", reason="pip install flash-kmeans: peer not timed")
    v, codebook, label = problem(K)
    pad = (0, 16 - DV)
    rows = torch.nn.functional.pad(v.view(-1, M, DV).transpose(0, 1), pad).contiguous()
    codewords, norms = torch.nn.functional.pad(codebook, pad).contiguous(), rows.square().sum(-1)

    def flash_kmeans():
        return flash.euclid_assign_triton(rows, codewords, norms)

    ours = squared_error(v, vq_assign(v, codebook), codebook)
    theirs = squared_error(v, flash_kmeans().T, codebook)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # tf32
    peers = {"flash_kmeans": flash_kmeans}
    versus(lambda: vq_assign(v, codebook), peers, size=label, rounds=9, memory=True)


@torch.no_grad()
@pytest.mark.parametrize("K", [256, 1024])
def test_against_vector_quantize_pytorch(versus, problem, K):
    """The peer in evaluation: it also decodes, which nothing turns off."""
    library = pytest.importorskip("vector_quantize_pytorch", reason="the peer vector-quantize-pytorch is not installed")
    v, codebook, label = problem(K)
    modules = []
    for codewords in codebook:
        module = library.VectorQuantize(DV, K, use_cosine_sim=False).eval()
        module._codebook.embed.copy_(codewords.unsqueeze(0))
        modules.append(module)

    def vq_pytorch():
        branches = v.view(-1, M, DV).unbind(1)
        return [module(x.unsqueeze(0))[1][0] for x, module in zip(branches, modules, strict=True)]

    ours = squared_error(v, vq_assign(v, codebook), codebook)
    torch.testing.assert_close(ours, squared_error(v, torch.stack(vq_pytorch(), 1), codebook), rtol=1e-3, atol=1e-3)
    peers = {"vector_quantize_pytorch": vq_pytorch}
    versus(lambda: vq_assign(v, codebook), peers, size=label, rounds=3, memory=True)
