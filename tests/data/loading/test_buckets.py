import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.loading.buckets import Size, bucket_sizes, nearest_bucket


@given(resolution=st.integers(4, 24), step=st.sampled_from([8, 16, 64]), aspect=st.floats(1, 6))
def test_buckets_have_the_area_and_the_sides_they_should(resolution, step, aspect):
    resolution *= step
    result = bucket_sizes(resolution, step, aspect)
    assert (resolution, resolution) in result
    assert set(result) == {(h, w) for w, h in result}
    assert len(set(result)) == len(result)
    for width, height in result:
        assert width % step == height % step == 0
        assert max(width / height, height / width) <= aspect
        assert abs(width * height / resolution**2 - 1) <= 0.5 * step / min(width, height)


def test_buckets_as_written_down():
    assert bucket_sizes(512, 64, 1.0) == [(512, 512)]
    assert bucket_sizes(512, 64, 2.0) == [(384, 704), (448, 576), (512, 512), (576, 448), (704, 384)]


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000))
def test_the_nearest_bucket_by_the_logarithm_of_the_form(width, height):
    buckets = bucket_sizes(512, 64, 3.0)
    chosen = buckets[int(nearest_bucket(np.array([width], np.uint32), np.array([height], np.uint32), buckets)[0])]

    def distance(size: Size) -> float:
        return abs(np.log(width / height) - np.log(size[0] / size[1]))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-9
