import os
import subprocess
import sys

import pytest
import torch
from marks import needs_cpp
from test_aggregate import random_csr, random_rows

from vqgnn_kernels import CSR, Rows
from vqgnn_kernels.attention_aggregate import _flat, attention_aggregate, code_scores, row_scores
from vqgnn_kernels.attention_aggregate import reference as truth
from vqgnn_kernels.store_io.reference import pull_rows

MODES = ["additive", "dot", "gatv2"]
CODECS = ["none", "fp32", "fp16", "int8", "int4", "pq8", "pq16"]
LEAVES = ("x", "query", "key", "attention", "edge_matrix")
EDGE_MODES = ["additive", "gatv2"]


def csr_of(counts, halo=None):
    """The matrix with counts[i, j] edges from j to i."""
    row, col = counts.nonzero(as_tuple=True)
    times = counts[row, col]
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.sum(1).cumsum(0)])
    return CSR(rowptr, col.repeat_interleave(times).int(), None, halo)


def problem(
    mode, codec="fp32", *, r=30, b=22, h=25, h_t=20, heads=3, f=5, density=0.3, table_rows=40,
    edge_dim=None, **options,
):  # fmt: skip
    """Arguments of the public op: duplicate edges, one row longer than a block, empty rows; csr_t belongs to csr."""
    counts = (torch.rand(r, b + h) < density).long() * torch.randint(1, 3, (r, b + h))
    counts[:1], counts[-2:] = 1, 0
    counts_t = torch.cat([counts[:, :b].T, (torch.rand(b, h_t) < density).long()], 1)
    width, rest = heads * f, () if mode == "additive" else (f,)
    csr, csr_t = csr_of(counts, torch.randint(table_rows, (h,))), csr_of(counts_t, torch.randint(table_rows, (h_t,)))
    if edge_dim is not None:
        columns = heads if mode == "additive" else edge_dim
        csr, csr_t = (c._replace(weight=torch.randn(len(c.col), columns)) for c in (csr, csr_t))
        if mode == "gatv2":
            options["edge_matrix"] = torch.randn(edge_dim, heads, f) * edge_dim**-0.5
    return {
        "x": torch.randn(b, width),
        "csr": csr,
        "query": torch.randn(r + h_t, heads, *rest),
        "key": torch.randn(b + h, heads) if mode == "additive" else None,
        "attention": torch.randn(heads, f) * f**-0.5 if mode == "gatv2" else None,
        "heads": heads,
        "mode": mode,
        "rows": random_rows(codec, table_rows, width),
        "csr_t": csr_t,
        "grad_rows": random_rows(codec, table_rows, heads * f),
        "halo_stats": torch.stack([torch.randn(h_t, heads) + 4, torch.randn(h_t, heads)], 1),
        "scale": 0.5,
        **options,
    }


def run(arguments):
    """out, lse and the gradients of all leaves for one fixed gradient of out."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEAVES if arguments.get(name) is not None}
    csr, given = arguments["csr"], dict(leaves)
    if csr.weight is not None and arguments["mode"] == "additive":
        leaves["weight"] = csr.weight.clone().requires_grad_()
        given["csr"] = csr._replace(weight=leaves["weight"])
    out, lse = attention_aggregate(**{**arguments, **given})
    assert out.dtype == arguments["x"].dtype and lse.dtype == torch.float32 and not lse.requires_grad
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad_out)
    return {"out": out.detach(), "lse": lse, **{name: leaf.grad for name, leaf in leaves.items()}}


def check(arguments, monkeypatch, tolerance=2e-5):
    """Values and gradients against reference.py."""
    ours = run(arguments)
    with monkeypatch.context() as patch:
        patch.setenv("VQGNN_BACKEND", "reference")
        want = run(arguments)
    for name in want:
        torch.testing.assert_close(
            ours[name], want[name], atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("mode", MODES)
def test_matches_reference(mode, codec, monkeypatch):
    check(problem(mode, codec, dropout=0.3, seed=2**40 + 0xFFFFFFF5), monkeypatch)


@pytest.mark.parametrize("codec", ["none", "int4", "pq8"])
@pytest.mark.parametrize("edge_dim", [1, 5, 19])
@pytest.mark.parametrize("mode", EDGE_MODES)
def test_edge_features_match_reference(mode, edge_dim, codec, monkeypatch):
    check(problem(mode, codec, edge_dim=edge_dim, dropout=0.3, seed=7), monkeypatch)


@pytest.mark.parametrize(("heads", "f"), [(1, 1), (1, 37), (1, 64), (8, 16), (2, 130), (5, 37)], ids=str)
@pytest.mark.parametrize("codec", ["pq8", "int4"])
@pytest.mark.parametrize("mode", MODES)
def test_odd_sizes(mode, codec, heads, f, monkeypatch):
    check(problem(mode, codec, heads=heads, f=f, scale=f**-0.5), monkeypatch, tolerance=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_long_rows(mode, monkeypatch):
    sizes = {"r": 4, "b": 300, "h": 900, "h_t": 500, "density": 0.6, "dropout": 0.1}
    check(problem(mode, "int8", **sizes), monkeypatch, 2e-4)
    if mode != "dot":
        check(problem(mode, "int8", **sizes, edge_dim=3), monkeypatch, 2e-4)


@pytest.mark.parametrize(
    ("r", "b", "h", "h_t"),
    [(1, 1, 0, 0), (8, 0, 9, 0), (8, 8, 0, 0), (0, 4, 0, 6), (0, 0, 0, 0), (3, 0, 0, 0)],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_small_shapes(mode, r, b, h, h_t, monkeypatch):
    check(problem(mode, "pq8", r=r, b=b, h=h, h_t=h_t), monkeypatch)
    if mode != "dot":
        check(problem(mode, "pq8", r=r, b=b, h=h, h_t=h_t, edge_dim=2), monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_no_halo_map(mode, monkeypatch):
    arguments = problem(mode, "pq16", h=17, h_t=17, table_rows=17)
    for name in ("csr", "csr_t"):
        arguments[name] = arguments[name]._replace(halo=None)
    check(arguments, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision(mode, dtype, monkeypatch):
    arguments = problem(mode, "int8", edge_dim=None if mode == "dot" else 3)
    check({**arguments, "x": arguments["x"].to(dtype)}, monkeypatch, tolerance=2e-2)


def test_non_contiguous_arguments():
    arguments = problem("gatv2", "fp32", edge_dim=4)
    want = run(arguments)
    for name in ("x", "query", "attention", "edge_matrix"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("csr", "csr_t"):
        arguments[name] = arguments[name]._replace(weight=arguments[name].weight.t().contiguous().t())
    torch.testing.assert_close(run(arguments), want)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize("mode", ["additive", "gatv2"])
def test_negative_slope(mode, slope, monkeypatch):
    check(problem(mode, negative_slope=slope), monkeypatch)


def test_large_scores_do_not_overflow(monkeypatch):
    arguments = problem("additive", "none", grad_rows=None)
    arguments["key"] *= 1000
    check(arguments, monkeypatch, tolerance=1e-3)  # scores of thousands are known to 1e-4


def dense_attention(x, query, key, attention, counts, mode, heads, slope, scale, weights=1.0):
    """out [n, H, F] and lse [n, H], every node attending to every node that it has an edge from."""
    n = x.shape[0]
    source = x.view(n, heads, -1)
    if mode == "additive":
        scores = torch.nn.functional.leaky_relu(key[None] + query[:, None], slope)
    elif mode == "dot":
        scores = scale * torch.einsum("ihf,jhf->ijh", query, source)
    else:
        hidden = torch.nn.functional.leaky_relu(source[None] + query[:, None], slope)
        scores = torch.einsum("ijhf,hf->ijh", hidden, attention)
    p = counts[:, :, None] * scores.exp()
    total = p.sum(1)
    p = p / total.clamp(min=1e-30)[:, None]
    return torch.einsum("ijh,jhf->ihf", p * weights, source), total.detach().log()


@pytest.mark.parametrize("b", [25, 9], ids=["whole", "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_whole_graph(mode, b):
    """With exact stored rows, gradients and softmax statistics, a batch gets the whole graph's gradients."""
    n, heads, f, dropout, seed = 25, 2, 6, 0.25 if b == 25 else 0.0, 5
    counts = (torch.rand(n, n) < 0.3).long() * torch.randint(1, 4, (n, n))
    counts[-1] = 0
    width, rest = heads * f, () if mode == "additive" else (f,)
    leaves = {
        "x": torch.randn(n, width),
        "query": torch.randn(n, heads, *rest),
        "key": torch.randn(n, heads) if mode == "additive" else None,
        "attention": torch.randn(heads, f) * f**-0.5 if mode == "gatv2" else None,
    }
    whole = {name: None if t is None else t.double().requires_grad_() for name, t in leaves.items()}
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    mask = truth._mask(i, j, heads, dropout, seed)
    weights = mask.view(n, n, heads) if dropout else 1.0
    want, lse = dense_attention(**whole, counts=counts.double(), mode=mode, heads=heads, slope=0.2,
                                scale=0.4, weights=weights)  # fmt: skip
    grad = torch.randn(n, heads, f)
    # attention's gradient is a sum over the batch's rows, the others' rows stand for themselves
    mine = torch.autograd.grad(want[:b], [t for t in whole.values() if t is not None], grad[:b].double(),
                               retain_graph=True)  # fmt: skip
    want.backward(grad.double())

    D = (grad * want.detach()).sum(2)
    stats = torch.stack([lse.detach(), D], 1)[b:].float()
    halo = torch.arange(b, n)
    batch = {name: None if t is None else t.clone().requires_grad_() for name, t in leaves.items()}
    out, ours_lse = attention_aggregate(
        batch["x"][:b], csr_of(counts[:b], halo), batch["query"], batch["key"], attention=batch["attention"],
        heads=heads, mode=mode, scale=0.4, dropout=dropout, seed=seed, rows=Rows("fp32", leaves["x"]),
        csr_t=csr_of(counts.T[:b], halo), grad_rows=Rows("fp32", grad.flatten(1)), halo_stats=stats,
    )  # fmt: skip
    out.backward(grad[:b])
    close = dict(atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(out.detach(), want[:b].detach().float(), **close)
    torch.testing.assert_close(ours_lse, lse[:b].detach().float(), **close)
    for name in ("x", "query", "key"):
        if leaves[name] is not None:
            torch.testing.assert_close(batch[name].grad[:b], whole[name].grad[:b].float(), **close)
            assert not batch[name].grad[b:].any()
    if mode == "gatv2":
        torch.testing.assert_close(batch["attention"].grad, mine[-1].float(), **close)


def sorted_csr(row, col, num_rows, halo):
    """The matrix with these edges, and the order in which it holds them."""
    order = torch.argsort(row * 1000 + col, stable=True)
    rowptr = torch.zeros(num_rows + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(row, minlength=num_rows).cumsum(0)
    return CSR(rowptr, col[order].int(), None, halo), order


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "default"])
@pytest.mark.parametrize("b", [25, 9], ids=["whole", "batch"])
@pytest.mark.parametrize("edge_dim", [1, 5])
@pytest.mark.parametrize("mode", EDGE_MODES)
def test_gradient_with_edge_features_is_that_of_the_whole_graph(mode, edge_dim, b, backend, monkeypatch):
    """As above, edge by edge: duplicates and self loops have features of their own, and one node has no edges."""
    if backend:
        monkeypatch.setenv("VQGNN_BACKEND", backend)
    n, heads, f = 25, 2, 6
    i, j = torch.randint(n - 1, (2, 90))
    i, j = torch.cat([i, i[:9], torch.arange(4)]), torch.cat([j, j[:9], torch.arange(4)])
    features = torch.randn(len(i), edge_dim)
    additive = mode == "additive"
    leaves = {
        "x": torch.randn(n, heads * f),
        "query": torch.randn(n, heads, *([] if additive else [f])),
        "key": torch.randn(n, heads) if additive else None,
        "attention": None if additive else torch.randn(heads, f),
        "edge_matrix": torch.randn(edge_dim, heads, *([] if additive else [f])),
    }
    whole = {name: None if t is None else t.double().requires_grad_() for name, t in leaves.items()}
    source = whole["x"].view(n, heads, f)
    asked = whole["query"][i] + (features.double() @ whole["edge_matrix"].flatten(1)).view(
        len(i), *whole["query"].shape[1:]
    )
    if additive:
        scores = torch.nn.functional.leaky_relu(whole["key"][j] + asked, 0.2)
    else:
        scores = (whole["attention"] * torch.nn.functional.leaky_relu(source[j] + asked, 0.2)).sum(2)
    total = torch.zeros(n, heads, dtype=torch.float64).index_add(0, i, scores.exp())
    p = scores.exp() / total[i]
    want, lse = torch.zeros(n, heads, f, dtype=torch.float64).index_add(0, i, p[:, :, None] * source[j]), total.log()
    grad = torch.randn(n, heads, f)
    # weights get the gradient of the batch's rows: the others' rows stand for themselves
    mine = torch.autograd.grad(
        want[:b], [t for t in whole.values() if t is not None], grad[:b].double(), retain_graph=True
    )
    want.backward(grad.double())

    stats = torch.stack([lse.detach(), (grad * want.detach()).sum(2)], 1)[b:].float()
    halo, inner, outer = torch.arange(b, n), i < b, j < b
    csr, order = sorted_csr(i[inner], j[inner], b, halo)
    csr_t, order_t = sorted_csr(j[outer], i[outer], b, halo)
    batch = {name: None if t is None else t.clone().requires_grad_() for name, t in leaves.items()}
    edges, edges_t = features[inner][order], features[outer][order_t]
    matrix = batch["edge_matrix"]
    if additive:
        edges, edges_t, matrix = edges @ matrix, edges_t @ matrix.detach(), None
    out, ours_lse = attention_aggregate(
        batch["x"][:b], csr._replace(weight=edges), batch["query"], batch["key"], attention=batch["attention"],
        edge_matrix=matrix, heads=heads, mode=mode, rows=Rows("fp32", leaves["x"]),
        csr_t=csr_t._replace(weight=edges_t), grad_rows=Rows("fp32", grad.flatten(1)), halo_stats=stats,
    )  # fmt: skip
    out.backward(grad[:b])
    close = dict(atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(out.detach(), want[:b].detach().float(), **close)
    torch.testing.assert_close(ours_lse, lse[:b].detach().float(), **close)
    for name in ("x", "query", "key"):
        if leaves[name] is not None:
            torch.testing.assert_close(batch[name].grad[:b], whole[name].grad[:b].float(), **close)
    torch.testing.assert_close(batch["edge_matrix"].grad, mine[-1].float(), **close)
    if not additive:
        torch.testing.assert_close(batch["attention"].grad, mine[-2].float(), **close)


def test_rows_without_edges_are_zero():
    arguments = problem("dot")
    out, lse = attention_aggregate(**arguments)
    assert not out[-2:].any() and (lse[-2:] == -torch.inf).all() and lse[:-2].isfinite().all()


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_follows_the_seed(dropout):
    n, heads = 400, 4
    csr = csr_of(torch.ones(n, n, dtype=torch.int64))
    zeros = torch.zeros(n, heads)

    def kept(seed):  # every weight is 1 / n, and x is 1: out is the kept share, scaled
        ones = torch.ones(n, heads)
        out, _ = attention_aggregate(ones, csr, zeros, zeros, heads=heads, mode="additive", dropout=dropout, seed=seed)
        return out * (1 - dropout)

    assert kept(1).mean().item() == pytest.approx(1 - dropout, abs=0.005)
    assert kept(1).std().item() == pytest.approx((dropout * (1 - dropout) / n) ** 0.5, rel=0.15)
    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))


@needs_cpp
@pytest.mark.parametrize("mode", MODES)
def test_thread_count_does_not_change_a_bit(mode):
    sizes = {"r": 700, "b": 600, "h": 300, "h_t": 200, "density": 0.02, "f": 9}
    arguments = problem(mode, "pq8", **sizes, dropout=0.2, edge_dim=None if mode == "dot" else 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("codec", ["none", "pq8"])
@pytest.mark.parametrize(("mode", "edge_dim"), [*((mode, None) for mode in MODES), *((m, 3) for m in EDGE_MODES)])
def test_opcheck(mode, edge_dim, codec):
    a = problem(mode, codec, dropout=0.2, edge_dim=edge_dim)
    if codec == "none":
        a["halo_stats"] = None
    if edge_dim and mode == "additive":
        a["csr"].weight.requires_grad_()
    leaves = [None if a.get(name) is None else a[name].requires_grad_() for name in LEAVES]
    torch.library.opcheck(
        torch.ops.vqgnn.attention_aggregate,
        (leaves[0], *_flat(a["csr"], a["rows"]), *_flat(a["csr_t"], a["grad_rows"]), a["halo_stats"], *leaves[1:],
         mode, a["heads"], 0.2, 1.0, 0.2, torch.tensor(3)),
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "edge_dim"), [*((mode, None) for mode in MODES), *((m, 3) for m in EDGE_MODES)])
def test_compiles_as_one_graph(mode, edge_dim):
    arguments = problem(mode, "pq8", edge_dim=edge_dim)

    def layer(x, query):
        out, _ = attention_aggregate(**{**arguments, "x": x.tanh(), "query": query})
        return out.relu()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x, query = (arguments[name].clone().requires_grad_() for name in ("x", "query"))
        out = function(x, query)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, query.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@needs_cpp
def test_baseline_instructions_agree(tmp_path):
    """VQGNN_ISA is read once a process, so the baseline kernels run in another one."""
    cases = [(mode, codec, edges) for mode in MODES for codec in CODECS for edges in (None, 5)[: 1 + (mode != "dot")]]
    torch.save([(case, run(seeded(*case))) for case in cases], tmp_path / "cases.pt")
    program = (
        "import sys, torch, vqgnn_kernels as k, test_attention_aggregate as t\n"
        "assert '(base)' in k.backends()['cpp'], k.backends()\n"
        "for case, want in torch.load(sys.argv[1]):\n"
        "    torch.testing.assert_close(t.run(t.seeded(*case)), want, atol=1e-4, rtol=1e-4)\n"
    )
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "VQGNN_ISA": "base", "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("VQGNN_BACKEND", None)
    command = [sys.executable, "-c", program, str(tmp_path / "cases.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def seeded(mode, codec, edge_dim):
    torch.manual_seed(3)
    return problem(mode, codec, f=19, dropout=0.3, edge_dim=edge_dim)


def weighted(csr, columns):
    return csr._replace(weight=torch.ones(len(csr.col), columns))


BAD = {
    "mode is 'cosine'": lambda a: a.update(mode="cosine"),
    r"dropout=1.0 must lie in \[0, 1\)": lambda a: a.update(dropout=1.0),
    "x has dtype": lambda a: a.update(x=a["x"].double()),
    "heads=4 must": lambda a: a.update(heads=4),
    "csr.weight has shape": lambda a: a.update(csr=weighted(a["csr"], 2)),
    "csr.weight has dtype": lambda a: a.update(csr=a["csr"]._replace(weight=torch.ones(len(a["csr"].col), 3).long())),
    "csr.weight must be None in mode": lambda a: a.update(
        csr=weighted(a["csr"], 3), mode="dot", key=None, query=torch.randn(50, 3, 5)
    ),
    "csr_t.weight has shape": lambda a: a.update(csr=weighted(a["csr"], 3), csr_t=weighted(a["csr_t"], 4)),
    "csr and csr_t must both have a weight": lambda a: a.update(csr=weighted(a["csr"], 3)),
    "edge_matrix is for mode": lambda a: a.update(csr=weighted(a["csr"], 3), edge_matrix=torch.randn(3, 3, 5)),
    "edge_matrix has shape": lambda a: a.update(edge_matrix=torch.randn(3, 2, 5)),
    "edge_matrix .* got mode 'gatv2'": lambda a: a.update(
        csr=weighted(a["csr"], 3), mode="gatv2", key=None, query=torch.randn(50, 3, 5), attention=torch.randn(3, 5)
    ),
    "csr.col has dtype": lambda a: a.update(csr=a["csr"]._replace(col=a["csr"].col.long())),
    "query has shape": lambda a: a.update(query=a["query"][:, :2]),
    "query has 29 rows; csr": lambda a: a.update(query=a["query"][:29]),
    "query has 49 rows; with grad_rows": lambda a: a.update(query=a["query"][:49]),
    "key is for mode": lambda a: a.update(key=None),
    "key has 46 rows": lambda a: a.update(key=a["key"][:46]),
    "attention is for mode": lambda a: a.update(attention=torch.ones(3, 5)),
    "rows.data has 15 columns": lambda a: a.update(x=torch.randn(22, 18)),
    "grad_rows.data has 12 columns": lambda a: a.update(grad_rows=random_rows("fp32", 40, 12)),
    "halo_stats is None": lambda a: a.update(halo_stats=None),
    "halo_stats has shape": lambda a: a.update(halo_stats=a["halo_stats"][:5]),
    "csr_t is None": lambda a: a.update(csr_t=None, grad_rows=None, x=a["x"].requires_grad_()),
    "grad_rows was given": lambda a: a.update(csr_t=None),
    "csr_t has 7 rows": lambda a: a.update(csr_t=random_csr(7, 20, 0, weighted=False)),
    "rowptr must rise": lambda a: a["csr"].rowptr.__setitem__(3, 10_000),
    "col spans [0-9]*..47; with 22 rows": lambda a: a["csr"].col.__setitem__(-1, 47),
    "col spans -1": lambda a: a["csr"].col.__setitem__(0, -1),
    "halo spans": lambda a: a["csr"].halo.__setitem__(4, 40),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_say_what_to_do(message):
    arguments = problem("additive")
    attention_aggregate(**arguments)
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message):
        attention_aggregate(**arguments)


@pytest.mark.parametrize("column", [-1, 50])
@pytest.mark.parametrize("mode", MODES)
def test_backward_finds_columns_out_of_range(mode, column):
    arguments = problem(mode)
    arguments["x"].requires_grad_()
    arguments["csr_t"].col[0] = column
    out, _ = attention_aggregate(**arguments)
    with pytest.raises(ValueError, match="col spans"):
        out.sum().backward()


@pytest.mark.parametrize("codec", ["pq8", "pq16"])
def test_code_scores_are_those_of_the_decoded_rows(codec):
    rows, weight, n_id = random_rows(codec, 50, 24), torch.randn(24, 3), torch.randint(50, (70,))
    table = torch.einsum("mkd,mdh->mkh", rows.codebook, weight.view(6, 4, 3))
    want = pull_rows(rows, n_id, 24) @ weight
    torch.testing.assert_close(code_scores(rows, n_id, table), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(truth.code_scores(rows, n_id, table), want, atol=1e-5, rtol=1e-5)
    assert code_scores(rows, n_id[:0], table).shape == (0, 3)
    torch.library.opcheck(torch.ops.vqgnn.code_scores, (rows.data, n_id, table))


@pytest.mark.parametrize("codec", CODECS[1:])
def test_row_scores_are_those_of_the_decoded_rows(codec, monkeypatch):
    monkeypatch.setattr(sys.modules[attention_aggregate.__module__], "_CHUNK", 16)
    rows, weight, n_id = random_rows(codec, 50, 22), torch.randn(22, 3), torch.randint(50, (70,))
    torch.testing.assert_close(row_scores(rows, n_id, weight), pull_rows(rows, n_id, 22) @ weight, atol=1e-5, rtol=1e-5)
    assert row_scores(rows, n_id[:0], weight).shape == (0, 3)
    torch.library.opcheck(torch.ops.vqgnn.row_scores, (*rows, n_id, weight))
    with pytest.raises(ValueError, match="weight has dtype"):
        row_scores(rows, n_id, weight.double())


def test_code_scores_errors():
    rows, n_id, table = random_rows("pq8", 50, 24), torch.arange(50), torch.randn(6, 16, 3)
    with pytest.raises(ValueError, match='scores from codewords need "pq"'):
        code_scores(random_rows("int8", 50, 24), n_id, table)
    with pytest.raises(ValueError, match="table has shape"):
        code_scores(rows, n_id, table[:5])
    with pytest.raises(ValueError, match=r"n_id spans 0\.\.50"):
        code_scores(rows, torch.arange(51), table)
