from collections.abc import Iterator

import numpy as np
import pytest
import torch

from framework.evaluate.metrics.features import RandomConv3d
from framework.evaluate.metrics.frechet import Moments, frechet_distance


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take ten times as long as one alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def moments_of(*parts: np.ndarray) -> Moments:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.update(part)
    return moments


def with_moments(mean: np.ndarray, root: np.ndarray, count: int = 64) -> np.ndarray:
    """(count, D) vectors whose sample mean and covariance are exactly mean and root root^T."""
    x = np.random.default_rng(0).normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + white @ root.T


def test_equal_sets_are_at_distance_zero():
    features = np.random.default_rng(0).normal(size=(50, 8)) * 3 + 10
    result = frechet_distance(moments_of(features), moments_of(features[::-1]))
    assert result.distance == pytest.approx(0, abs=1e-9)
    assert (result.num_a, result.num_b) == (50, 50)


def test_shifted_and_scaled_gaussians_have_the_known_distance():
    mean, root = np.zeros(3), np.diag([1.0, 2.0, 3.0])
    base = moments_of(with_moments(mean, root))
    shifted = moments_of(with_moments(np.array([3.0, 0.0, 4.0]), root))
    assert frechet_distance(base, shifted).distance == pytest.approx(25.0)
    # With commuting covariances it is the distance of means and of standard deviations.
    scaled = moments_of(with_moments(mean, 2 * root, count=100))
    result = frechet_distance(base, scaled)
    assert result.distance == pytest.approx(1 + 4 + 9)
    assert (result.num_a, result.num_b) == (64, 100)


def test_turned_gaussians_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(1)
    root_a, root_b = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    a, b = (
        moments_of(with_moments(np.zeros(4), root_a)),
        moments_of(with_moments(np.ones(4), root_b)),
    )
    # tr (A B)^(1/2) from the eigenvalues of A B, which are real and positive here.
    eigenvalues = np.linalg.eigvals(a.covariance @ b.covariance).real
    expected = 4 + np.trace(a.covariance + b.covariance) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b).distance == pytest.approx(expected)
    assert frechet_distance(b, a).distance == pytest.approx(expected)


def test_fewer_samples_than_dimensions_are_no_trouble():
    features = np.random.default_rng(2).normal(size=(6, 40))
    moved = frechet_distance(moments_of(features), moments_of(features + 1.0))
    assert moved.distance == pytest.approx(40.0)


def test_streaming_and_merging_equal_one_pass():
    # A large offset: naive sums of squares would lose the covariance in float32.
    features = np.random.default_rng(3).normal(size=(101, 5)).astype(np.float32) + 1000
    whole = moments_of(features)
    streamed = moments_of(*np.split(features, [1, 2, 40, 40]))
    left, right = moments_of(features[:30]), moments_of(features[30:])
    left.merge(right)
    empty = Moments(5)
    empty.merge(whole)
    empty.merge(Moments(5))
    for other in (streamed, left, empty):
        assert other.count == 101
        np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(other.covariance, whole.covariance, rtol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-9)


def test_merging_leaves_the_other_part_as_it_was():
    a, b = moments_of(np.eye(3)), moments_of(np.ones((4, 3)))
    a.merge(b)
    assert b.count == 4
    np.testing.assert_array_equal(b.mean, 1.0)


def test_one_vector_and_broken_vectors_are_refused():
    two, one = moments_of(np.eye(2)), moments_of(np.ones((1, 2)))
    with pytest.raises(ValueError, match="1 vectors"):
        frechet_distance(two, one)
    with pytest.raises(ValueError, match="0 vectors"):
        frechet_distance(Moments(2), two)
    with pytest.raises(ValueError, match="not finite"):
        moments_of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        Moments(2).update(np.zeros((3, 4)))


def squares(speed: int, seed: int, count: int = 24) -> list[np.ndarray]:
    """Videos of a white square that moves right, of mixed sizes and durations."""
    rng = np.random.default_rng(seed)
    videos = []
    for _ in range(count):
        frames = np.zeros((rng.integers(8, 20), 32, rng.choice([32, 48]), 3), np.uint8)
        x, y = rng.integers(0, 20, size=2)
        for t, frame in enumerate(frames):
            left = (x + speed * t) % 20
            frame[y : y + 10, left : left + 10] = 255
        videos.append(frames)
    return videos


def test_random_features_take_any_video_and_are_fixed():
    features = RandomConv3d()
    video = squares(1, seed=0, count=1)[0]
    vector = features(video)
    assert vector.shape == (features.dim,)
    assert vector.dtype == np.float64
    np.testing.assert_array_equal(vector, RandomConv3d()(video))
    for shape in [(1, 8, 8), (3, 240, 135), (100, 16, 48)]:
        assert np.isfinite(features(np.zeros((*shape, 3), np.uint8))).all()
    with pytest.raises(ValueError, match="uint8"):
        features(video.astype(np.float32))


def test_random_features_tell_still_videos_from_moving_ones():
    features = RandomConv3d()

    def moments(speed: int, seed: int) -> Moments:
        return moments_of(np.stack([features(video) for video in squares(speed, seed)]))

    real = moments(2, seed=0)
    alike = frechet_distance(real, moments(2, seed=1)).distance
    still = frechet_distance(real, moments(0, seed=1)).distance
    assert still > 3 * alike
