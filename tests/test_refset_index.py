"""Neighbours against brute force in plain numpy: each kind of index, leakage, eps-balls, filters, pathways."""

import faiss
import numpy as np
import pytest

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.refsets import index as indexes
from ttrouting.refsets import neighbours as module
from ttrouting.refsets.neighbours import find, find_pathways
from ttrouting.refsets.vectors import Vectors, centring, unit


def clustered(count: int, dimension: int, seed: int, clusters: int = 200) -> np.ndarray:
    """Raw embeddings `[count, dimension]`: points around the same centres for every seed."""
    centres = np.random.default_rng(99).normal(size=(clusters, dimension))
    noise = np.random.default_rng(seed)
    return centres[noise.integers(clusters, size=count)] + noise.normal(size=(count, dimension))


def brute(rows, query, k, *, allowed=None, max_similarity=1.0, eps=None):
    """The nearest references by sorting all of them, one query, float64."""
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    found = []
    for number, row in enumerate(rows):
        cosine = row @ query / np.sqrt(row @ row) / np.sqrt(query @ query)
        inside = eps is None or np.linalg.norm(row / np.linalg.norm(row) - query / np.linalg.norm(query)) <= eps
        if cosine <= max_similarity and inside and (allowed is None or allowed[number]):
            found.append((-cosine, number))
    return [number for _, number in sorted(found)[:k]]


@pytest.fixture(scope="module")
def small() -> tuple[Vectors, np.ndarray]:
    """1500 references as a set stores them, and 20 queries."""
    vectors = Vectors(unit(clustered(1500, 24, 0)).astype(np.float16))
    return vectors, vectors.query(clustered(20, 24, 1))


@pytest.fixture(scope="module")
def large() -> tuple[Vectors, np.ndarray]:
    """12000 references, enough for IVF-PQ, of a dimension that PQ cannot cut into parts without padding."""
    vectors = Vectors(unit(clustered(12_000, 20, 0)).astype(np.float16))
    return vectors, vectors.query(clustered(100, 20, 1))


@pytest.fixture(scope="module")
def built(large) -> dict[str, faiss.Index]:
    return {kind: indexes.build(large[0], kind) for kind in indexes.KINDS}


# --- indexes ------------------------------------------------------------------------------------------


def test_flat_is_brute_force(small):
    vectors, queries = small[0], small[1][:5]
    similarity, ids = indexes.search(indexes.build(vectors, "flat"), queries, 7)
    for row, query in enumerate(queries):
        assert ids[row].tolist() == brute(vectors.rows, query, 7)
    expected = np.take_along_axis(queries @ vectors[:].T, ids, 1)
    np.testing.assert_allclose(similarity, expected, atol=1e-6)


@pytest.mark.parametrize("kind", indexes.KINDS)
def test_recall_and_exact_similarities(large, built, kind):
    vectors, queries = large
    found = find(vectors, queries, 10, index=built[kind], max_similarity=1)
    exact = queries @ vectors[:].T  # [B, N]
    truth = np.argsort(-exact, axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.index, truth, strict=True)])
    assert recall == 1 if kind == "flat" else recall > 0.9
    # an approximate index may miss one, and measures what it finds exactly
    np.testing.assert_allclose(found.similarity, np.take_along_axis(exact, found.index, 1), atol=1e-6)
    np.testing.assert_allclose(found.distance, np.sqrt(2 - 2 * found.similarity.astype(np.float64)), atol=1e-6)
    assert (np.diff(found.similarity, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", indexes.KINDS)
def test_dump_and_parse(large, built, kind):
    vectors, queries = large
    data = indexes.dump(built[kind])
    again = indexes.parse(data)
    assert again.ntotal == len(vectors)
    for before, after in zip(indexes.search(built[kind], queries, 5), indexes.search(again, queries, 5), strict=True):
        np.testing.assert_array_equal(before, after)
    assert indexes.dump(again) == data


@pytest.mark.parametrize("kind", indexes.KINDS)
def test_built_twice_is_the_same_and_leaves_the_threads(large, built, kind):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        assert indexes.dump(indexes.build(large[0], kind)) == indexes.dump(built[kind])
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("kind", indexes.KINDS)
@pytest.mark.parametrize("share", [0.5, 0.002])
def test_allowed(large, built, kind, share):
    vectors, queries = large[0], large[1][:4]
    allowed = np.random.default_rng(5).random(len(vectors)) < share
    _, ids = indexes.search(built[kind], queries, 5, allowed)
    assert allowed[ids[ids >= 0]].all()
    found = find(vectors, queries, 5, index=built[kind], allowed=allowed, max_similarity=1)
    assert allowed[found.index].all()
    truth = [brute(vectors.rows, q, 5, allowed=allowed) for q in queries]
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.index.tolist(), truth, strict=True)])
    # few enough of them are read through
    assert recall == 1 if kind == "flat" or share < 0.01 else recall > 0.8


def test_kind_by_size():
    sizes = [1, indexes.FLAT_UP_TO, indexes.FLAT_UP_TO + 1, indexes.HNSW_UP_TO, indexes.HNSW_UP_TO + 1]
    assert [indexes.kind_for(n) for n in sizes] == ["flat", "flat", "hnsw", "hnsw", "ivfpq"]


def test_refused_indexes(small):
    with pytest.raises(ConfigError, match="Did you mean 'hnsw'"):
        indexes.build(small[0], "hnws")
    with pytest.raises(ConfigError, match=r"9984 vectors, there are 1500.*'flat' or 'hnsw'"):
        indexes.build(small[0], "ivfpq")
    whole = indexes.dump(indexes.build(small[0], "flat"))
    for bad in (b"", b"nonsense", whole[: len(whole) // 2]):
        with pytest.raises(ArtefactError, match=r"are no FAISS index: .*Build the index again"):
            indexes.parse(bad)


# --- neighbours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("max_similarity", [1.0, 0.8, 0.6])
def test_nearest_without_leakage(small, indexed, max_similarity):
    vectors, queries = small[0], small[1][:5]
    index = indexes.build(vectors, "flat") if indexed else None
    found = find(vectors, queries, 6, index=index, max_similarity=max_similarity)
    for row, query in enumerate(queries):
        assert found.index[row].tolist() == brute(vectors.rows, query, 6, max_similarity=max_similarity)
    assert (found.similarity <= max_similarity).all()


def test_default_drops_above_095():
    rows = unit(np.array([[1, 0.2], [1, 0.4], [1, 0.3]]))  # cosines 0.981, 0.928, 0.958 to the query
    vectors = Vectors(rows)
    assert find(vectors, vectors.query(np.array([[1.0, 0.0]])), 2).index.tolist() == [[1, -1]]


@pytest.mark.parametrize("kind", ["flat", "hnsw", None])
@pytest.mark.parametrize("leaks", [50, 70, 1500])
def test_many_leaks_do_not_shorten_the_list(kind, leaks):
    """The first candidates are all leaks: fewer than one request holds, more than that, more than two."""
    noise = np.random.default_rng(3)
    query = noise.normal(size=32)
    near = query + 0.01 * noise.normal(size=(leaks, 32))
    rows = unit(np.concatenate([noise.normal(size=(5000, 32)), near]))
    rows = rows[noise.permutation(len(rows))].astype(np.float16)
    vectors = Vectors(rows)
    index = None if kind is None else indexes.build(vectors, kind)
    found = find(vectors, vectors.query(query[None]), 4, index=index)
    expected = brute(rows, query, 4, max_similarity=0.95)
    if kind == "hnsw":  # approximate, so it may miss one; the list is as long
        assert (found.index >= 0).all()
        assert len(set(expected) & set(found.index[0].tolist())) >= 3
    else:
        assert found.index[0].tolist() == expected


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_nothing_is_found_twice(kind):
    """A first request that ends inside of a tie is asked again, with more, and starts from nothing."""
    noise = np.random.default_rng(4)
    rows = noise.normal(size=(5000, 16))
    query = rows[0] + 0.3 * noise.normal(size=16)
    rows[100:300] = query + 0.8 * noise.normal(size=16)  # 200 copies behind some nearer ones
    vectors = Vectors(unit(rows).astype(np.float16))
    asked = vectors.query(query[None])
    place = int((vectors[:] @ asked[0] > vectors[100:101] @ asked[0] + 1e-5).sum())
    assert 1 <= place < 60
    found = find(vectors, asked, place + 3, index=indexes.build(vectors, kind), max_similarity=1)
    assert found.index[0].tolist() == brute(vectors.rows, asked[0], place + 3)


def test_an_index_that_finds_enough_is_believed(small, monkeypatch):
    """The set is not read through where the index sufficed."""
    vectors, queries = small
    index = indexes.build(vectors, "flat")
    monkeypatch.setattr(Vectors, "__getitem__", lambda self, which: self._compared(self.rows[which].astype("f4"))
                        if isinstance(which, np.ndarray) else pytest.fail("read through"))  # fmt: skip
    find(vectors, queries, 4, index=index)


def test_exhausted_set_pads():
    rows = unit(np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]))
    vectors = Vectors(rows)
    found = find(vectors, vectors.query(np.array([[2.0, 0.0]])), 3)
    assert found.index.tolist() == [[2, -1, -1]]
    assert found.distance[0, 0] == pytest.approx(np.sqrt(2))
    assert np.isinf(found.distance[0, 1:]).all()
    assert np.isnan(found.similarity[0, 1:]).all()


def test_reading_through_in_parts(small, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    vectors, queries = small[0], small[1][:5]
    allowed = np.random.default_rng(6).random(1500) < 0.4
    found = find(vectors, queries, 5, allowed=allowed, max_similarity=0.7)
    for row, query in enumerate(queries):
        assert found.index[row].tolist() == brute(vectors.rows, query, 5, allowed=allowed, max_similarity=0.7)


def test_a_vector_is_no_more_than_like_itself(small):
    """A cosine that is rounded to just above 1 is no leak at max_similarity=1, and no distance is imaginary."""
    vectors, _ = small
    found = find(vectors, vectors[:400], 1, max_similarity=1)
    assert found.index[:, 0].tolist() == list(range(400))
    assert (found.similarity <= 1).all()
    assert np.isfinite(found.distance).all()


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("eps", [0.4, 0.9, 1.1])
def test_eps_ball(small, indexed, eps):
    vectors, queries = small[0], small[1][:5]
    index = indexes.build(vectors, "flat") if indexed else None
    for k in (8, 2000):  # a cap that is reached, and one above the size of the set
        found = find(vectors, queries, k, index=index, eps=eps, max_similarity=0.9)
        assert found.index.shape == (len(queries), k)
        for row, query in enumerate(queries):
            expected = brute(vectors.rows, query, k, eps=eps, max_similarity=0.9)
            assert found.index[row].tolist() == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize("kind", ["flat", "hnsw", None])
def test_ties_go_to_the_lower_number(kind):
    """300 copies of one vector among others, in all places: more than an index is asked for at first."""
    noise = np.random.default_rng(4)
    rows = noise.normal(size=(3000, 16))
    copies = np.sort(noise.choice(3000, 300, replace=False))
    rows[copies] = rows[copies[0]]
    vectors = Vectors(unit(rows).astype(np.float16))
    index = None if kind is None else indexes.build(vectors, kind)
    query = vectors.query(rows[copies[:1]] + 0.3 * noise.normal(size=(1, 16)))
    assert find(vectors, query, 5, index=index, max_similarity=1).index[0].tolist() == copies[:5].tolist()


@pytest.mark.parametrize("kind", indexes.KINDS)
def test_a_batch_is_its_queries_one_by_one(large, built, kind):
    vectors, queries = large
    batch = find(vectors, queries[:20], 5, index=built[kind], max_similarity=0.8)
    for row in range(20):
        one = find(vectors, queries[row : row + 1], 5, index=built[kind], max_similarity=0.8)
        for name in ("index", "similarity", "distance"):
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(batch, name)[row])


def test_no_queries(small):
    assert find(small[0], small[1][:0], 3).index.shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must lie between 1 and .* 1500; got 0"),
        ({"k": 1501}, "1500; got 1501"),
        ({"k": 11, "allowed": np.arange(1500) < 10}, "may be found, 10; got 11"),
        ({"k": 1, "allowed": np.zeros(1500, bool)}, "may be found, 0; got 1"),
        ({"allowed": np.ones(3, bool)}, r"\[1500\] bool, got \[3\]"),
        ({"allowed": np.ones(1500)}, "float64"),
        ({"max_similarity": 1.5}, "from -1 to 1, got 1.5"),
        ({"max_similarity": float("nan")}, "got nan"),
        ({"eps": 0.0}, "above 0, got 0.0"),
        ({"eps": float("nan")}, "got nan"),
    ],
)
def test_refused_options(small, options, message):
    with pytest.raises(ConfigError, match=message):
        find(small[0], small[1], **{"k": 3, **options})


# --- pathways -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pathways(small) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Scores of 4 layers and 6 experts, queries at two of the layers."""
    noise = np.random.default_rng(8)
    omega = noise.dirichlet(np.ones(6), size=(1500, 4)).astype(np.float16)
    return omega, noise.dirichlet(np.ones(6), size=(20, 2)).astype(np.float32), [1, 3]


@pytest.mark.parametrize("chunk", [100, 16384])
def test_pathways_against_a_loop(small, pathways, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    (vectors, embedded), (omega, queries, layers) = small, pathways
    allowed = np.random.default_rng(2).random(1500) < 0.7
    found = find_pathways(
        omega, queries, layers, 5, allowed=allowed, vectors=vectors, embedded=embedded, max_similarity=0.3
    )
    dropped = 0
    for row in range(len(queries)):
        apart = [np.linalg.norm(np.float64(omega[i, layers]) - np.float64(queries[row])) for i in range(1500)]
        cosine = np.float64(vectors[:]) @ np.float64(embedded[row])
        fine = [i for i in range(1500) if allowed[i] and cosine[i] <= 0.3]
        dropped += int(allowed.sum()) - len(fine)
        expected = sorted(fine, key=lambda i: (apart[i], i))[:5]
        assert found.index[row].tolist() == expected
        np.testing.assert_allclose(found.distance[row], [apart[i] for i in expected], rtol=1e-5)
        np.testing.assert_allclose(found.similarity[row], cosine[expected], atol=1e-6)
    assert dropped > 1000


def test_pathways_without_embeddings(pathways):
    omega, _, layers = pathways
    found = find_pathways(omega, omega[:3][:, layers], layers, 2)
    assert found.index[:, 0].tolist() == [0, 1, 2]  # themselves, nothing is dropped
    assert (found.distance[:, 0] == 0).all()
    assert np.isnan(found.similarity).all()


def test_refused_pathways(pathways):
    omega, queries, layers = pathways
    with pytest.raises(ConfigError, match=r"\[20, 2, 6\] for layers \[1, 4\].*4 layers of 6 experts"):
        find_pathways(omega, queries, [1, 4], 2)
    with pytest.raises(ConfigError, match=r"\[20, 2, 5\]"):
        find_pathways(omega, queries[:, :, :5], layers, 2)
    with pytest.raises(ConfigError, match="not finite"):
        find_pathways(omega, queries * np.nan, layers, 2)
    with pytest.raises(ConfigError, match="1500; got 1501"):
        find_pathways(omega, queries, layers, 1501)


# --- vectors ------------------------------------------------------------------------------------------


def test_centred_vectors_against_numpy():
    raw = np.random.default_rng(0).normal(size=(40_000, 5)) * [1, 2, 3, 4, 0] + [50, 0, 0, 0, 9]
    rows = unit(raw).astype(np.float16)
    mean, scale = centring(rows)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), atol=1e-6)
    np.testing.assert_allclose(scale, wide.std(0), rtol=1e-5)
    vectors = Vectors(rows, mean, scale)
    expected = (wide[:50] - wide.mean(0)) / wide.std(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[:50], expected, atol=1e-4)
    np.testing.assert_array_equal(vectors[np.array([7, 3])], vectors[:50][[7, 3]])
    query = (raw[:4] / np.linalg.norm(raw[:4], axis=1, keepdims=True) - mean) / scale
    np.testing.assert_allclose(
        vectors.query(raw[:4]), query / np.linalg.norm(query, axis=1, keepdims=True), atol=1e-5
    )


def test_centring_tells_parallel_vectors_apart():
    raw = np.random.default_rng(0).normal(size=(500, 8)) * 0.1 + 5
    rows = unit(raw)
    assert (rows @ rows.T).min() > 0.99
    centred = Vectors(rows, *centring(rows))
    assert abs(np.mean(centred[:] @ centred[:].T)) < 0.05


def test_a_dimension_that_does_not_vary_and_a_row_that_is_the_mean():
    rows = np.array([[0.6, 0.8], [0.6, 0.8]], dtype=np.float32)
    _, scale = centring(rows)
    assert scale.tolist() == [1, 1]
    assert np.abs(Vectors(rows, rows[0], scale)[:]).max() == 0


def test_norms_beyond_the_range_of_the_type():
    raw = np.array([[300.0, 400.0], [0.0, 60000.0]], dtype=np.float16)
    np.testing.assert_allclose(unit(raw), [[0.6, 0.8], [0, 1]], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_refused_embeddings(bad):
    raw = np.ones((5, 3))
    raw[[2, 4]] = bad
    with pytest.raises(ConfigError, match=r"2 of 5 embeddings .*record 2, (is zero|has numbers that are not finite)"):
        unit(raw)
    with pytest.raises(ConfigError, match="query 2"):
        Vectors(np.eye(3)).query(raw)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 1, 3)])
def test_refused_shapes(shape):
    with pytest.raises(ConfigError, match=r"this set compares \[B, 3\]"):
        Vectors(np.eye(3)).query(np.ones(shape))
