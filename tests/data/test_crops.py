"""phreg.data.crops: an order that forgets nothing and repeats nothing, crops, loading, what is broken."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise, saved_dataset, tar_of
from PIL import Image
from torchvision.transforms import v2 as transforms

from phreg.backbones.resolve import adapt
from phreg.data.crops import (
    MEASURED_AT_ONCE,
    BrokenImages,
    Crops,
    MixedCrops,
    Skipped,
    center_crop,
    denormalise,
    larger,
    loader,
    normalise,
)
from phreg.data.sampling import Order, holdout, split, subsample, subsample_indices
from phreg.data.sources import Subset, open_images
from phreg.errors import DataError
from phreg.methods import resolve

quick = settings(max_examples=40)


# --- Crops


def test_a_random_crop_is_a_window_of_what_torchvision_resizes():
    photo = Image.fromarray(skimage.data.astronaut()[:300, :500])
    source = InMemory([photo])
    resized = transforms.Resize(64, transforms.InterpolationMode.BICUBIC, antialias=True)(photo)
    resized = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    assert resized.shape == (3, 64, 106)
    starts = set()
    for epoch in range(20):
        square = Crops(source, 64).batch([(epoch, 0)]).images[0]
        matches = [x for x in range(43) if torch.equal(square, resized[:, :, x : x + 64])]
        assert len(matches) == 1
        starts.add(matches[0])
    assert len(starts) > 10
    assert min(starts) < 10
    assert max(starts) > 32


def test_a_centre_crop_is_torchvisions():
    photo = Image.fromarray(skimage.data.astronaut()[:301, :200])
    steps = [
        transforms.Resize(32, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(32),
    ]
    expected = np.array(transforms.Compose(steps)(photo))
    square = Crops(InMemory([photo]), 32, crop="centre").batch([(0, 0)]).images[0]
    assert (square.permute(1, 2, 0).numpy() == expected).all()


class InMemory:
    """A source of images held in memory."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"image {index}"

    def read(self, index):
        return self.images[index]


@quick
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40), epoch=st.integers(0, 9))
def test_a_crop_is_square_repeatable_and_keeps_the_whole_shorter_side(width, height, size, epoch):
    # Columns count up along the longer side; the shorter side is constant. So a crop is constant along it.
    ramp = np.linspace(0, 255, max(width, height)).astype(np.uint8)
    values = np.tile(ramp, (min(width, height), 1)) if width >= height else np.tile(ramp, (width, 1)).T
    source = InMemory([Image.fromarray(np.repeat(values[..., None], 3, 2))])
    state = torch.get_rng_state()
    crops = Crops(source, size, seed=3)
    square = crops.batch([(epoch, 0)]).images
    assert square.shape == (1, 3, size, size)
    assert square.dtype == torch.uint8
    assert torch.equal(square, crops.batch([(epoch, 0)]).images)
    assert torch.equal(torch.get_rng_state(), state)
    across = square if width >= height else square.mT
    # One level of 255: antialiasing rounds each pass.
    assert (across.int() - across[:, :, :1].int()).abs().max() <= 1


@quick
@given(
    picture=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_a_crop_of_any_shape_is_the_middle_of_the_picture_resampled_to_just_cover_it(picture, size):
    (rows, cols), (width, height) = size, picture
    photo = noise((width, height))
    # By the exact ratio of whole numbers: the side with less to spare just fits, the other is cut.
    fits_width = width * rows <= height * cols
    new = (cols, cols * height // width) if fits_width else (rows * width // height, rows)
    left, top = round((new[0] - cols) / 2), round((new[1] - rows) / 2)
    resized = photo.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + cols, top + rows))

    cut = Crops(InMemory([photo]), size, crop="centre").batch([(0, 0)]).images

    assert cut.shape == (1, 3, rows, cols)
    assert np.array_equal(cut[0].permute(1, 2, 0).numpy(), np.asarray(resized))


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (60, 60)])
@pytest.mark.parametrize("margin", [(0, 0), (8, 8), (4, 12)], ids=str)
def test_surroundings_are_cut_with_the_square_and_leave_it_in_their_middle(shape, margin):
    source = InMemory([noise(shape)])
    rows, cols = 20 + 2 * margin[0], 20 + 2 * margin[1]
    whole = Crops(source, 20, crop="centre", margin=margin).batch([(0, 0)]).images
    assert whole.shape == (1, 3, rows, cols)
    scale = max(cols / shape[0], rows / shape[1])
    width, height = (round(scale * side) for side in shape)
    left, top = round((width - cols) / 2), round((height - rows) / 2)
    resized = source.read(0).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + cols, top + rows)))
    assert np.array_equal(whole[0].permute(1, 2, 0).numpy(), expected)
    square = center_crop(whole, margin)
    assert square.shape == (1, 3, 20, 20)
    assert torch.equal(square[0, :, 0, 0], whole[0, :, margin[0], margin[1]])


def test_seed_epoch_and_index_each_move_the_crop():
    wide = InMemory([noise((400, 20))] * 2)
    base = Crops(wide, 20, seed=0).batch([(0, 0)]).images
    assert not torch.equal(base, Crops(wide, 20, seed=1).batch([(0, 0)]).images)
    assert not torch.equal(base, Crops(wide, 20, seed=0).batch([(1, 0)]).images)
    assert not torch.equal(base, Crops(wide, 20, seed=0).batch([(0, 1)]).images)


def test_an_unreadable_image_is_replaced_by_the_next_readable_one_and_reported(half_broken):
    batch = Crops(open_images(half_broken), 16).batch([(0, 0), (0, 1), (0, 5)])
    assert batch.indices.tolist() == [0, 3, 0]
    assert [Path(name).name for name in batch.names] == ["0.png", "3.png", "0.png"]
    assert [Path(name).name for name, _ in batch.skipped] == ["1.png", "2.png", "5.png"]
    assert "it is empty" in batch.skipped[0].reason


def test_the_fixed_crop_of_an_image_is_the_same_for_whichever_image_it_stands_in():
    source = InMemory([Image.new("RGB", (1, 20_000)), noise((400, 20))])  # the first is unreadable
    first = Crops(source, 224).batch([(0, 1)]).images[0]
    for epoch in range(3):
        asked, stood_in = Crops(source, 224, crop="fixed").batch([(epoch, 1), (epoch, 0)]).images
        assert torch.equal(asked, first)
        assert torch.equal(stood_in, first)


def test_an_image_too_narrow_to_be_resampled_is_unreadable_not_a_memory_bomb():
    source = InMemory([Image.new("RGB", (1, 20_000)), noise()])
    batch = Crops(source, 224).batch([(0, 0)])  # 224 x 4,480,000 pixels: a gigapixel
    assert batch.indices.tolist() == [1]
    assert "1x20000 is so narrow" in batch.skipped[0].reason


def test_a_jpeg_beyond_pils_limit_is_trained_on(tmp_path):
    (tmp_path / "photos").mkdir()
    # Grey, a tenth black at the top: fast to encode, and its scale can be told.
    large = Image.new("L", (12_000, 10_000), 128)
    large.paste(0, (0, 0, 12_000, 1_000))
    large.save(tmp_path / "photos" / "a.jpg", quality=30)
    batch = Crops(open_images(tmp_path / "photos"), 40).batch([(0, 0)])
    assert not batch.skipped
    column = batch.images[0, 0, :, 20]
    assert column[:3].max() < 20  # 4 of 40 rows are black; the bicubic kernel blurs the one beside the edge
    assert (column[5:].int() - 128).abs().max() < 20


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp", "ppm"])
def test_large_images_of_other_formats_are_trained_and_measured_on_at_a_reduced_size(tmp_path, suffix):
    tile = noise((40, 40))
    options = {"lossless": True} if suffix == "webp" else {}
    tile.resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / f"a.{suffix}", **options)
    source = open_images(tmp_path, max_megapixels=(80 * 80 - 1) / 1e6)
    for crop in ("random", "centre"):
        batch = Crops(source, 40, crop=crop).batch([(0, 0)])
        assert not batch.skipped
        assert (batch.images[0].permute(1, 2, 0).numpy() == np.asarray(tile)).all()


def test_images_beyond_the_memory_allowed_are_skipped_and_counted(tmp_path):
    tile = noise((40, 40))
    for number in range(3):
        tile.resize((160, 160)).save(tmp_path / f"{number}.webp")
        tile.save(tmp_path / f"{number}.png")
    # 24 bytes for each of 1700 pixels: those of 160x160 pixels take 16 each in a WEBP.
    batch = Crops(open_images(tmp_path, max_megapixels=0.0017), 40).batch([(0, 1), (0, 3)])
    assert batch.names == (str(tmp_path / "1.png"), str(tmp_path / "2.png"))
    assert [Path(one.name).name for one in batch.skipped] == ["0.webp", "1.webp"]
    assert all("it has 0.0256 megapixels (160x160) as WEBP" in one.reason for one in batch.skipped)
    broken = BrokenImages(6, max_broken=0.4)
    broken.add(batch)
    assert len(broken.reasons) == 2
    with pytest.raises(DataError, match=r"too many unreadable images: 3 of 6"):
        broken.add(Crops(open_images(tmp_path, max_megapixels=0.0017), 40).batch([(0, 5)]))


def test_a_run_reads_its_images_within_the_limit_asked_for(tmp_path):
    for folder in ("photos", "others"):
        (tmp_path / folder).mkdir()
        for number in range(6):
            noise((64, 64), number).save(tmp_path / folder / f"{number}.jpg")
    settings = {"data.max_megapixels": 0.002, "measure.source": str(tmp_path / "others")}
    source = open_images(tmp_path / "photos", max_megapixels=0.002)
    for part in split(source, resolve(None, settings))[:2]:
        assert part.read(0).size == (32, 32)


def test_the_search_for_a_readable_image_ends(tmp_path, monkeypatch):
    for number in range(9):
        (tmp_path / f"{number}.jpg").touch()
    message = r"found 9 unreadable images in a row:\n(.*it is empty.*\n){5}  and 4 more\nreplace them"
    with pytest.raises(DataError, match=message):
        Crops(open_images(tmp_path), 16).batch([(0, 0)])
    monkeypatch.setattr("phreg.data.crops.LONGEST_GAP", 3)
    with pytest.raises(DataError, match="found 3 unreadable"):
        Crops(open_images(tmp_path), 16).batch([(0, 0)])


def test_normalising_is_what_torchvision_does():
    images = torch.randint(
        0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = transforms.functional.normalize(images.float() / 255, list(mean), list(std))
    assert torch.equal(normalise(images, mean, std), expected)


# --- Order

sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 30)).map(
    lambda t: (t[0], t[1], t[0] * t[1] + t[2])  # batch size, world size, images: one global batch at least
)


@quick
@given(sizes=sizes, seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_image_at_most_once_and_leaves_out_less_than_a_batch(sizes, seed, epoch):
    batch_size, world_size, num_images = sizes
    orders = [Order(num_images, batch_size, seed, rank, world_size) for rank in range(world_size)]
    steps = orders[0].steps_per_epoch
    seen = [key for order in orders for s in range(steps) for key in order.batch(epoch * steps + s)]
    assert {key[0] for key in seen} == {epoch}
    assert len(seen) == len(set(seen)) == steps * batch_size * world_size
    assert num_images - len(seen) < batch_size * world_size
    assert {index for _, index in seen} <= set(range(num_images))


@quick
@given(sizes=sizes, seed=st.integers(0, 99), step=st.integers(0, 60))
def test_the_ranks_batches_one_behind_the_other_are_the_batch_of_one_process(sizes, seed, step):
    batch_size, world_size, num_images = sizes
    ranks = [Order(num_images, batch_size, seed, rank, world_size).batch(step) for rank in range(world_size)]
    alone = Order(num_images, batch_size * world_size, seed)
    assert [key for keys in ranks for key in keys] == alone.batch(step)
    assert all(len(keys) == batch_size for keys in ranks)
    assert all(key[0] == alone.epoch(step) for key in alone.batch(step))


def test_epochs_and_seeds_differ_in_order():
    orders = [Order(50, 50, seed).batch(step) for seed in (0, 1) for step in (0, 1)]
    indices = [tuple(index for _, index in keys) for keys in orders]
    assert len(set(indices)) == 4
    assert indices[0] != tuple(range(50))


def test_too_few_images_for_a_batch_are_counted():
    with pytest.raises(
        DataError, match="8 images on each of 2 processes = 16, found 15 to train on; add images"
    ):
        Order(15, 8, world_size=2)


mixed = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 4), st.integers(0, 12)).map(
    lambda t: (*t[:3], t[0] * t[1] * t[2] + t[3])  # batch size, world size, sizes, images: a batch of each
)


@quick
@given(mixed=mixed, seed=st.integers(0, 99), step=st.integers(0, 60))
def test_of_several_sizes_each_batch_has_images_of_one_and_the_sizes_take_turns(mixed, seed, step):
    batch_size, world_size, num_sizes, num_images = mixed
    orders = [Order(num_images, batch_size, seed, rank, world_size, num_sizes) for rank in range(world_size)]
    assert all(len(order.batch(step)) == batch_size for order in orders)
    assert {index % num_sizes for order in orders for _, index in order.batch(step)} == {step % num_sizes}
    alone = Order(num_images, batch_size * world_size, seed, num_sizes=num_sizes)
    assert [key for order in orders for key in order.batch(step)] == alone.batch(step)


@quick
@given(mixed=mixed, seed=st.integers(0, 99), steps=st.integers(0, 60))
def test_of_several_sizes_no_image_is_left_out_of_any_pass(mixed, seed, steps):
    batch_size, _, num_sizes, num_images = mixed
    order = Order(num_images, batch_size, seed, num_sizes=num_sizes)
    seen = [key for step in range(steps * num_sizes) for key in order.batch(step)]
    assert len(set(seen)) == len(seen), "an image is seen once in a pass"
    for size in range(num_sizes):
        images = range(size, num_images, num_sizes)
        shown = [key for key in seen if key[1] in images]
        full_passes, rest = divmod(steps * batch_size, len(images))
        for epoch in range(full_passes):
            assert {index for passed, index in shown if passed == epoch} == set(images)
        assert len(shown) == full_passes * len(images) + rest


def test_several_sizes_take_as_many_steps_as_one_and_are_shuffled_by_pass_seed_and_size():
    assert Order(50, 8, num_sizes=3).steps_per_epoch == Order(50, 8).steps_per_epoch
    batches = [Order(60, 20, seed, num_sizes=3).batch(step) for seed in (0, 1) for step in range(6)]
    places = [tuple(index // 3 for _, index in keys) for keys in batches]
    assert len(set(places)) == 12, "two passes over three sizes, by two seeds"


def test_too_few_images_of_a_size_are_counted():
    with pytest.raises(DataError, match="= 8, found 23 to train on, 7 of each size; add images"):
        Order(23, 4, world_size=2, num_sizes=3)


@given(num_images=st.integers(0, 400), count=st.integers(0, 60))
@quick
def test_held_out_images_are_apart_from_the_rest_and_evenly_spaced(num_images, count):
    train, held = holdout(num_images, count)
    assert sorted(train + held) == list(range(num_images))
    assert held == sorted(set(held))
    assert len(held) == (count if num_images >= 5 * count else num_images // 5)
    if held:
        gaps = np.diff([-(held[0] + 1), *held, 2 * num_images - held[-1]])  # mirrored at both ends
        assert gaps.max() - gaps.min() <= 2


@given(total=st.integers(0, 3000), count=st.integers(0, 1200))
@quick
def test_a_subsample_covers_both_ends_in_gaps_that_differ_by_at_most_one(total, count):
    found = list(subsample_indices(total, count))
    assert len(found) == min(total, count)
    if found:
        gaps = np.diff([*found, total])  # the last stretch ends where the images end
        assert found[0] == 0
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("total", "count", "last"), [(999, 500, 997), (100, 64, 98), (5, 9, 4)])
def test_a_subsample_covers_both_ends(total, count, last):
    chosen = subsample(InMemory([None] * total), count)
    assert (chosen.name(0), chosen.name(len(chosen) - 1)) == ("image 0", f"image {last}")


# --- Crops of several sizes


def test_of_several_sizes_an_image_is_cut_at_its_own():
    source = InMemory([noise((90, 60), seed) for seed in range(7)])
    parts = tuple(Crops(source, size, 3, "random", (4, 4), 3) for size in (16, (24, 32), 40))
    for index, shape in enumerate([(24, 24), (32, 40), (48, 48), (24, 24), (32, 40), (48, 48), (24, 24)]):
        batch = MixedCrops(parts).batch([(1, index)])
        assert batch.images.shape == (1, 3, *shape)
        alone = Crops(source, parts[index % 3].size, 3, margin=(4, 4)).batch([(1, index)])
        assert torch.equal(batch.images, alone.images)


def test_an_unreadable_image_is_replaced_by_one_of_its_size():
    class Broken(InMemory):
        def read(self, index):
            if index in (0, 5, 6):
                raise DataError(f"{index} is broken")
            return super().read(index)

    source = Broken([noise((60, 60), seed) for seed in range(8)])
    crops = MixedCrops(tuple(Crops(source, size, num_sizes=3) for size in (16, 24, 32)))
    for asked, found, skipped in ((0, 3, 1), (6, 3, 2), (5, 2, 1)):  # of 8 images, 6 and 5 are the last
        batch = crops.batch([(0, asked)])
        assert (batch.indices.tolist(), len(batch.skipped)) == ([found], skipped)
        assert batch.images.shape[-1] == (16, 24, 32)[asked % 3]
    only_broken = MixedCrops(tuple(Crops(source, size, num_sizes=6) for size in (16, 24, 32, 40, 48, 56)))
    with pytest.raises(DataError, match="found 1 unreadable images in a row"):
        only_broken.batch([(0, 5)])


# --- Loading


def collect(crops, order, start, stop, **options):
    batches = list(loader(crops, order, start, stop, **options))
    return [
        (batch.images, batch.indices.tolist(), tuple(batch.names), tuple(batch.skipped)) for batch in batches
    ]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]


def test_reader_processes_change_nothing_and_touch_no_random_state(half_broken):
    crops, order = Crops(open_images(half_broken), 16), Order(6, 2)
    state = torch.get_rng_state()
    alone = collect(crops, order, 0, 7, workers=0)
    assert_same(collect(crops, order, 0, 7, workers=2), alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == 7
    assert alone[0][0].shape == (2, 3, 16, 16)
    assert all(isinstance(skipped, Skipped) for batch in alone for skipped in batch[3])


def test_spawned_readers_read_the_same_from_every_kind_of_source(mixed_photos, tmp_path):
    # One spawn for all sources: each costs an import of torch.
    folder = open_images(mixed_photos)
    shards = open_images(tar_of(mixed_photos, tmp_path / "a.tar"))
    contents = [Path(folder.name(i)).read_bytes() for i in range(len(folder))]
    saved = open_images(saved_dataset(tmp_path / "saved", contents))
    order = Order(6, 3)
    for source in (folder, shards, saved):
        copy = pickle.loads(pickle.dumps(source))
        assert_same(
            collect(Crops(copy, 16), order, 0, 2, workers=0),
            collect(Crops(source, 16), order, 0, 2, workers=0),
        )
    crops = Crops(Subset(folder, list(range(6))), 16)
    spawned = collect(crops, order, 0, 3, workers=1, start_method="spawn")
    assert_same(spawned, collect(crops, order, 0, 3, workers=0))


@pytest.mark.parametrize("kind", ["shards", "saved"])
def test_forked_readers_do_not_disturb_each_other(mixed_photos, tmp_path, kind):
    folder = open_images(mixed_photos)
    if kind == "shards":
        source = open_images(tar_of(mixed_photos, tmp_path / "a.tar"))
    else:
        source = open_images(
            saved_dataset(tmp_path / "saved", [Path(folder.name(i)).read_bytes() for i in range(6)])
        )
    source.read(0)  # the parent has read before: no file position may be shared
    order = Order(6, 2)
    assert [batch[1] for batch in collect(Crops(source, 16), order, 0, 9, workers=2)] == [
        [index for _, index in order.batch(step)] for step in range(9)
    ]
    assert_same(
        collect(Crops(source, 16), order, 0, 9, workers=2), collect(Crops(source, 16), order, 0, 9, workers=0)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_at_any_step_reads_what_it_would_have_read(mixed_photos, workers):
    crops, order = Crops(open_images(mixed_photos), 16), Order(6, 2, seed=5)
    whole = collect(crops, order, 0, 7, workers=0)
    for start in (1, 3, 7):
        assert_same(collect(crops, order, start, 7, workers=workers), whole[start:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_in_a_reader_keeps_its_text(tmp_path, workers):
    for number in range(2):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(DataError) as caught:
        list(loader(Crops(open_images(tmp_path), 16), Order(2, 2), 0, 1, workers=workers))
    assert str(caught.value).startswith("found 2 unreadable images in a row")
    assert "Traceback" not in str(caught.value)


def test_readers_have_one_thread_and_end_with_the_iterator(mixed_photos):
    import multiprocessing

    class Threads(InMemory):
        def name(self, index):
            return str(torch.get_num_threads())

    source = Threads([noise()] * 4)
    batches = loader(Crops(source, 16), Order(4, 2), 0, 10, workers=1)
    assert set(next(batches).names) == {"1"}
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


# --- Counting what is broken


def skipping(read, broken):
    """A batch of so many read images, and of these broken ones."""
    from phreg.data.crops import Batch

    skipped = [Skipped(name, f"cannot read {name}: it is empty") for name in broken]
    return Batch(torch.zeros(read, 3, 1, 1, dtype=torch.uint8), torch.arange(read), ["x"] * read, skipped)


def test_a_few_broken_images_are_warned_of_once_each(caplog):
    broken = BrokenImages(1000, max_broken=0.05)
    for _ in range(3):
        broken.add(skipping(8, ["a.jpg", "b.jpg"]))
    assert caplog.text.count("cannot read a.jpg") == 1
    assert sorted(broken.reasons) == ["a.jpg", "b.jpg"]


def test_too_many_broken_images_end_the_run_with_the_first_five_reasons():
    broken = BrokenImages(1000, max_broken=0.05)
    broken.add(skipping(92, [f"{i}.jpg" for i in range(5)]))
    with pytest.raises(DataError) as caught:
        broken.add(skipping(8, ["5.jpg", "6.jpg"]))
    text = str(caught.value)
    assert "7 of 107 read so far, more than --data.max-broken 0.05 allows" in text
    assert text.count("it is empty") == 5
    assert "and 2 more" in text


def test_the_share_of_broken_images_is_of_the_images_there_are_not_of_the_times_they_are_read():
    broken = BrokenImages(20, max_broken=0.05)
    broken.add(skipping(8, ["a.jpg"]))  # 1 of 20 is 0.05, which is allowed
    for _ in range(100):
        broken.add(skipping(8, []))
    with pytest.raises(DataError, match="2 of 20 read so far"):
        broken.add(skipping(8, ["b.jpg"]))


def test_no_broken_image_is_allowed_when_the_share_is_zero():
    with pytest.raises(DataError, match=r"1 of 9 read so far"):
        BrokenImages(1000, max_broken=0.0).add(skipping(8, ["a.jpg"]))


def test_a_photo_looks_as_it_did_before_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (
        torch.from_numpy(pixels / 255).permute(2, 0, 1).float() - torch.tensor(mean)[:, None, None]
    ) / (torch.tensor(std)[:, None, None])
    np.testing.assert_array_equal(denormalise(normalised, mean, std), pixels)


def test_larger_images_are_half_as_large_again_and_few(photos):
    backbone = adapt(FAMILIES["timm/vit"]())
    (batch,) = larger(backbone, open_images(str(photos)))
    assert batch.shape[1:] == (3, 48, 48)
    assert 1 <= len(batch) <= MEASURED_AT_ONCE
    backbone.check_size((48, 48))


def test_larger_images_hold_whole_patches(photos):
    backbone = adapt(FAMILIES["timm/dinov2"]())  # 56 pixels, patches of 14
    (batch,) = larger(backbone, open_images(str(photos)))
    assert batch.shape[-1] == 84


def test_larger_images_have_the_models_own_shape(tiny, photos):
    (batch,) = larger(adapt(tiny(img_size=(16, 64))), open_images(str(photos)))
    assert batch.shape[1:] == (3, 24, 96)


def test_a_model_of_fixed_size_is_shown_none(photos):
    backbone = adapt(FAMILIES["transformers/aimv2-vision"]())
    fixed = [adapt(build()) for name, build in FAMILIES.items() if name.startswith("transformers/siglip-vis")]
    for model in [backbone, *fixed]:
        assert bool(larger(model, open_images(str(photos)))) == model.spec.any_size
