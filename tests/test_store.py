import copy
import io

import pytest
import torch

from vqgnn import Codec, NodeStore

ROW_CODECS = ["fp32", "fp16", "int8", "int4"]
N = 30


def bound(codec, x):
    """Largest error of a decoded value: half a step, which covers the row from a bf16 below its minimum."""
    if codec in ("fp32", "fp16"):
        return x.abs() * (0 if codec == "fp32" else 2**-11) + (0 if codec == "fp32" else 2**-25)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    levels = 255 if codec == "int8" else 15
    step = (high - low + low.abs() * 2**-7) / levels * (1 + 2**-7)
    return 0.5 * step * (1 + 1e-5) + low.abs() * 1e-6


def stored(store):
    return {key: value.clone() for key, value in store.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dim", [1, 7, 16])
@pytest.mark.parametrize("codec", ROW_CODECS)
def test_rows_come_back_within_the_codecs_error(codec, dim):
    store = NodeStore(N, dim, codec, grad=True)
    n_id = torch.randperm(N)[:20]
    x, g = torch.randn(20, dim) * 3 + 1, torch.randn(20, dim) * 1e-3
    x[3] = 2.5  # a constant row
    g[4] = 0.0
    store.push(n_id, x, g)
    assert ((store.pull(n_id) - x).abs() <= bound(codec, x)).all()
    gradients = NodeStore(N, dim, codec, grad=False)
    gradients.data, gradients.scale = store.grad_data, store.grad_scale
    assert ((gradients.pull(n_id) - g).abs() <= bound(codec, g)).all()
    rest = torch.ones(N, dtype=torch.bool).index_fill(0, n_id, False)
    assert not store.pull()[rest].any()  # the others are as they were
    assert store.pull().dtype == torch.float32 and store.pull().shape == (N, dim)


def test_rows_without_gradients_keep_the_old_gradients():
    store = NodeStore(N, 4, "fp32", grad=True)
    n_id = torch.arange(N)
    g = torch.randn(N, 4)
    store.push(n_id, torch.randn(N, 4), g)
    x = torch.randn(N, 4)
    store.push(n_id, x)
    assert torch.equal(store.grad_rows.data, g) and torch.equal(store.pull(), x)


@pytest.mark.parametrize("codec", [*ROW_CODECS, "pq:d=2,k=4"])
def test_without_a_gradient_store_gradients_are_ignored(codec):
    with_g, without = NodeStore(N, 4, codec, grad=False), NodeStore(N, 4, codec, grad=False)
    assert with_g.grad_rows is None
    for _ in range(3):
        x = torch.randn(N, 4)
        with_g.push(torch.arange(N), x, torch.randn(N, 4))
        without.push(torch.arange(N), x)
    assert torch.equal(with_g.pull(), without.pull())


@pytest.mark.parametrize(("d", "k", "dtype"), [(2, 4, torch.uint8), (4, 256, torch.uint8), (3, 257, torch.int16)])
def test_codes_decode_to_state_and_gradient(d, k, dtype):
    store = NodeStore(N, 7, f"pq:d={d},k={k}", grad=True)
    n_id = torch.randperm(N)[:20]
    store.push(n_id, torch.randn(20, 7), torch.randn(20, 7))
    assert store.data.dtype == dtype and store.data.shape == (N, -(-7 // d))
    for table, read in ((store.rows, store.pull(n_id)), (store.grad_rows, None)):
        branches = range(table.data.size(1))
        decoded = torch.cat([table.codebook[j, table.data[n_id, j].long()] for j in branches], 1)[:, :7]
        assert decoded.isfinite().all() and decoded.any()
        if read is not None:
            assert torch.equal(read, decoded)


def test_age_counts_pushes_since_a_nodes_own():
    store = NodeStore(5, 2, "fp32", grad=False)
    assert store.age.tolist() == [0] * 5
    for n_id in ([0, 1], [1, 2], [4]):
        store.push(torch.tensor(n_id), torch.randn(len(n_id), 2))
    assert store.age.tolist() == [2, 1, 1, 3, 0]
    assert store.stats()["staleness"] == pytest.approx(7 / 5)


@pytest.mark.parametrize("codec", [*ROW_CODECS, "pq:d=2,k=4"])
def test_an_empty_push_does_nothing(codec):
    store = NodeStore(5, 4, codec, grad=True)
    store.push(torch.arange(5), torch.randn(5, 4), torch.randn(5, 4))
    before = stored(store)
    empty = torch.empty(0, 4)
    store.push(torch.empty(0, dtype=torch.int64), empty, empty)
    assert_same(stored(store), before)


@pytest.mark.parametrize("grad", [False, True], ids=["x", "x+g"])
@pytest.mark.parametrize(
    ("codec", "row"),
    [("fp32", 28), ("fp16", 14), ("int8", 7 + 4), ("int4", 4 + 4), ("pq:d=4,k=256", 2), ("pq:d=4,k=257", 4)],
)
def test_bytes(codec, row, grad):
    store = NodeStore(N, 7, codec, grad)
    if store.codebook is None and grad:
        row *= 2
    codebook = 0 if store.codebook is None else sum(b.nbytes for b in store.codebook.buffers())
    assert store.nbytes == N * row + 4 * N + 8 + codebook  # ages and the step's number
    assert store.dense_nbytes == 4 * 7 * N


@pytest.mark.parametrize("grad", [False, True], ids=["x", "x+g"])
@pytest.mark.parametrize("codec", [*ROW_CODECS, "pq:d=2,k=4"])
def test_a_saved_store_goes_on_bit_for_bit(codec, grad):
    generator = torch.Generator().manual_seed(1)

    def advance(store, steps, generator):
        for _ in range(steps):
            n_id = torch.randperm(N, generator=generator)[:17]
            x, g = torch.randn(17, 6, generator=generator), torch.randn(17, 6, generator=generator)
            store.push(n_id, x, g)

    store = NodeStore(N, 6, codec, grad, seed=5)
    advance(store, 4, generator)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    resumed = NodeStore(N, 6, codec, grad, seed=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(stored(resumed), stored(store))
    copied = torch.Generator()
    copied.set_state(generator.get_state())
    advance(store, 5, generator)
    advance(resumed, 5, copied)
    assert_same(stored(resumed), stored(store))
    assert resumed.stats() == store.stats()


@pytest.mark.parametrize("codec", ["int4", "pq:d=2,k=4"])
def test_a_copy_is_independent(codec):
    store = NodeStore(N, 4, codec, grad=True)
    store.push(torch.arange(N), torch.randn(N, 4), torch.randn(N, 4))
    before = stored(store)
    other = copy.deepcopy(store)
    assert other.handle != store.handle
    assert_same(stored(other), before)
    x = torch.randn(9, 4)
    torch.ops.vqgnn.record(other.handle, torch.arange(9), x, x)  # as a compiled backward does
    assert_same(stored(store), before)
    assert int(other.step) == 2


@pytest.mark.parametrize("codec", [*ROW_CODECS, "pq:d=2,k=30"])
def test_rows_that_are_no_numbers_are_kept_as_0(codec):
    store = NodeStore(N, 4, codec, grad=True)
    n_id, x, g = torch.arange(N), torch.randn(N, 4), torch.randn(N, 4)
    bad_x, bad_g = x.clone(), g.clone()
    bad_x[3, 1], bad_x[4], bad_g[5, 0] = torch.inf, torch.nan, -torch.inf
    for _ in range(3):
        store.push(n_id, bad_x, bad_g)
    assert all(table.isfinite().all() for table in store.buffers())
    assert not store.pull()[3:5].any() or codec.startswith("pq")
    for _ in range(80):  # codebooks are moving averages
        store.push(n_id, x, g)
    assert (store.pull() - x).norm() < 0.1 * x.norm()


def test_what_is_loaded_stays():
    """Pushes that are under way when a state is loaded do not write over it."""
    n = 100_000
    store = NodeStore(n, 32, "fp32", grad=False, place="host")
    before = stored(store)
    for _ in range(3):
        store.push(torch.arange(n), torch.ones(n, 32))
        store.load_state_dict(before)
        store.flush()
        assert not store.data.any()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_codes_without_whitening_are_exact_wherever_the_rows_are(offset):
    rows = torch.randn(25, 4) + offset
    store = NodeStore(200, 4, "pq:d=4,k=256", grad=False, whiten=False)
    x = rows[torch.arange(200) % 25]
    for _ in range(5):
        store.push(torch.arange(200), x)
    assert (store.pull() - x).abs().max() < 1e-4 + offset * 2**-22


def test_dtypes_are_the_codecs_whatever_the_model_becomes():
    for codec in ("fp32", "int8", "pq:d=2,k=4"):
        store = NodeStore(N, 4, codec, grad=True)
        store.push(torch.arange(N), torch.randn(N, 4), torch.randn(N, 4))
        before = stored(store)
        for change in (store.half, store.double, store.float, store.bfloat16):
            change()
            assert_same(stored(store), before)


@pytest.mark.parametrize("text", ["fp32", "fp16", "int8", "int4", "pq:d=4,k=256", "pq:d=1,k=32768"])
def test_codec_text_round_trip(text):
    assert str(Codec.parse(text)) == text
    assert Codec.parse(Codec.parse(text)) == Codec.parse(text)


def test_codec_defaults():
    assert Codec.parse("pq") == Codec.parse("pq:k=256") == Codec("pq", 4, 256)


@pytest.mark.parametrize(
    "text", ["", "fp8", "fp32:d=4", "pq:d=0", "pq:k=0", "pq:k=32769", "pq:d=4;k=2", "pq:d=x", "pq:d", "pq:bits=8"]
)
def test_bad_codec_is_named(text):
    with pytest.raises(ValueError, match=r"codec=.*use one of fp32, fp16, int8, int4 or pq:d=D,k=K"):
        Codec.parse(text)


@pytest.mark.parametrize("codec", ["fp32", "pq:d=2,k=4"])
def test_bad_pushes_are_named_and_change_nothing(codec):
    store = NodeStore(5, 4, codec, grad=True)
    store.push(torch.arange(5), torch.randn(5, 4), torch.randn(5, 4))
    before = stored(store)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], expected \[2, 4\]"):
        store.push(torch.arange(2), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"g has shape \[2, 3\], expected \[2, 4\]"):
        store.push(torch.arange(2), torch.randn(2, 4), torch.randn(2, 3))
    assert_same(stored(store), before)
    with pytest.raises(ValueError, match=r"n_id spans 4\.\.5.* 5 rows"):
        store.push(torch.tensor([4, 5]), torch.randn(2, 4), torch.randn(2, 4))


def test_codebook_options_need_a_codebook():
    assert NodeStore(5, 4, "pq:d=2,k=4", decay=0.5).codebook.decay == 0.5
    with pytest.raises(ValueError, match=r"\['decay'\] were given, but codec=fp32 has no codebook"):
        NodeStore(5, 4, "fp32", decay=0.5)
